"""What a rule marks in a kernel and no schedule primitive can express."""
