"""Integers that stand for real numbers: what is known of them, and how exact int32 sums are emitted."""
