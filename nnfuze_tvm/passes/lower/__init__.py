"""Phases 5 to 9: from a merged (and perhaps compressed) graph to one PrimFunc per fused kernel."""
