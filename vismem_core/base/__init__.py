"""All that VisMem must know of one model."""
