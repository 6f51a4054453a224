"""TensorFlow Lite files that keep something from one inference to the next, and those of 16 bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm

import nnfuze_tvm
from nnfuze_tvm.errors import ModelError
from nnfuze_tvm.graph import evaluate, ir
from nnfuze_tvm.graph.links import wire
from nnfuze_tvm.passes import pipeline
from tests.frontend.tflite_files import File, steps

RNG = np.random.default_rng(0)


def uniform(*shape: int, bound: float = 0.5) -> np.ndarray:
    return RNG.uniform(-bound, bound, shape).astype("float32")


def ours(data: bytes, calls: Sequence[Mapping[str, np.ndarray]], folder: Path) -> list[list[np.ndarray]]:
    """Return what our graph computes in calls that follow each other."""
    path = folder / "network.tflite"
    path.write_bytes(data)
    loaded = nnfuze_tvm.load([path])
    states = wire(loaded).zeros()
    run = evaluate.executor(tvm.transform.Sequential(pipeline.merge_phases())(loaded))
    results = []
    for inputs in calls:
        values = run({**inputs, **states})
        count = len(values) - len(states)
        states = dict(zip(states, values[count:], strict=True))
        results.append(values[:count])
    return results


def check(data: bytes, calls: Sequence[Mapping[str, np.ndarray]], folder: Path, most: int = 0) -> None:
    """Compare with TensorFlow Lite call by call: floats within rounding, integers within ``most`` steps."""
    for got, want in zip(ours(data, calls, folder), steps(data, calls), strict=True):
        for mine, theirs in zip(got, want, strict=True):
            assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype)
            if theirs.dtype == np.float32:
                np.testing.assert_allclose(mine, theirs, rtol=0, atol=2e-6)
            else:
                assert np.abs(mine.astype("int64") - theirs).max() <= most


def random_calls(count: int, *shape: int) -> list[dict[str, np.ndarray]]:
    return [{"x": uniform(*shape, bound=2)} for _ in range(count)]


def lstm(units: int, width: int, coupled: bool, seen: bool) -> list[Any]:
    """Return weights, recurrent weights, peepholes and biases as the operator takes them."""
    weights = [uniform(units, width) for _ in range(4)] + [uniform(units, units) for _ in range(4)]
    peepholes = [uniform(units) if seen else None for _ in range(3)]
    biases = [uniform(units) for _ in range(4)]
    if coupled:
        weights[0] = weights[4] = peepholes[0] = biases[0] = None  # type: ignore[call-overload]
    return [*weights, *peepholes, *biases, None, None]


def constants(file: File, values: Sequence[np.ndarray | None]) -> list[int]:
    return [-1 if value is None else file.constant(value, "float32") for value in values]


LSTMS = {
    "plain": {},
    "clipped": {"cellClip": 0.3},
    "coupled, steps first": {"coupled": True, "timeMajor": True},
    "peepholes": {"seen": True, "cellClip": 0.4},
    "coupled peepholes, relu": {"seen": True, "coupled": True, "fusedActivationFunction": 1},
}


@pytest.mark.parametrize("name", LSTMS)
def test_lstm(name: str, tmp_path: Path) -> None:
    """States stay from call to call: so it is in TensorFlow Lite, too, where nobody resets its variables."""
    fields = {"fusedActivationFunction": 4, "timeMajor": False, "cellClip": 0.0, **LSTMS[name]}
    coupled, seen = (bool(fields.pop(key, False)) for key in ("coupled", "seen"))
    file = File()
    shape = (5, 2, 3) if fields["timeMajor"] else (2, 5, 3)
    x = file.input("x", shape)
    states = [file.variable(state, (2, 4)) for state in ("h", "c")]
    y = file.tensor("y", (*shape[:2], 4))
    given = [x, *constants(file, lstm(4, 3, coupled, seen)), *states]
    options = "UnidirectionalSequenceLSTMOptions"
    file.add("UNIDIRECTIONAL_SEQUENCE_LSTM", given, [y], options, **fields)
    file.output(y)
    check(file.bytes(), random_calls(3, *shape), tmp_path)


@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize("bound", [0.0, 0.3])
def test_lstm_of_both_directions(merged: bool, bound: float, tmp_path: Path) -> None:
    # Of several sequences that do not come steps first, TensorFlow Lite reads other states than it wrote.
    file = File()
    x = file.input("x", (1, 5, 3))
    weights = [*constants(file, lstm(4, 3, False, False)), *constants(file, lstm(4, 3, False, False))]
    states = [file.variable(f"state{n}", (1, 4)) for n in range(4)]
    outputs = [file.tensor("y", (1, 5, 8))] if merged else [file.tensor(f"y{n}", (1, 5, 4)) for n in range(2)]
    options = {"fusedActivationFunction": 4, "mergeOutputs": merged, "cellClip": bound, "timeMajor": False}
    given = [x, *weights, *states, *[-1] * 9]
    file.add("BIDIRECTIONAL_SEQUENCE_LSTM", given, outputs, "BidirectionalSequenceLSTMOptions", **options)
    for number in outputs:
        file.output(number)
    check(file.bytes(), random_calls(2, 1, 5, 3), tmp_path)


@pytest.mark.parametrize("kind", ["RNN", "UNIDIRECTIONAL_SEQUENCE_RNN", "BIDIRECTIONAL_SEQUENCE_RNN"])
def test_rnn(kind: str, tmp_path: Path) -> None:
    file, both = File(), kind.startswith("BI")
    shape = (2, 3) if kind == "RNN" else (2, 5, 3)
    given = [file.input("x", shape)]
    for n in range(2 if both else 1):
        given += constants(file, [uniform(4, 3), uniform(4, 4), uniform(4)])
        given.append(file.variable(f"state{n}", (2, 4)))
    y = file.tensor("y", (*shape[:-1], 8 if both else 4))
    options = {"RNN": "RNNOptions", "BIDIRECTIONAL_SEQUENCE_RNN": "BidirectionalSequenceRNNOptions"}
    merged = {"mergeOutputs": True} if both else {}
    given += [-1] * 3 * both
    file.add(kind, given, [y], options.get(kind, "SequenceRNNOptions"), fusedActivationFunction=1, **merged)
    file.output(y)
    check(file.bytes(), random_calls(3, *shape), tmp_path)


def test_svdf(tmp_path: Path) -> None:
    file = File()
    x = file.input("x", (2, 6))
    given = [x, *constants(file, [uniform(8, 6), uniform(8, 5), uniform(4)]), file.variable("state", (2, 40))]
    y = file.tensor("y", (2, 4))
    file.add("SVDF", given, [y], "SVDFOptions", rank=2, fusedActivationFunction=1)
    file.output(y)
    check(file.bytes(), random_calls(7, 2, 6), tmp_path)


def test_svdf_of_8_bits(tmp_path: Path) -> None:
    file = File()
    x = file.input("x", (2, 6), "int8", scale=0.02, zero=3)
    given = [
        x,
        file.constant(RNG.integers(-127, 128, (8, 6)), "int8", scale=0.01),
        file.constant(RNG.integers(-30000, 30000, (8, 5)), "int16", scale=1e-4),
        file.constant(RNG.integers(-3000, 3000, 4), "int32", scale=1e-4 * 2e-4),
        file.variable("state", (2, 40), "int16", scale=2e-4),
    ]
    y = file.tensor("y", (2, 4), "int8", scale=0.4, zero=-7)
    file.add("SVDF", given, [y], "SVDFOptions", version=3, rank=2, fusedActivationFunction=1)
    file.output(y)
    calls = [{"x": RNG.integers(-128, 128, (2, 6)).astype("int8")} for _ in range(7)]
    check(file.bytes(), calls, tmp_path, most=1)


def stream(dtype: str = "float32", first: Any = 0, **quantization: Any) -> File:
    """Return a network that has the last three rows: what was read last comes after what is kept."""
    file = File()
    file.begin("rows", np.full((1, 2, 3), first, dtype), **quantization)
    handle = file.handle("rows")
    x = file.input("x", (1, 1, 3), dtype, **quantization)
    kept, whole = (file.tensor(name, (1, rows, 3), dtype, **quantization) for name, rows in (("old", 2), ("all", 3)))
    file.add("READ_VARIABLE", [handle], [kept])
    file.add("CONCATENATION", [kept, x], [whole], axis=1)
    rest = file.tensor("rest", (1, 2, 3), dtype, **quantization)
    bounds = [file.constant(bound) for bound in ([0, 1, 0], [1, 3, 3], [1, 1, 1])]
    file.add("STRIDED_SLICE", [whole, *bounds], [rest])
    file.add("ASSIGN_VARIABLE", [handle, rest], [])
    file.output(whole)
    return file


@pytest.mark.parametrize(
    ("dtype", "first", "quantization"),
    [("float32", 0, {}), ("int8", 0, {"scale": 0.1}), ("int8", -5, {"scale": 0.1, "zero": -5})],
    ids=["floats", "codes", "codes with a zero point"],
)
def test_variables(dtype: str, first: int, quantization: dict[str, Any], tmp_path: Path) -> None:
    data = stream(dtype, first, **quantization).bytes()
    calls = [{"x": (uniform(1, 1, 3) * 200).astype(dtype)} for _ in range(5)]
    check(data, calls, tmp_path)


def test_states_of_two_tasks_are_their_own(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.tflite").write_bytes(stream().bytes())
    merged = tvm.transform.Sequential(pipeline.merge_phases())(
        nnfuze_tvm.load([tmp_path / "a.tflite", tmp_path / "b.tflite"])
    )
    assert ir.states(merged) == ["a.rows", "b.rows"]


def test_variables_that_begin_otherwise_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tflite"
    path.write_bytes(stream(first=1).bytes())
    with pytest.raises(ModelError, match=r"node 'old' \(READ_VARIABLE\): variable 'rows' begins with other values"):
        nnfuze_tvm.load([path])


def test_16_bits(tmp_path: Path) -> None:
    """Activations of 16 bits, weights of 8 and biases of 64: right to a step."""
    file = File()
    x = file.input("x", (1, 8, 8, 3), "int16", scale=1e-4)
    weights = RNG.integers(-127, 128, (6, 3, 3, 3))
    scales = RNG.uniform(0.002, 0.01, 6).astype("float32")
    layer = file.constant(weights, "int8", scale=scales)
    bias = file.constant(RNG.integers(-30000, 30000, 6), "int64", scale=scales * np.float32(1e-4))
    y = file.tensor("y", (1, 8, 8, 6), "int16", scale=4e-4)
    file.add("CONV_2D", [x, layer, bias], [y], "Conv2DOptions", 4, strideH=1, strideW=1, fusedActivationFunction=1)
    z = file.input("z", (1, 6), "int16", scale=4e-4)
    dense = file.constant(RNG.integers(-127, 128, (5, 6)), "int8", scale=0.01)
    sums = file.constant(RNG.integers(-30000, 30000, 5), "int64", scale=4e-6)
    out = file.tensor("out", (1, 5), "int16", scale=2e-4)
    file.add("FULLY_CONNECTED", [z, dense, sums], [out], version=4)
    for number in (y, out):
        file.output(number)
    shapes = {"x": (1, 8, 8, 3), "z": (1, 6)}
    calls = [{name: RNG.integers(-(2**15), 2**15, shape).astype("int16") for name, shape in shapes.items()}]
    check(file.bytes(), calls, tmp_path, most=1)


def test_lstm_of_16_bit_states_is_refused(tmp_path: Path) -> None:
    file = File()
    x = file.input("x", (1, 5, 3), "int8", scale=0.1)
    states = [file.variable("h", (1, 4), "int8", scale=0.1), file.variable("c", (1, 4), "int16", scale=2.0**-11)]
    y = file.tensor("y", (1, 5, 4), "int8", scale=0.1)
    given = [x, *constants(file, lstm(4, 3, False, False)), *states]
    file.add("UNIDIRECTIONAL_SEQUENCE_LSTM", given, [y], "UnidirectionalSequenceLSTMOptions")
    file.output(y)
    path = tmp_path / "a.tflite"
    path.write_bytes(file.bytes())
    with pytest.raises(ModelError, match=r"node 'y' \(UNIDIRECTIONAL_SEQUENCE_LSTM\): its data are int8: only floats"):
        nnfuze_tvm.load([path])
