"""Recurrent layers in integers whose results are the same bits in whatever order and with whatever instructions."""

from __future__ import annotations

import numpy as np
import tvm
from tvm import relax

from nnfuze_tvm.graph.evaluate import evaluate
from nnfuze_tvm.graph.ops.recurrence import recurrence
from nnfuze_tvm.graph.recurrent.cell import Activation, Cell
from nnfuze_tvm.graph.recurrent.form import Form, Sizes, operand_shapes
from tests.schedules import kernels

# Whole vectors and tiles that overlap, reductions that end within a load, several sequences and directions.
SIZES = ((5, 1, 1, 64), (3, 2, 1, 20), (4, 1, 3, 37), (2, 1, 1, 3))


def exact_layers(
    integer: bool = True, dynamic: bool = False
) -> tuple[tvm.IRModule, dict[str, np.ndarray], list[np.ndarray]]:
    """Return a module of layers, in integers or in the floats that simulate them, their inputs, and what NumPy makes.

    Scales are powers of two and the cells only bound their sums, so no float is ever rounded but to a code. Dynamic
    scales are none, but what is added to their products is 0; every other layer then has weights of int16.
    """
    rng = np.random.default_rng(0)
    params, inputs, layers = {}, {}, []
    for n, (steps, directions, batch, units) in enumerate(SIZES):
        cell = Cell("rnn", (Activation("affine", 1.0, 0.0),), clip=1.0)
        codes = ("int16" if dynamic and n % 2 else "int8") if integer else ""
        reverse = (False, True)[:directions]
        form = Form((cell,) * directions, reverse, scale=0.0 if dynamic else 2.0**-7, codes_in=codes)
        shapes = operand_shapes(form, Sizes(steps, directions, batch, units, "float32"))
        # The largest weights, too.
        weights = rng.choice([-127, -1, 3, 127], shapes["weights"]).astype("int8")
        if codes == "int16":
            weights = weights * np.int16(2)
        made = {
            "projection": (rng.integers(-512, 512, shapes["projection"]) / 1024 * (not dynamic)).astype("float32"),
            "hidden": (rng.integers(-300, 300, shapes["hidden"]) / 256).astype("float32"),
            "scales": np.full((directions, units), 2.0 ** (-9 if dynamic else -14), "float32"),
            "totals": weights.astype("int32").sum(1, dtype="int32"),
        }
        names = {name: f"{name}{n}" for name in ("projection", "hidden")}
        params |= {own: (shapes[name], "float32") for name, own in names.items()}
        inputs |= {own: made[name] for name, own in names.items()}
        made["weights"] = weights if integer else (weights * 2.0**-7).astype("float32")
        layers.append((form, made, names))

    def body(builder: relax.BlockBuilder, variables: list[relax.Var]) -> relax.Expr:
        known = dict(zip(params, variables, strict=True))
        results = []
        for form, made, names in layers:
            operands = [
                known[names[name]] if name in names else relax.const(made[name], str(made[name].dtype))
                for name in form.operands
            ]
            results.append(builder.emit(recurrence(form, operands)))
        return relax.Tuple(results)

    mod = kernels.single_function(params, body)
    return mod, inputs, list(evaluate(mod["main"], inputs))
