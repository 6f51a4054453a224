"""What layers say that their filters are multiplied by, times the filters, is what they compute."""

from __future__ import annotations

import numpy as np
import pytest
from tvm import relax

from nnfuze_tvm.graph import ops
from nnfuze_tvm.graph.constants import array
from nnfuze_tvm.graph.dataflow import bindings
from nnfuze_tvm.graph.evaluate import evaluate
from nnfuze_tvm.graph.ops.operator import Example
from tests.graph.calls import module

LAST = Example(
    ((1, 9, 8, 16), (6, 3, 2, 8)),
    lambda x, w: relax.op.nn.conv2d(x, w, (2, 1), (1, 0, 2, 1), groups=2, data_layout="NHWC", kernel_layout="OHWI"),
    constants=1,
)
EXAMPLES = [
    *(e for operator in ops.OPERATORS.values() if operator.rows for e in operator.examples if e.constants == 1),
    LAST,
]


@pytest.mark.parametrize("example", EXAMPLES)
def test_rows_times_filters_is_the_result(example):
    mod, data = module(example)
    (call,) = (binding.value for binding in bindings(mod["main"]))
    where, operator = ops.layer(call), ops.of(call)
    (given,) = data.values()
    filters = where.filters.unpack(array(call.args[1]))
    filters = filters.reshape(*filters.shape[:2], -1)
    want = np.moveaxis(evaluate(mod["main"], data)[0], where.result, -1)
    want = want.reshape(-1, want.shape[-1])
    places = np.arange(len(want))[::-1]
    found = np.einsum("gri,goi->rgo", operator.rows(call, given, places), filters)
    np.testing.assert_allclose(found.reshape(want.shape), want[places], rtol=1e-4, atol=1e-5)
