"""Whether what was built computes what the networks compute that were given, and if not, from which layer on."""
