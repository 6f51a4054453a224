"""Facts about modules and machines: costs, measurements, limits."""
