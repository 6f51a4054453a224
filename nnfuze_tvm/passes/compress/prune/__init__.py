"""Structured pruning: which channels go together, and how they leave the graph."""
