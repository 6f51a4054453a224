"""The doors that files come in by: whatever is in them, one error that callers expect."""
