"""What compile, tune and analyze do, from options to result."""
