"""Cross-layer equalization: factors moved between layers, so that the channels of a tensor fill its 8 bits alike."""
