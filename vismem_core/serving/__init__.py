"""Serving: a model with memory behind the interface of OpenAI's chat completions."""
