"""Graphs in PyTorch and back: whatever trains. Optional: nothing else imports it before it is asked for."""
