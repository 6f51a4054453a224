"""Operators that claim to be pure, and of which two calls still are two values: the callee may be random."""

from nnfuze_tvm.graph.ops.operator import Operator

OPERATORS = {
    name: Operator(effect="mixes", opaque=True)
    for name in ("call_pure_packed", "call_dps_packed", "invoke_pure_closure", "nn.dropout")
}
