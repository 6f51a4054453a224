"""Phase 6: quantize/dequantize islands become integer operators."""
