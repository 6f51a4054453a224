"""One schedule rule per operator family."""
