"""One call of ``generate`` with memory."""
