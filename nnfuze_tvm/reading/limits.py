"""The largest numbers that mean anything."""

LONGEST_WAIT = 1e6
"""Seconds to wait for anything: eleven days."""

MOST_THREADS = 4096

MOST_TRIALS = 1_000_000
"""Tuning trials per kernel."""

MOST_EPOCHS = 10_000
"""How often a training sees a sample."""
