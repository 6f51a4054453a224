"""Phase 7: branches of one shape in one kernel."""
