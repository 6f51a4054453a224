"""The language that all rooms speak of a network: names, dataflow rewriting, constants, evaluation, operators."""

from nnfuze_tvm.graph.ir import Lineage, derive, lineage

__all__ = ["Lineage", "derive", "lineage"]
