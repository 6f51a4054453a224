from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relax

from nnfuze_tvm import schedules
from nnfuze_tvm.deploy import build
from nnfuze_tvm.devices.hardware import Hardware
from nnfuze_tvm.devices.targets import resolve
from nnfuze_tvm.graph import ops
from nnfuze_tvm.graph.ops.recurrence import recurrence
from nnfuze_tvm.graph.recurrent.cell import GATES, Activation, Cell
from nnfuze_tvm.graph.recurrent.form import Form, Sizes, operand_shapes
from nnfuze_tvm.schedules.families.recurrence import best_dots, best_tile
from tests.graph import recurrent
from tests.graph.calls import module
from tests.helpers import evaluate_module
from tests.schedules import kernels

TARGETS = ("x86-64-v3", "x86-64-v4", "aarch64", "armv7", '{"kind": "llvm", "mcpu": "x86-64-v2"}')


def form(kind, linear_before_reset=False, reverse=(False,)):
    names = {"lstm": ("sigmoid", "tanh", "tanh"), "gru": ("sigmoid", "tanh"), "rnn": ("tanh",)}[kind]
    cell = Cell(kind, tuple(Activation(name, 0.0, 0.0) for name in names), linear_before_reset=linear_before_reset)
    return Form((cell,) * len(reverse), reverse)


FORMS = (form("lstm"), form("gru"), form("gru", linear_before_reset=True), form("rnn"))


@pytest.mark.parametrize("target", TARGETS)
def test_sums_fit_the_registers_and_tiles_the_layer(target):
    hw = Hardware.of(resolve(target))
    for each in FORMS:
        for hidden in (1, 3, 8, 20, 64, 100, 128):
            for batch in (1, 2, 6, 7):
                tile = best_tile(each, Sizes(5, 1, batch, hidden, "float32"), hw)
                gates = 2 if each.waits else GATES[each.kind]
                assert tile.rows * tile.vectors * gates < hw.registers
                assert tile.units <= hidden and batch % tile.rows == 0 and tile.lanes <= hw.lanes("float32")


def test_large_layers_take_whole_vectors_and_many_sums():
    """Too few sums would wait for each other: four cycles each, two at a time."""
    hw = Hardware.of(resolve("x86-64-v3"))
    for each in FORMS:
        tile = best_tile(each, Sizes(5, 1, 1, 256, "float32"), hw)
        assert tile.lanes == 8 and tile.vectors * (1 if each.kind == "rnn" else 2 if each.waits else each.gates) >= 8


@pytest.mark.parametrize("constant", [True, False])
def test_constant_weights_are_packed_at_compile_time(constant):
    layer, sizes = form("gru", reverse=(False, True)), Sizes(4, 2, 1, 20, "float32")
    shapes = operand_shapes(layer, sizes)
    rng = np.random.default_rng(0)
    data = {name: rng.uniform(-0.5, 0.5, shape).astype("float32") for name, shape in shapes.items()}
    weights = data["weights"]
    params = {name: (shape, "float32") for name, shape in shapes.items() if not (constant and name == "weights")}

    def body(builder, variables):
        known = dict(zip(params, variables, strict=True))
        known.setdefault("weights", relax.const(weights))
        return builder.emit(recurrence(layer, [known[name] for name in layer.operands]))

    mod = kernels.single_function(params, body)
    feeds = {name: data[name] for name in params}
    (want,) = evaluate_module(mod, feeds)
    got = kernels.schedule_and_run(mod, resolve("host"), feeds)
    assert set(got.rules.values()) == {"recurrence"}
    np.testing.assert_allclose(got.outputs[0], want, atol=1e-6)
    lowered = build.lower(mod, resolve("host"))
    (kernel,) = (f for _, f in lowered.functions_items() if isinstance(f, tvm.tirx.PrimFunc))
    rank = len(kernel.params[1].ty.shape)
    assert rank == (4 if constant else 3)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("target", ["host", "x86-64-v3", *TARGETS[-1:]])
def test_integers_are_the_same_bits_by_every_instruction(target, dynamic):
    mod, feeds, want = recurrent.exact_layers(dynamic=dynamic)
    got = kernels.schedule_and_run(mod, resolve(target), feeds)
    assert set(got.rules.values()) == {"recurrence"}
    for mine, theirs in zip(got.outputs, want, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_floats_simulate_integers():
    """As the graph is between its quantization and its integers."""
    mod, feeds, want = recurrent.exact_layers(integer=False)
    for simulated, integer in zip(want, recurrent.exact_layers()[2], strict=True):
        np.testing.assert_array_equal(simulated, integer)
    for mine, theirs in zip(kernels.schedule_and_run(mod, resolve("host"), feeds).outputs, want, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_integers_are_multiplied_by_dot_products():
    kinds = {
        "x86-64-v3": ("int8", 4, 0),
        '{"kind": "llvm", "mcpu": "cascadelake"}': ("uint8", 4, 128),
        "rpi3": ("int8", 4, 0),
        "rpi5": ("int8", 4, 0),
    }
    for target, kind in kinds.items():
        dots = best_dots(Sizes(5, 1, 1, 64, "float32"), Hardware.of(resolve(target)))
        assert (dots.state, dots.depth, dots.shift) == kind, target


def test_wide_weights_are_multiplied_in_pairs():
    for target in ("x86-64-v3", '{"kind": "llvm", "mcpu": "cascadelake"}'):
        dots = best_dots(Sizes(5, 1, 1, 64, "float32"), Hardware.of(resolve(target)), "int16")
        assert (dots.state, dots.depth) == ("int16", 2), target


def test_there_is_nothing_to_tune():
    (mod,) = kernels.fused_kernels(module(ops.OPERATORS["nnfuze.recurrence"].examples[0])[0]).values()
    sch = tvm.s_tir.Schedule(mod)
    assert schedules.apply(sch, resolve("host"), tunable=True) == "recurrence"
    assert not sch.trace.decisions
