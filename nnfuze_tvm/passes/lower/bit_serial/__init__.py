"""Layers of few-bit numbers by counting bits."""
