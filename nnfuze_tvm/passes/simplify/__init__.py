"""Phase 2: fewer and larger operators, the same results."""
