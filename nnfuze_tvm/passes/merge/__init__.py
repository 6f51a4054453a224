"""Phase 1: from one function per task to one ``main``, equal computations once."""
