"""The NumPy evaluator against TVM's own kernels: every example of every operator, and modules with PrimFuncs."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.relax import op

from nnfuze_tvm.graph import ir, ops
from nnfuze_tvm.graph.dataflow import Emitter
from nnfuze_tvm.graph.evaluate import _ready, call_of_constants, evaluate, executor
from tests.graph.calls import calls, examples
from tests.helpers import run_module

FAMILIES = sorted({operator.family for operator in ops.OPERATORS.values() if operator.evaluate and operator.examples})


@pytest.mark.parametrize("family", FAMILIES)
def test_operators_equal_their_kernels(family):
    # All in one module: each that is built takes longer than its kernels.
    mod, inputs = calls({name: each for name, each in examples(family).items() if _operator(name).evaluate})
    results = zip(ir.task_outputs(mod), evaluate(mod["main"], inputs), run_module(mod, inputs, level=0), strict=True)
    for owner, got, want in results:
        assert got.dtype == want.dtype and got.shape == want.shape, owner.name
        operator = _operator(owner.name)
        assert not operator.of_one or np.abs(want).max() <= 1, owner.name
        if want.dtype.kind == "f" and not operator.exact:
            span = np.ptp(want) or 1.0
            tolerance = (1e-3 if want.dtype == "float16" else 1e-5) * max(span, np.abs(want).max())
            np.testing.assert_allclose(got, want, rtol=0, atol=tolerance, err_msg=owner.name)
        else:
            np.testing.assert_array_equal(got, want, err_msg=owner.name)


def _operator(layer: str) -> ops.Operator:
    return ops.OPERATORS[layer.removeprefix("task/").rsplit("-", 1)[0]]


@pytest.mark.parametrize("kind", ["conv1d", "conv2d", "conv3d"])
@pytest.mark.parametrize(("groups", "stride", "dilation"), [(1, 1, 1), (1, 2, 2), (8, 2, 1), (2, 1, 2)])
def test_integer_convolutions_are_exact(kind, groups, stride, dilation):
    rank = int(kind[4])
    rng = np.random.default_rng(rank * groups)
    shape, kernel = (2, 8, *[9] * rank), (16, 8 // groups, *[3] * rank)
    weights = rng.integers(-127, 128, kernel).astype("int8")
    data = relax.Var("x", relax.TensorType(shape, "int8"))
    builder = relax.BlockBuilder()
    with builder.function("main", [data]):
        with builder.dataflow():
            convolve = getattr(op.nn, kind)
            call = convolve(
                data,
                relax.const(weights),
                strides=stride,
                padding=1,
                dilation=dilation,
                groups=groups,
                out_dtype="int32",
            )
            result = builder.emit_output(relax.Tuple([builder.emit(call)]))
        builder.emit_func_output(result)
    mod = builder.get()
    inputs = {"x": rng.integers(-128, 128, shape).astype("int8")}
    np.testing.assert_array_equal(evaluate(mod["main"], inputs)[0], run_module(mod, inputs, level=0)[0])


def test_prim_funcs_are_run():
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((4, 5), "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            doubled = builder.emit_te(lambda t: tvm.te.compute(t.shape, lambda i, j: t[i, j] * 2.0), x)
            result = builder.emit_output(relax.Tuple([builder.emit(op.add(doubled, relax.const(np.float32(1))))]))
        builder.emit_func_output(result)
    data = np.arange(20, dtype="float32").reshape(4, 5)
    (got,) = executor(builder.get())({"x": data})
    np.testing.assert_array_equal(got, data * 2 + 1)


def test_an_operator_without_a_numpy_form_is_compiled():
    x = relax.Var("x", relax.TensorType((3, 4), "float32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x]):
        with builder.dataflow():
            result = builder.emit_output(relax.Tuple([builder.emit(op.topk(x, 2, ret_type="values"))]))
        builder.emit_func_output(result)
    data = np.random.default_rng(0).standard_normal((3, 4)).astype("float32")
    (got,) = evaluate(builder.get()["main"], {"x": data})
    np.testing.assert_array_equal(got, -np.sort(-data, 1)[:, :2])


def test_calls_of_constants_keep_their_type():
    whole = relax.const(np.array([[5, -(2**40)]]), "int64")
    call = relax.BlockBuilder().normalize(op.add(whole, whole))
    result = call_of_constants(call)
    assert result is not None and result.dtype == "int64" and result.tolist() == [[10, -(2**41)]]
    x = relax.Var("x", relax.TensorType((1, 2), "int64"))
    assert call_of_constants(relax.BlockBuilder().normalize(op.add(whole, x))) is None


def test_a_compiled_operator_may_have_several_results():
    x = relax.Var("x", relax.TensorType((1, 5), "float32"))
    emitter = Emitter()
    both = emitter.emit(op.topk(x, 2, axis=1, ret_type="both", dtype="int64"))
    func = emitter.finish([x], [emitter.emit(relax.TupleGetItem(both, n)) for n in range(2)])
    values, places = evaluate(func, {"x": np.array([[3, 9, 1, 7, 5]], "float32")})
    np.testing.assert_array_equal(values, [[9, 7]])
    np.testing.assert_array_equal(places, [[1, 3]])


def test_what_tvm_computes_is_compiled_once():
    rng, shapes = np.random.default_rng(0), {"x": (1, 2, 5, 7), "grid": (1, 2, 2, 3)}
    x, grid = (relax.Var(name, relax.TensorType(shape, "float32")) for name, shape in shapes.items())
    builder = relax.BlockBuilder()
    with builder.function("main", [x, grid]):
        with builder.dataflow():
            result = builder.emit_output(relax.op.image.grid_sample(x, grid, "bilinear", "NCHW", "zeros", True))
        builder.emit_func_output(result)
    before = _ready.cache_info().misses
    for _ in range(3):
        data = rng.standard_normal(shapes["x"]).astype("float32")
        corners = np.stack(np.meshgrid([-1, 0, 1], [-1, 1])).astype("float32")[None]
        (found,) = evaluate(builder.get()["main"], {"x": data, "grid": corners})
        np.testing.assert_allclose(found[0, :, 0, 0], data[0, :, 0, 0], rtol=1e-6)
    assert _ready.cache_info().misses == before + 1
