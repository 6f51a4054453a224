"""BatchBranches: fewer kernels, the same bits."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax
from tvm.script import ir as I
from tvm.script import relax as R
from tvm_ffi import structural_equal

from nnfuze_tvm.graph import dataflow, ir
from nnfuze_tvm.passes.lower.batching.batch_branches import BatchBranches, Costs
from tests.helpers import evaluate_module

LAYERS = ("nn.conv1d", "nn.conv2d", "matmul")


class Network:
    """Emits branches. Values are small integers, so that float sums are exact in any order."""

    def __init__(self, layout="NCHW", dtype="float32", seed=0):
        self.emitter = dataflow.Emitter()
        self.rng = np.random.default_rng(seed)
        self.layout, self.dtype = layout, dtype
        self.params = []
        self.outputs = []
        self.layers = 0

    @property
    def channel_axis(self):
        return self.layout.index("C")

    def tensor(self, channels, size, batch=1):
        sizes = {"N": batch, "C": channels, "H": size, "W": size}
        ty = relax.TensorType([sizes[letter] for letter in self.layout], self.dtype)
        self.params.append(tvm.ir.Var(f"x{len(self.params)}", ty))
        return self.params[-1]

    def vector(self, width, rows=1):
        self.params.append(tvm.ir.Var(f"x{len(self.params)}", relax.TensorType([rows, width], self.dtype)))
        return self.params[-1]

    def numbers(self, shape, dtype=None, low=-3, high=4):
        return relax.const(self.rng.integers(low, high, shape).astype(dtype or self.dtype))

    def per_channel(self, channels, dtype=None, low=-3, high=4):
        shape = [1, 1, 1, 1]
        shape[self.channel_axis] = channels
        return self.numbers(shape, dtype, low, high)

    def emit(self, value):
        return self.emitter.emit(value)

    def conv(self, x, channels, kernel=3, groups=1, strides=1):
        depth = ir.static_shape(x)[self.channel_axis]
        nhwc = self.layout == "NHWC"
        shape = (channels, depth // groups, kernel, kernel)
        weight = self.numbers([shape[i] for i in (0, 2, 3, 1)] if nhwc else shape)
        self.layers += 1
        call = relax.op.nn.conv2d(
            x,
            weight,
            strides=strides,
            padding=kernel // 2,
            groups=groups,
            data_layout=self.layout,
            kernel_layout="OHWI" if nhwc else "OIHW",
            out_dtype=None if self.dtype == "float32" else "int32",
        )
        result = self.emitter.emit(call, f"t/{self.layers}")
        return self.epilogue(result, channels)

    def epilogue(self, x, channels):
        """Bias and ReLU, or the integer chain that ends in 8 bits."""
        if self.dtype == "float32":
            return self.emit(relax.op.nn.relu(relax.op.add(x, self.per_channel(channels))))
        x = relax.op.add(x, self.per_channel(channels, "int32", -50, 50))
        scale = relax.const((self.per_channel(channels, "float32", 1, 9).value.numpy() / 64).astype("float32"))
        x = relax.op.round(relax.op.multiply(relax.op.astype(x, "float32"), scale))
        return self.emit(relax.op.astype(relax.op.clip(x, 0, 127), "int8"))

    def dense(self, x, width):
        self.layers += 1
        weight = self.numbers((ir.static_shape(x)[-1], width))
        out = None if self.dtype == "float32" else "int32"
        return self.emitter.emit(relax.op.matmul(x, weight, out_dtype=out), f"t/{self.layers}")

    def pool(self, x):
        return self.emit(relax.op.nn.max_pool2d(x, 2, 2, layout=self.layout))

    def flat_mean(self, x):
        spatial = [i for i, letter in enumerate(self.layout) if letter in "HW"]
        mean = relax.op.sum(relax.op.astype(x, "int32") if self.dtype != "float32" else x, spatial)
        mean = self.emit(mean)
        return mean if self.dtype == "float32" else self.emit(relax.op.astype(mean, "int8"))

    def module(self, *outputs):
        func = self.emitter.finish(self.params, outputs or self.outputs)
        return tvm.IRModule({"main": func.with_attr("global_symbol", "main")})


def layers(mod):
    return [b.var.name for b in dataflow.bindings(mod["main"]) if dataflow.op_name(b.value) in LAYERS]


def calls(mod, *names):
    return sum(dataflow.op_name(b.value) in names for b in dataflow.bindings(mod["main"]))


def batched(mod, run=True):
    """Apply the pass; check that the result is well formed and computes the same bits."""
    result = BatchBranches()(mod)
    relax.analysis.well_formed(result)
    if run:
        rng = np.random.default_rng(1)
        feeds = {p.name: rng.integers(-4, 5, ir.static_shape(p)).astype(str(p.ty.dtype)) for p in mod["main"].params}
        for before, after in zip(evaluate_module(mod, feeds), evaluate_module(result, feeds), strict=True):
            assert before.dtype == after.dtype
            np.testing.assert_array_equal(before, after)
    return result


VARIANTS = [(layout, dtype) for layout in ("NCHW", "NHWC") for dtype in ("float32", "int8")]


@pytest.fixture
def eager(monkeypatch):
    """Make every kernel that goes worth any copy, so that small graphs show what can be batched."""
    monkeypatch.setattr(Costs, "KERNEL", 100.0)
    monkeypatch.setattr(Costs, "copy", classmethod(lambda cls, size: size / 1e6))


def test_golden_wider_convolution():
    w0, w1, b0, b1 = (
        relax.const(np.full(shape, value, "float32"))
        for value, shape in enumerate([(8, 4, 3, 3), (8, 4, 3, 3), (1, 8, 1, 1), (1, 8, 1, 1)])
    )
    w = relax.const(np.concatenate([w0.value.numpy(), w1.value.numpy()]))
    b = relax.const(np.concatenate([b0.value.numpy(), b1.value.numpy()], 1))

    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor((1, 4, 6, 6), "float32")):
            with R.dataflow():
                c0 = R.nn.conv2d(x, w0)
                a0 = R.add(c0, b0)
                r0 = R.nn.relu(a0)
                m0 = R.mean(r0, [2, 3])
                c1 = R.nn.conv2d(x, w1)
                a1 = R.add(c1, b1)
                r1 = R.nn.relu(a1)
                m1 = R.mean(r1, [2, 3])
                R.output(m0, m1)
            return (m0, m1)

    @I.ir_module
    class After:
        @R.function
        def main(x: R.Tensor((1, 4, 6, 6), "float32")):
            with R.dataflow():
                c = R.nn.conv2d(x, w)
                a = R.add(c, b)
                r = R.nn.relu(a)
                m = R.mean(r, [2, 3])
                s = R.split(m, [8], axis=1)
                m0 = s[0]
                m1 = s[1]
                R.output(m0, m1)
            return (m0, m1)

    tvm.ir.assert_structural_equal(BatchBranches()(Before)["main"], After["main"])


def test_golden_grouped_convolution_and_batched_product(eager):
    w = [relax.const(np.full((4, 4, 1, 1), value, "float32")) for value in range(2)]
    d = [relax.const(np.full((4, 3), value, "float32")) for value in range(2)]
    joined_w = relax.const(np.concatenate([one.value.numpy() for one in w]))
    stacked = relax.const(np.stack([one.value.numpy() for one in d]))
    w0, w1, d0, d1 = *w, *d

    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor((1, 4, 2, 2), "float32"), y: R.Tensor((1, 4, 2, 2), "float32")):
            with R.dataflow():
                c0 = R.nn.conv2d(x, w0)
                m0 = R.mean(c0, [2, 3])
                o0 = R.matmul(m0, d0)
                c1 = R.nn.conv2d(y, w1)
                m1 = R.mean(c1, [2, 3])
                o1 = R.matmul(m1, d1)
                R.output(o0, o1)
            return (o0, o1)

    @I.ir_module
    class After:
        @R.function
        def main(x: R.Tensor((1, 4, 2, 2), "float32"), y: R.Tensor((1, 4, 2, 2), "float32")):
            with R.dataflow():
                xy = R.concat((x, y), axis=1)
                c = R.nn.conv2d(xy, joined_w, groups=2)
                m = R.mean(c, [2, 3])
                flat = R.reshape(m, R.shape([2, 1, 4]))
                o = R.matmul(flat, stacked)
                joined = R.reshape(o, R.shape([1, 6]))
                s = R.split(joined, [3], axis=1)
                o0 = s[0]
                o1 = s[1]
                R.output(o0, o1)
            return (o0, o1)

    tvm.ir.assert_structural_equal(batched(Before, run=False)["main"], After["main"])


@pytest.mark.parametrize(("layout", "dtype"), VARIANTS)
def test_chain_to_the_heads(layout, dtype):
    """A chain with a residual, a depthwise layer and a pooling costs one split, at the very end."""
    net = Network(layout, dtype)
    x = net.tensor(4, 8)
    for _ in range(3):
        value = net.conv(x, 8)
        skip = net.pool(value)
        value = net.conv(skip, 8, groups=8)
        value = net.conv(value, 8, kernel=1)
        value = net.flat_mean(net.emit(relax.op.maximum(value, skip)))
        net.outputs.append(net.dense(value, 5))
    after = batched(net.module())
    assert len(layers(after)) == 4
    assert (calls(after, "concat"), calls(after, "split")) == (0, 1)
    assert len(dataflow.output_fields(after["main"])) == 3


def test_names_and_aliases():
    net = Network()
    x = net.tensor(4, 8)
    after = batched(net.module(*(net.flat_mean(net.conv(x, 8)) for _ in range(3))), run=False)
    assert layers(after) == ["t/1"]
    assert ir.aliases(after) == {"t/2": "t/1", "t/3": "t/1"}


@pytest.mark.parametrize("rows", [1, 3])
def test_dense_layers(eager, rows):
    net = Network()
    x = net.vector(6, rows)
    hidden = [net.emit(relax.op.nn.relu(net.dense(x, 4))) for _ in range(3)]
    after = batched(net.module(*(net.emit(relax.op.nn.softmax(net.dense(h, 5))) for h in hidden)))
    assert len(layers(after)) == 2


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("rows", [1, 3])
def test_equal_weights_take_more_rows(eager, rows, dtype):
    net = Network(dtype=dtype)
    weight = net.numbers((4, 5))
    out = None if dtype == "float32" else "int32"
    mod = net.module(*[net.emit(relax.op.matmul(net.vector(4, rows), weight, out_dtype=out)) for _ in range(3)])
    (product,) = [b.value for b in dataflow.bindings(batched(mod)["main"]) if dataflow.op_name(b.value) == "matmul"]
    assert [ir.static_shape(arg) for arg in product.args] == [(3 * rows, 4), (4, 5)]


@pytest.mark.parametrize(("shape", "axis", "joins"), [((3, 1, 4), 0, 0), ((1, 12), 1, 0), ((2, 3, 4), 1, 1)])
def test_slices_of_one_tensor_need_not_be_joined(eager, shape, axis, joins):
    """A scan takes its input apart; its products put it together again."""
    net = Network()
    net.params.append(tvm.ir.Var("x", relax.TensorType(shape, "float32")))
    pieces, weight = net.emit(relax.op.split(net.params[0], 3, axis)), net.numbers((4, 5))
    rows = int(np.prod(shape)) // 12
    slices = [net.emit(relax.op.reshape(relax.TupleGetItem(pieces, n), [rows, 4])) for n in range(3)]
    result = batched(net.module(*[net.emit(relax.op.matmul(each, weight)) for each in slices]))
    assert calls(result, "matmul") == 1 and calls(result, "concat") == joins
    other = batched(net.module(*[net.emit(relax.op.matmul(each, weight)) for each in slices[::-1]]))
    assert calls(other, "concat") == 1


def test_different_depths_split_late(eager):
    """Two branches of three go on: the third leaves, the others stay together."""
    net = Network()
    x = net.tensor(4, 6)
    first = [net.conv(x, 4) for _ in range(3)]
    second = [net.conv(value, 4) for value in first[:2]]
    after = batched(net.module(*(net.flat_mean(value) for value in [*second, first[2]])))
    assert len(layers(after)) < 5


def test_other_shapes_are_left_alone(eager):
    net = Network()
    x = net.tensor(4, 6)
    outputs = [net.conv(x, 4), net.conv(x, 4, kernel=1), net.conv(x, 4, strides=2), net.conv(x, 4, groups=2)]
    assert len(layers(batched(net.module(*outputs)))) == 4


def test_depthwise_on_a_common_input(eager):
    net = Network()
    x = net.tensor(4, 6)
    after = batched(net.module(*(net.conv(x, 4, groups=4) for _ in range(2))))
    assert len(layers(after)) == 1 and calls(after, "concat") == 1


def test_skip_from_a_common_input(eager):
    net = Network()
    x = net.tensor(8, 6)
    outputs = [net.emit(relax.op.add(net.conv(x, 8), x)) for _ in range(2)]
    assert len(layers(batched(net.module(*outputs)))) == 1


def test_layers_in_sequence_are_not_batched(eager):
    net = Network()
    x = net.tensor(4, 6)
    value = net.conv(net.conv(net.conv(x, 4), 4), 4)
    assert len(layers(batched(net.module(value), run=False))) == 3


def test_branches_that_read_each_other(eager):
    """A second branch that needs the first's result can't wait to be computed beside it."""
    net = Network()
    x = net.tensor(4, 6)
    first = net.conv(x, 4)
    deep = net.conv(first, 4)
    second = net.emit(relax.op.add(net.conv(x, 4), deep))
    batched(net.module(deep, net.conv(second, 4)))


def test_result_used_twice_and_inside(eager):
    net = Network()
    x = net.tensor(4, 6)
    first = [net.conv(x, 4) for _ in range(2)]
    second = [net.conv(value, 4) for value in first]
    batched(net.module(first[0], *second, net.emit(relax.op.add(first[0], first[1])), first[0]))


def test_flattened_mean_stays_joined():
    net = Network()
    x = net.tensor(4, 6)
    for _ in range(4):
        mean = relax.op.sum(net.conv(x, 8), [2, 3], keepdims=True)
        flat = net.emit(relax.op.reshape(net.emit(mean), [1, 8]))
        net.outputs.append(net.dense(flat, 5))
    after = batched(net.module())
    assert len(layers(after)) == 2 and (calls(after, "concat"), calls(after, "split")) == (0, 1)


MIXING = {
    "sum": lambda x, c: relax.op.sum(x, [c]),
    "sum of all": lambda x, c: relax.op.sum(x, [1, 2, 3]),
    "max": lambda x, c: relax.op.max(x, [c], keepdims=True),
    "softmax": lambda x, c: relax.op.nn.softmax(x, c),
    "flatten": lambda x, c: relax.op.reshape(x, [1, 4 * 4 * 4]),
    "fold": lambda x, c: relax.op.reshape(x, [4, 4, 4]),
    "transpose": lambda x, c: relax.op.permute_dims(x, [0, 3, 2, 1]),
    "transpose and sum": lambda x, c: relax.op.sum(relax.op.permute_dims(x, [0, 3, 2, 1]), [c]),
    "pad": lambda x, c: relax.op.nn.pad(x, [0, 0, 1, 1, 1, 1, 1, 1]),
    "pad others": lambda x, c: relax.op.nn.pad(x, [int(i // 2 in (5 - c, 2)) for i in range(8)]),
    "matmul": lambda x, c: relax.op.matmul(x, relax.const(np.eye(4, 3, dtype="float32"))),
}


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_operators_that_mix_or_move_channels(eager, layout):
    """All sizes are 4, so that nothing but the axes tells what may stay joined."""
    net = Network(layout)
    for mix in MIXING.values():
        x = net.tensor(4, 4)
        for _ in range(2):
            value = net.emit(mix(net.conv(x, 4), net.channel_axis))
            net.outputs.append(net.emit(relax.op.add(value, net.numbers(ir.static_shape(value)))))
    assert len(layers(batched(net.module()))) < net.layers


def test_copies_that_cost_more_than_they_save_are_not_made():
    net = Network()
    outputs = [net.conv(net.tensor(32, 24), 32) for _ in range(2)]
    mod = net.module(*outputs)
    assert BatchBranches()(mod).same_as(mod)


def test_nothing_to_do():
    net = Network()
    mod = net.module(net.conv(net.tensor(4, 6), 4))
    assert BatchBranches()(mod).same_as(mod)


@st.composite
def forests(draw):
    """2 to 8 branches on one or several inputs that follow one plan, each for as long as it likes."""
    layout, dtype = draw(st.sampled_from(VARIANTS))
    net = Network(layout, dtype, draw(st.integers(0, 99)))
    count = draw(st.integers(2, 8))
    common = draw(st.booleans())
    steps = draw(st.lists(st.sampled_from(["conv", "wide", "depthwise", "pool", "skip"]), max_size=4))
    first = net.tensor(4, 4)
    values = [first if common or i == 0 else net.tensor(4, 4) for i in range(count)]
    ends = [draw(st.integers(1, 4)) for _ in range(count)] if draw(st.booleans()) else [4] * count
    for i in range(count):
        value = values[i]
        for step in steps[: ends[i]]:
            channels, size = (ir.static_shape(value)[axis] for axis in (net.channel_axis, layout.index("H")))
            if step == "conv":
                value = net.conv(value, channels)
            elif step == "wide":
                value = net.conv(value, 6, kernel=1)
            elif step == "depthwise":
                value = net.conv(value, channels, groups=channels)
            elif step == "pool" and size > 1:
                value = net.pool(value)
            elif step == "skip":
                value = net.emit(relax.op.maximum(net.conv(value, channels), value))
        net.outputs.append(net.dense(net.flat_mean(value), 3) if draw(st.booleans()) else value)
    return net.module()


@settings(max_examples=20)
@given(forests(), st.booleans())
def test_bits_do_not_change(mod, is_eager):
    with pytest.MonkeyPatch.context() as patch:
        if is_eager:
            patch.setattr(Costs, "KERNEL", 1000.0)
        after = batched(mod)
    assert len(layers(after)) <= len(layers(mod))


@settings(max_examples=60)
@given(forests(), st.booleans())
def test_structure(mod, is_eager):
    with pytest.MonkeyPatch.context() as patch:
        if is_eager:
            patch.setattr(Costs, "KERNEL", 1000.0)
        after = batched(mod, run=False)
    assert len(layers(after)) + len(ir.aliases(after)) == len(layers(mod))
    assert set(ir.aliases(after).values()) <= set(layers(after))
    fields = zip(dataflow.output_fields(mod["main"]), dataflow.output_fields(after["main"]), strict=True)
    for before, now in fields:
        assert structural_equal(before.ty, now.ty)
