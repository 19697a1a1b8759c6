"""Metrics: how good answers are, one file per idea of it."""
