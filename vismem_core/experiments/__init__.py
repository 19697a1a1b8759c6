"""Experiments: declarative recipes, run by one engine, told as tables, plots and a page; and the causal probe."""
