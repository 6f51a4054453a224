"""ByteTables: the same bits, out of bytes."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.ir import GenericConst
from tvm.relax import op

from nnfuze_tvm.devices.targets import resolve
from nnfuze_tvm.graph.dataflow import bindings, op_name, operands
from nnfuze_tvm.graph.evaluate import evaluate
from nnfuze_tvm.passes.lower.byte_tables import ByteTables
from tests.schedules.kernels import schedule_and_run, single_function

RNG = np.random.default_rng(0)
CODES = RNG.integers(-127, 128, (1024, 64))
CODES[:, 3] = 127
SCALES = RNG.uniform(1e-3, 1e-1, (1024, 1)).astype("float32")


def picking(table: np.ndarray) -> tuple[tvm.IRModule, dict[str, np.ndarray]]:
    mod = single_function(
        {"rows": ((2, 7), "int64")},
        lambda builder, params: builder.emit(op.take(relax.const(table.astype("float32")), params[0], 0, "clip")),
    )
    return mod, {"rows": RNG.integers(0, len(table), (2, 7))}


def stored(mod: tvm.IRModule) -> list[str]:
    found = [leaf for b in bindings(mod["main"]) for leaf in operands(b.value) if isinstance(leaf, GenericConst)]
    return [str(leaf.ty.dtype) for leaf in found if leaf.ty.ndim == 2]


TABLES = {
    "a scale": (CODES * np.float32(0.013), ["int8"]),
    "a scale and a zero point": ((CODES + 90) * np.float32(0.7), ["uint8"]),
    "few steps": (np.clip(CODES, -3, 4) * np.float32(0.7), ["int8"]),
    "a scale per row": (CODES * SCALES, ["int8", "float32"]),
    "rows of zeros": (CODES * SCALES * (np.arange(1024) % 3 > 0)[:, None], ["int8", "float32"]),
    "one number of another scale": (CODES * np.float32(0.013) + np.eye(1024, 64) * 1e-3, ["float32"]),
    "floats": (RNG.standard_normal((1024, 64)), ["float32"]),
    "infinity": (np.where(CODES == 5, np.inf, CODES), ["float32"]),
    "a small table": (CODES[:64] * np.float32(0.013), ["float32"]),
}


@pytest.mark.parametrize("name", TABLES)
def test_the_same_bits(name: str) -> None:
    table, types = TABLES[name]
    mod, inputs = picking(table)
    (want,) = evaluate(mod["main"], inputs)
    narrow = ByteTables()(mod)
    assert stored(narrow) == types
    np.testing.assert_array_equal(evaluate(narrow["main"], inputs)[0], want)


def test_a_table_is_stored_once() -> None:
    table = relax.const(TABLES["a scale"][0].astype("float32"))

    def body(builder: relax.BlockBuilder, params: list[relax.Var]) -> relax.Expr:
        return relax.Tuple([builder.emit(op.take(table, rows, 0, "clip")) for rows in params])

    narrow = ByteTables()(single_function({"a": ((3,), "int64"), "b": ((5,), "int64")}, body))
    first, second = (b.value.args[0] for b in bindings(narrow["main"]) if op_name(b.value) == "take")
    assert first.same_as(second)


@pytest.mark.parametrize("name", ["a scale and a zero point", "a scale per row"])
def test_kernels_make_the_same_bits(name: str) -> None:
    mod, inputs = picking(TABLES[name][0])
    (want,) = evaluate(mod["main"], inputs)
    got = schedule_and_run(ByteTables()(mod), resolve("host"), inputs)
    assert "fallback" not in got.rules.values()
    np.testing.assert_array_equal(got.outputs[0], want)
