"""What a plan does to networks: the same bits in less memory, and which kernels may write over what they read."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.script import tirx as T

from nnfuze_tvm.deploy import build
from nnfuze_tvm.deploy.memory import kernels
from nnfuze_tvm.deploy.memory.overwrites import may_overwrite
from nnfuze_tvm.deploy.memory.split import halves
from nnfuze_tvm.deploy.memory.usage import usage
from nnfuze_tvm.devices.targets import resolve

HOST = resolve("host")
SIZE = 64


@T.prim_func(s_tir=True)
def in_step(x: T.Buffer((8, 8), "float32"), y: T.Buffer((8, 8), "float32")):
    for i in T.parallel(8):
        for j in T.vectorized(8):
            y[i, j] = x[i, j] + T.float32(1)


@T.prim_func(s_tir=True)
def in_rows(x: T.Buffer((8, 8), "float32"), y: T.Buffer((8, 8), "float32")):
    for i in range(8):
        total = T.alloc_buffer((1,), "float32")
        total[0] = T.float32(0)
        for j in range(8):
            total[0] = total[0] + x[i, j]
        for j in range(8):
            y[i, j] = total[0]


@T.prim_func(s_tir=True)
def twice(x: T.Buffer((8, 8), "float32"), y: T.Buffer((8, 8), "float32")):
    for i in range(2):
        for j, k in T.grid(5, 8):
            y[i * 3 + j, k] = x[i * 3 + j, k] + T.float32(1)


@T.prim_func(s_tir=True)
def shifted(x: T.Buffer((8, 8), "float32"), y: T.Buffer((8, 8), "float32")):
    for i, j in T.grid(8, 8):
        y[i, j] = T.if_then_else(i > 0, x[i - 1, j], T.float32(0))


@T.prim_func(s_tir=True)
def ahead(x: T.Buffer((8, 8), "float32"), y: T.Buffer((8, 8), "float32")):
    for i, j in T.grid(8, 8):
        y[i, j] = T.if_then_else(i < 7, x[i + 1, j], T.float32(0))


@T.prim_func(s_tir=True)
def ahead_in_parallel(x: T.Buffer((8, 8), "float32"), y: T.Buffer((8, 8), "float32")):
    for i in T.parallel(8):
        for j in range(8):
            y[i, j] = T.if_then_else(i < 7, x[i + 1, j], T.float32(0))


@T.prim_func(s_tir=True)
def turned(x: T.Buffer((8, 8), "float32"), y: T.Buffer((8, 8), "float32")):
    for i, j in T.grid(8, 8):
        y[i, j] = x[j, i]


@T.prim_func(s_tir=True)
def copied(x: T.Buffer((8, 8), "float32"), y: T.Buffer((8, 8), "float32")):
    own = T.alloc_buffer((32, 32), "float32")
    for i, j in T.grid(8, 8):
        own[i, j] = x[i, j]
    for i, j in T.grid(8, 8):
        y[i, j] = own[j, i]


CASES = [
    (in_step, True),
    (in_rows, True),
    (twice, False),
    (shifted, False),
    (ahead, True),
    (ahead_in_parallel, False),
    (turned, False),
    (copied, True),
]


@pytest.mark.parametrize(("func", "can"), CASES, ids=[func.attrs["global_symbol"] for func, _ in CASES])
def test_a_kernel_may_write_over_what_it_has_read(func: tvm.tirx.PrimFunc, can: bool) -> None:
    source, result = func.params
    assert may_overwrite(func, result, source) is can
    if can:
        data = np.random.default_rng(0).standard_normal((8, 8)).astype("float32")
        there = tvm.runtime.empty((8, 8), "float32")
        alone = tvm.runtime.tensor(data)
        compiled = tvm.compile(kernels.changed(func, 1, [], {0: 0}).with_attr("global_symbol", "over"), HOST)
        tvm.compile(func, HOST)(tvm.runtime.tensor(data), there)
        compiled(alone)
        np.testing.assert_array_equal(alone.numpy(), there.numpy())


def test_a_kernel_that_copies_first_is_cut_behind_the_copy() -> None:
    found = halves(copied, 1)
    assert found is not None and found.operands == ([0], [])
    assert len(found.first.params) == 2 and len(found.second.params) == 2
    assert halves(in_rows, 1) is None


def test_what_is_sorted_lies_in_the_arena() -> None:
    op = relax.op
    x = relax.Var("x", relax.TensorType((4, 30), "float32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x]):
        with builder.dataflow():
            kept = builder.emit(op.exp(x))
            both = builder.emit(op.topk(op.negative(kept), 3, 1, "both", True, "int64"))
            values = builder.emit(op.add(both[0], op.astype(both[1], "float32")))
            result = builder.emit_output(relax.Tuple([op.multiply(values, op.sum(kept, [1], True))]))
        builder.emit_func_output(result)
    data = np.random.default_rng(0).standard_normal((4, 30)).astype("float32")
    found = build.finished(build.lower(builder.get(), HOST), HOST)
    answer = relax.VirtualMachine(build.generate(found, HOST), tvm.cpu())["main"](tvm.runtime.tensor(data))[0].numpy()
    least = np.argsort(data, 1)[:, :3]
    wanted = (least - np.exp(np.take_along_axis(data, least, 1))) * np.exp(data).sum(1, keepdims=True)
    np.testing.assert_allclose(answer, wanted, rtol=1e-5)
    assert usage(found, HOST).arena >= 4 * (4 * 30 + 2 * 4 * 3)


def test_kernels_that_know_of_offsets_get_them_once() -> None:
    """TVM's scatter adds its tensors' offsets to its indices: where they lie in the arena mustn't count twice."""
    builder = relax.BlockBuilder()
    data = relax.Var("x", relax.TensorType((96,), "float32"))
    with builder.function("main", [data]):
        with builder.dataflow():
            # Larger than all that follows, and read at the end: the others lie behind it.
            wide = builder.emit(relax.op.exp(data))
            part = builder.emit(relax.op.strided_slice(wide, [0], [8], [32]))
            places = builder.emit(relax.op.astype(builder.emit(relax.op.clip(part, 0, 7)), "int64"))
            updates = builder.emit(relax.op.sqrt(part))
            added = builder.emit(
                relax.op.scatter_elements(relax.const(np.zeros(8, "float32")), places, updates, 0, "add")
            )
            first = builder.emit(relax.op.strided_slice(wide, [0], [0], [8]))
            result = builder.emit_output(relax.Tuple([builder.emit(relax.op.tanh(added + first))]))
        builder.emit_func_output(result)
    x = np.linspace(-4, 3, 96, dtype="float32")
    machine = relax.VirtualMachine(build.build(builder.get(), HOST), tvm.cpu())
    (got,) = machine["main"](tvm.runtime.tensor(x))
    want = np.exp(x)
    np.add.at(want, np.clip(np.exp(x)[8:32], 0, 7).astype("int64"), np.sqrt(np.exp(x)[8:32]))
    np.testing.assert_allclose(got.numpy(), np.tanh(want[:8]), atol=1e-6)
