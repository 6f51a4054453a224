"""Phase 8: 3×3 convolutions by fewer multiplications."""
