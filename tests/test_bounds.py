"""Kernels of layers of any size stay inside of their buffers, on every class of targets."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from hypothesis import given
from hypothesis import strategies as st
from tvm import relax, tirx
from tvm.relax import op

from nnfuze_tvm.deploy import build
from nnfuze_tvm.devices.targets import resolve
from nnfuze_tvm.graph import ir
from nnfuze_tvm.graph.dataflow import Emitter
from nnfuze_tvm.passes.compress.insert_qdq import InsertQDQ
from nnfuze_tvm.passes.compress.policy import Policy
from tests import bounds
from tests.helpers import few

X86_64 = '{"kind": "llvm", "mcpu": "x86-64"}'
TARGETS = (X86_64, "x86-64-v3", "x86-64-v4", "aarch64", "aarch64+i8mm", "armv7")


def layer(
    kind: str, size: tuple[int, int], channels: int, out: int, kernel: int, stride: int, pad: int
) -> tvm.IRModule:
    """Return a layer with an activation, between two 1×1 convolutions that keep it channels last."""
    rng, emitter = np.random.default_rng(0), Emitter()
    x = tvm.ir.Var(emitter.unique("x"), relax.TensorType((1, channels, *size), "float32"))

    def convolution(value, shape, name, **attributes):
        weight = relax.const(rng.standard_normal(shape).astype("float32"))
        return emitter.emit(op.nn.relu(emitter.emit(op.nn.conv2d(value, weight, **attributes), name)))

    value = convolution(x, (channels, channels, 1, 1), "first")
    if kind == "pool":
        value = emitter.emit(op.nn.max_pool2d(value, (kernel, kernel), (stride, stride), (pad, pad)))
    else:
        groups = {"conv": 1, "depthwise": channels, "multiplied": channels}[kind]
        out = {"conv": out, "depthwise": channels, "multiplied": 2 * channels}[kind]
        shape = (out, channels // groups, kernel, kernel)
        value = convolution(value, shape, "middle", strides=stride, padding=pad, groups=groups)
    value = convolution(value, (out, ir.static_shape(value)[1], 1, 1), "last")
    mod = tvm.IRModule({"main": emitter.finish([x], [value]).with_attr("global_symbol", "main")})
    return ir.with_task_outputs(mod, [ir.TaskOutput("task", "y")])


@few(25)
@given(
    kind=st.sampled_from(["conv", "depthwise", "depthwise", "multiplied", "pool"]),
    size=st.tuples(st.integers(3, 19), st.integers(3, 19)),
    channels=st.integers(1, 40),
    out=st.integers(1, 40),
    kernel=st.sampled_from([1, 2, 3, 3, 5]),
    stride=st.integers(1, 3),
    pad=st.integers(0, 2),
    integer=st.booleans(),
    target=st.sampled_from(TARGETS),
)
def test_layers_of_any_size(kind, size, channels, out, kernel, stride, pad, integer, target):
    kernel = min(kernel, *size)
    mod = layer(kind, size, channels, out, kernel, stride, min(pad, kernel - 1))
    if integer:
        samples = np.random.default_rng(1).standard_normal((2, channels, *size)).astype("float32")
        mod = InsertQDQ({"x": samples}, Policy.uniform(bits=8))(mod)
    cpu = resolve(target)
    assert not bounds.outside_of(build.lower(mod, cpu), cpu)


@pytest.mark.parametrize("extent", [7, 8])
def test_what_is_written_outside_is_found(extent):
    i = tirx.Var("i", "int64")
    a = tirx.decl_buffer((8,), "float32", "a")
    store = tirx.BufferStore(a, tirx.FloatImm("float32", 0), [i + 1])
    func = tirx.PrimFunc([a], tirx.For(i, 0, extent, tirx.ForKind.SERIAL, store))
    assert bool(bounds.outside(func, resolve("host"))) == (extent == 8)
