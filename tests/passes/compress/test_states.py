"""Recurrent layers in 8 bits: what their states become, which layers, and how close they stay over many steps."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relax

from nnfuze_tvm.analysis import metrics
from nnfuze_tvm.graph import ir
from nnfuze_tvm.graph.dataflow import Emitter, bindings, op_name
from nnfuze_tvm.graph.evaluate import evaluate
from nnfuze_tvm.graph.ops.recurrence import recurrence
from nnfuze_tvm.graph.recurrent.cell import Activation, Cell
from nnfuze_tvm.graph.recurrent.form import Form, Sizes, operand_shapes
from nnfuze_tvm.jobs.check.check import _rounds_states
from nnfuze_tvm.passes.compress.insert_qdq import InsertQDQ
from nnfuze_tvm.passes.compress.policy import Policy
from nnfuze_tvm.passes.lower.integer.realize_integer import RealizeInteger

INT8 = Policy.uniform(bits=8)
NAMES = {"lstm": ("sigmoid", "tanh", "tanh"), "gru": ("sigmoid", "tanh"), "rnn": ("tanh",)}


def form(kind, directions=1, keeps_cell=False, **facts):
    functions = tuple(Activation(name, 1.0, 0.0) for name in NAMES[kind])
    return Form((Cell(kind, functions, **facts),) * directions, (False, True)[:directions], keeps_cell=keeps_cell)


def layer(own, sizes, size=1.0, constant=True):
    """Return a module of one layer, ``task/layer``, and its inputs: all but weights and peepholes."""
    rng, emitter, params, operands, data = np.random.default_rng(0), Emitter(), [], [], {}
    for name, shape in operand_shapes(own, sizes).items():
        value = rng.uniform(-1, 1, shape).astype("float32")
        if name == "weights":
            value *= 2 / np.sqrt(sizes.hidden)
        if name in ("projection", "hidden", "cell") or not constant:
            data[name] = value * (size if name in ("hidden", "cell") else 1)
            params.append(tvm.ir.Var(name, relax.TensorType(shape, "float32")))
            operands.append(params[-1])
        else:
            operands.append(relax.const(value))
    result = emitter.emit(recurrence(own, operands), "task/layer")
    main = emitter.finish(params, [result]).with_attr("global_symbol", "main")
    return ir.with_task_outputs(tvm.IRModule({"main": main}), [ir.TaskOutput("task", "y")]), data


def the_call(mod):
    (call,) = (b.value for b in bindings(mod["main"]) if op_name(b.value) == "nnfuze.recurrence")
    return call


@pytest.mark.parametrize(
    ("own", "sizes"),
    [
        (form("lstm", keeps_cell=True), (64, 1, 1, 64)),
        (form("lstm", 2, coupled=True), (20, 2, 2, 24)),
        (form("gru"), (100, 1, 1, 32)),
        (form("gru", linear_before_reset=True), (100, 1, 2, 24)),
        (form("rnn", 2), (64, 2, 1, 16)),
    ],
    ids=lambda value: value.kind if isinstance(value, Form) else None,
)
def test_states_of_8_bits_stay_close_over_many_steps(own, sizes):
    mod, data = layer(own, Sizes(*sizes, "float32"))
    simulated = InsertQDQ(data, INT8)(mod)
    integer = RealizeInteger()(simulated)
    assert not integer.attrs[ir.FLOAT_LAYERS_ATTR]
    call = the_call(integer)
    assert str(call.args[1].ty.dtype) == "int8" and str(call.attrs.codes_in) == "int8"
    (want,), (near,), (got,) = (evaluate(each["main"], data) for each in (mod, simulated, integer))
    span = np.ptp(want[: sizes[0]])
    assert np.abs(got - want).max() <= 0.03 * span
    # Sums of the simulation are rounded; a code may differ by that.
    assert np.abs(got - near).max() <= 0.01 * span


def test_layers_count_as_integer():
    mod, data = layer(form("lstm"), Sizes(5, 1, 1, 16, "float32"))
    assert [each.integer for each in metrics.layers(mod)] == [False]
    (cost,) = metrics.layers(InsertQDQ(data, INT8)(mod))
    assert cost.integer and cost.parameters >= 4 * 16 * 16


def test_the_check_knows_that_rounding_decides_between_codes():
    mod, data = layer(form("gru"), Sizes(5, 1, 1, 16, "float32"))
    quantized = InsertQDQ(data, INT8)(mod)
    assert [_rounds_states(each) for each in (mod, quantized, RealizeInteger()(quantized))] == [False, True, True]


def test_a_policy_keeps_a_layer_in_float():
    mod, data = layer(form("lstm"), Sizes(5, 1, 1, 16, "float32"))
    policy = Policy.parse({"default": {"bits": 8}, "layers": {"task/layer": {"bits": 32}}})
    kept = InsertQDQ(data, policy)(mod)
    assert the_call(kept).attrs.scale == 0.0
    np.testing.assert_array_equal(evaluate(kept["main"], data)[0], evaluate(mod["main"], data)[0])


def test_weights_that_are_computed_stay_and_are_named():
    mod, data = layer(form("gru"), Sizes(5, 1, 1, 16, "float32"), constant=False)
    kept = InsertQDQ(data, INT8)(mod)
    assert the_call(kept).attrs.scale == 0.0
    assert kept.attrs[ir.FLOAT_LAYERS_ATTR] == ["task/layer: its weights are not constant"]


def test_weights_that_a_file_stores_in_8_bits_keep_their_codes():
    own, sizes, rng = form("gru"), Sizes(5, 1, 1, 16, "float32"), np.random.default_rng(0)
    mod, data = layer(own, sizes)
    codes = rng.integers(-90, 91, (1, 48, 16)).astype("int8")
    scale, emitter = rng.uniform(0.001, 0.002, 48).astype("float32"), Emitter()
    zeros = relax.const(np.zeros(48, "int8"))
    wide = emitter.emit(relax.op.dequantize(relax.const(codes), relax.const(scale), zeros, axis=1))
    weights = emitter.emit(relax.op.permute_dims(wide, [0, 2, 1]))
    call = the_call(mod)
    result = emitter.emit(recurrence(own, [call.args[0], weights, *call.args[2:]]), "task/layer")
    main = emitter.finish(mod["main"].params, [result]).with_attr("global_symbol", "main")
    stored = ir.with_task_outputs(tvm.IRModule({"main": main}), ir.task_outputs(mod))
    integer = the_call(RealizeInteger()(InsertQDQ(data, INT8)(stored)))
    np.testing.assert_array_equal(integer.args[1].value.numpy(), codes.transpose(0, 2, 1))


def test_scales_hold_all_states():
    """An LSTM's states are within 1 whatever its cell's are; a GRU begins with any and keeps what it keeps of them."""
    sizes = Sizes(5, 1, 1, 16, "float32")
    for own, size, low, high in ((form("lstm", keeps_cell=True), 3, 2, 3), (form("gru"), 4, 3, 4)):
        mod, data = layer(own, sizes, size)
        scale = float(the_call(InsertQDQ(data, INT8)(mod)).attrs.scale)
        assert low / 127 < scale <= high / 127, own.kind
    mod, data = layer(form("lstm", keeps_cell=True), sizes)
    data["cell"] = data["cell"] * 100
    assert float(the_call(InsertQDQ(data, INT8)(mod)).attrs.scale) <= np.float32(1 / 127)
