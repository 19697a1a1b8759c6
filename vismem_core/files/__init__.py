"""What is on disk: samples, trained memory, answers."""
