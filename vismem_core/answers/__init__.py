"""Answers and what they are worth."""
