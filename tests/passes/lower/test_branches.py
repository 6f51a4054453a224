from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.relax import op

from nnfuze_tvm.deploy import build
from nnfuze_tvm.graph.dataflow import bindings, op_name
from nnfuze_tvm.passes.lower.branches import SkipBranches
from tests.helpers import evaluate_module
from tests.schedules import kernels

_INPUTS = {"x": ((1, 16), "float32"), "which": ((1,), "bool"), "other": ((), "bool")}


def _weights(seed):
    return relax.const(np.random.default_rng(seed).standard_normal((16, 16)).astype("float32"))


def _layer(builder, data, seed):
    return builder.emit(op.nn.relu(builder.emit(op.matmul(data, _weights(seed)))))


def _two_layers(builder, variables):
    data, which, _ = variables
    return builder.emit(op.where(op.reshape(which, []), _layer(builder, data, 1), _layer(builder, data, 2)))


def _common_trunk(builder, variables):
    data, which, _ = variables
    trunk = _layer(builder, data, 1)
    return builder.emit(op.where(which, _layer(builder, trunk, 2), trunk))


def _nested(builder, variables):
    data, which, other = variables
    inner = builder.emit(op.where(other, _layer(builder, data, 1), _layer(builder, data, 2)))
    return builder.emit(op.where(op.reshape(which, []), inner, _layer(builder, data, 3)))


def _chosen_twice(builder, variables):
    """One layer is chosen when true by one choice and when false by another: it always matters."""
    data, which, _ = variables
    condition, layer = builder.emit(op.reshape(which, [])), _layer(builder, data, 1)
    first = builder.emit(op.where(condition, layer, _layer(builder, data, 2)))
    return builder.emit(op.add(first, builder.emit(op.where(condition, data, layer))))


def _only_maps(builder, variables):
    data, which, _ = variables
    return builder.emit(op.where(op.reshape(which, []), op.nn.relu(data), op.exp(data)))


@pytest.mark.parametrize(
    ("body", "asking"),
    [(_two_layers, [1, 1]), (_common_trunk, [0, 1]), (_nested, [1, 2, 2]), (_chosen_twice, [0, 1]), (_only_maps, [])],
)
def test_kernels_of_one_side_ask_first(body, asking):
    """``asking``: how many conditions each kernel of a layer asks for."""
    mod = kernels.single_function(_INPUTS, body)
    lowered = build.lower(mod, kernels.HOST)
    calls = [b.value for b in bindings(SkipBranches()(lowered)["main"]) if op_name(b.value) == "call_tir"]
    layers = [call.args[1] for call in calls if "matmul" in call.args[0].name_hint]
    counts = [sum(str(operand.ty.dtype) == "bool" for operand in read) for read in layers]
    assert sorted(counts) == asking
    machine = relax.VirtualMachine(build.generate(lowered, kernels.HOST), tvm.cpu())
    data = np.random.default_rng(0).standard_normal((1, 16)).astype("float32")
    for which in (False, True):
        for other in (False, True):
            inputs = {"x": data, "which": np.array([which]), "other": np.array(other)}
            got = machine["main"](*map(tvm.runtime.tensor, inputs.values()))
            outputs = [got] if isinstance(got, tvm.runtime.Tensor) else got
            for found, wanted in zip(outputs, evaluate_module(mod, inputs), strict=True):
                np.testing.assert_allclose(found.numpy(), wanted, atol=1e-5)


def test_what_is_not_chosen_is_not_computed():
    """NaN that the other side would have written does not appear in its place in memory."""
    mod = kernels.single_function(_INPUTS, _two_layers)
    skipped = SkipBranches()(build.lower(mod, kernels.HOST))
    (name,) = [gvar.name_hint for gvar, _ in skipped.functions_items() if gvar.name_hint.endswith("_if")]
    func = skipped[name].with_attr("global_symbol", "main")
    run = tvm.compile(tvm.IRModule({"main": func}), kernels.HOST)
    shapes = [[int(dim) for dim in param.ty.shape] for param in func.params]
    for asked in (False, True):
        result = tvm.runtime.tensor(np.full(shapes[-1], np.nan, "float32"))
        operands = [tvm.runtime.tensor(np.ones(shape, "float32")) for shape in shapes[1:-1]]
        run["main"](tvm.runtime.tensor(np.array(asked)), *operands, result)
        assert np.isnan(result.numpy()).all() != asked
