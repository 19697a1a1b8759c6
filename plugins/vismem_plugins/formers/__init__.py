"""Memory formers: LoRA on the model's own towers, and small stand-alone encoders."""
