"""Memory: what is attached to a model, and the interfaces of its parts."""
