"""Phases 3 and 4: what a policy asks for: pruned, 8-bit and float16 layers."""
