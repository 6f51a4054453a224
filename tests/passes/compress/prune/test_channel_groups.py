"""Which channels belong together, read from the groups themselves."""

import numpy as np
import pytest
from tvm import relax
from tvm.relax import op

from nnfuze_tvm.graph.channels import Filters
from nnfuze_tvm.graph.ops.moving import segments
from nnfuze_tvm.passes.compress.prune.channel_groups import CoupledFunction


def coupling(shape, build):
    """Return the coupling of a function of one input; ``build(emit, conv, x)`` returns its output."""
    block = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType(shape, "float32"))

    def conv(x, out, name, groups=1):
        weight = np.ones((out, int(x.ty.shape.values[1]) // groups, 1, 1), "float32")
        return block.emit(op.nn.conv2d(x, relax.const(weight), groups=groups), name)

    with block.function("main", [x]):
        with block.dataflow():
            out = block.emit_output(relax.Tuple([build(block.emit, conv, x)]))
        block.emit_func_output(out)
    return CoupledFunction(block.get()["main"])


def groups(shape, build):
    return [(group.names, len(group.classes)) for group in coupling(shape, build).groups()]


def test_residual():
    def build(emit, conv, x):
        a = conv(x, 8, "a")
        b = conv(emit(op.nn.relu(conv(a, 4, "b"))), 8, "c")
        return conv(emit(op.add(a, b)), 2, "d")

    assert groups((1, 3, 4, 4), build) == [(["a", "c"], 8), (["b"], 4)]


def test_concat_and_slice_divide_groups():
    def build(emit, conv, x):
        y = emit(op.concat([conv(x, 8, "a"), conv(x, 4, "b")], axis=-3))
        y = emit(op.strided_slice(y, [1], [2], [10]))
        return conv(y, 2, "c")

    # The two channels at either end are read by nobody, and still apart from those that are.
    assert groups((1, 3, 4, 4), build) == [(["a"], 2), (["a"], 6), (["b"], 2), (["b"], 2)]


def test_depthwise_and_grouped():
    def build(emit, conv, x):
        y = conv(conv(x, 8, "a"), 16, "dw", groups=8)
        return conv(conv(y, 12, "g", groups=2), 2, "last")

    # The grouped convolution ties channel i to channel i + 8 of dw, that is i // 2 to i // 2 + 4 of a.
    assert groups((1, 3, 4, 4), build) == [(["a", "dw"], 4), (["g"], 6)]


def test_nothing_to_remove():
    assert groups((1, 3, 4, 4), lambda emit, conv, x: conv(x, 8, "a")) == []


@pytest.mark.parametrize(("transposed", "shape"), [(False, (6, 4, 3, 2)), (True, (8, 3, 3, 2))])
def test_filters_there_and_back(transposed, shape):
    weight = np.arange(np.prod(shape)).reshape(shape)
    order = (1, 0) if transposed else (0, 1)
    filters = Filters(2, *order, transposed)
    assert filters.unpack(weight).shape == (2, 3, 4, 3, 2)
    np.testing.assert_array_equal(filters.pack(filters.unpack(weight)), weight)
    # What group 1 makes of its first input, as output 2.
    value = weight[4, 2] if transposed else weight[5, 0]
    np.testing.assert_array_equal(filters.unpack(weight)[1, 2, 0], value)


def test_segments_of_a_reshape():
    assert list(segments([1, 8, 4, 4], [1, 128])) == [([1, 2, 3], [1])]
    assert list(segments([2, 6, 5], [2, 2, 3, 1, 5])) == [([0], [0]), ([1], [1, 2]), ([2], [4])]
    assert list(segments([4, 6], [6, 4])) == [([0, 1], [0, 1])]
    assert list(segments([1, 1], [1])) == []
