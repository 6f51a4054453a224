"""From a graph to what runs on the device: executables, bundles, boards."""
