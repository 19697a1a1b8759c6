"""Showing memory at work: a page on which people ask, and see who invoked what, and where it looked."""
