"""Images of another size."""

from __future__ import annotations

from tvm.relax import op

from nnfuze_tvm.graph.ops.operator import Example, Operator
from nnfuze_tvm.graph.ops.pooling import couple

OPERATORS = {
    "image.resize2d": Operator(
        effect="mixes",
        examples=(
            Example(((1, 8, 6, 6),), lambda x: op.image.resize2d(x, (12, 12), method="nearest_neighbor")),
            Example(((1, 8, 6, 6),), lambda x: op.image.resize2d(x, (12, 12))),
        ),
        couple=couple,
        kernels=("elementwise",),
    ),
}
