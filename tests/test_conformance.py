"""Every operator that the registry declares, in every precision that it declares, on every class of targets.

Its examples are lowered by the whole pipeline; each gets a kernel by a rule that the operator names, and never the
fallback unless it says so. On this machine the kernels give what NumPy gives: in integers the same bits.
"""

from __future__ import annotations

import json
from functools import lru_cache
from itertools import product

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.relax import op

from nnfuze_tvm.analysis import metrics
from nnfuze_tvm.deploy import build
from nnfuze_tvm.devices.targets import resolve
from nnfuze_tvm.graph import ops
from nnfuze_tvm.graph.dataflow import bindings
from nnfuze_tvm.graph.evaluate import evaluate, executor
from nnfuze_tvm.passes import pipeline
from nnfuze_tvm.passes.compress.half_precision import HalfPrecision
from nnfuze_tvm.passes.compress.insert_qdq import InsertQDQ
from nnfuze_tvm.passes.compress.policy import Policy
from nnfuze_tvm.passes.lower.integer.realize_integer import RealizeInteger
from nnfuze_tvm.schedules.schedule_kernels import ScheduleKernels
from tests import bounds
from tests.graph.calls import calls, examples

HOST = resolve("host")
TARGETS = ("x86-64-v3", "x86-64-v4", "aarch64", "aarch64+dotprod", "aarch64+i8mm", "armv7")
FAMILIES = sorted({operator.family for operator in ops.OPERATORS.values() if operator.examples})
LAYERS = sorted({operator.family for operator in ops.OPERATORS.values() if operator.effect == "layer"})
SCALE = np.float32(1 / 64)


def _codes(emitter, value):
    """Emit a tensor in 8 bits and back."""
    scale, zero = relax.const(SCALE), relax.const(np.int8(0))
    codes = emitter.emit(op.quantize(value, scale, zero, axis=0, out_dtype="int8"))
    return emitter.emit(op.dequantize(codes, scale, zero, axis=0, out_dtype="float32"))


def _declared(name: str) -> ops.Operator:
    return ops.OPERATORS[name.removeprefix("task/").rsplit("-", 1)[0]]


def _of(family: str) -> list[ops.Operator]:
    return [operator for operator in ops.OPERATORS.values() if operator.family == family]


# A family's tests follow each other.
@lru_cache(maxsize=3)
def _network(family: str, precision: str):
    """Return the examples of a family in a precision, and their data; None where it declares none."""
    named = examples(family)
    if precision == "float32":
        return calls(named)
    if precision == "float16":
        named = {name: each for name, each in named.items() if _declared(name).half and family in LAYERS}
        if not named:
            return None
        mod, data = calls(named)
        return HalfPrecision(Policy.uniform(bits=16))(mod), data
    if family in LAYERS:
        named = {name: each for name, each in named.items() if _declared(name).quantizes and each.constants}
        if not named:
            return None
        mod, data = calls(named)
        return InsertQDQ(data, Policy.uniform(bits=8))(mod), data
    named = {name: each for name, each in named.items() if _declared(name).integer and not _declared(name).retypes}
    return calls(named, _codes, _codes) if named else None


def _run(lowered: tvm.IRModule, data: dict[str, np.ndarray]) -> list[np.ndarray]:
    machine = relax.VirtualMachine(build.generate(lowered, HOST), tvm.cpu())
    given = (tvm.runtime.tensor(data[param.name]) for param in lowered["main"].params)
    return [output.numpy() for output in machine["main"](*given)]


def _lowered(mod: tvm.IRModule, target: tvm.target.Target) -> tvm.IRModule:
    """Return a lowered module whose kernels, before any are in bands, have rules that their operators name."""
    with target:
        passes = [ScheduleKernels(target), *build.packing_passes()]
        scheduled = tvm.transform.Sequential(passes)(build.fuse(mod, target))
        _check_rules(mod, scheduled)
        lowered = tvm.transform.Sequential(build.band_passes(target))(scheduled)
    assert not bounds.outside_of(lowered, target)
    return lowered


def _check_rules(mod: tvm.IRModule, lowered: tvm.IRModule) -> None:
    """Check that every call is computed by a kernel of a rule that its operator names, and by no fallback."""
    found: dict[str, set[str]] = {}
    for kernel in metrics.kernels(lowered):
        for name in kernel.layers:
            found.setdefault(name, set()).add(kernel.rule)
    named = [b.var.name for b in bindings(mod["main"]) if "/" in b.var.name]
    assert named
    for name in named:
        declared, rules = _declared(name), found.get(name, set())
        # What only renames a buffer is no kernel; what brings data into another layout is one more.
        assert rules & set(declared.kernels) or (not rules and declared.effect != "layer"), f"{name}: {rules}"
        assert "fallback" not in rules - set(declared.kernels), f"{name}: {rules}"


def test_what_has_kernels_has_examples():
    without = {name for name, operator in ops.OPERATORS.items() if operator.kernels and not operator.examples}
    assert without == {"quantize", "dequantize"}  # which are around all others in 8 bits


@pytest.mark.parametrize("precision", ["float32", "int8", "float16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_equal_their_reference(family, precision):
    network = _network(family, precision)
    if network is None:
        pytest.skip("declares none")
    mod, data = network
    lowered = _lowered(mod, HOST)
    got = _run(lowered, data)
    if precision == "int8":
        integer = tvm.transform.Sequential([pipeline.layout_phase(), RealizeInteger()])(mod)
        assert not integer.attrs["nnfuze.float_layers"]
        want = executor(integer)(data)
    else:
        want = evaluate(mod["main"], data)
    # What has states of its own makes floats of its integers.
    exact = precision == "int8" and not any(operator.recurs for operator in _of(family))
    for mine, theirs in zip(got, want, strict=True):
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape
        if exact or mine.dtype.kind != "f":
            np.testing.assert_array_equal(mine, theirs)
        else:
            span = max(np.ptp(theirs), np.abs(theirs).max(), 1e-30)
            assert np.abs(mine - theirs).max() <= {"float16": 1e-2}.get(precision, 1e-5) * span


# Dot products change nothing of floats, and float16 comes with the second class of each architecture.
ALIKE = {
    "float32": ("aarch64+dotprod", "aarch64+i8mm"),
    "int8": (),
    "float16": ("x86-64-v3", "aarch64", "aarch64+i8mm", "armv7"),
}
# What has no weights knows of a class the length of its vectors and how it rounds; a transposed convolution is computed
# by kernels of convolutions.
ONE_EACH = ("x86-64-v4", "aarch64")
EVERY_CLASS = [family for family in LAYERS if family != "transposed_convolution"]


def _cases():
    for family, precision, target in product(FAMILIES, ALIKE, TARGETS):
        alike = target in ALIKE[precision] if family in EVERY_CLASS else target not in ONE_EACH
        yield pytest.param(family, precision, target, marks=pytest.mark.slow if alike else ())


@pytest.mark.parametrize(("family", "precision", "target"), list(_cases()))
def test_kernels_are_built_for_every_class_of_targets(family, precision, target):
    network = _network(family, precision)
    if network is None:
        pytest.skip("declares none")
    cpu = resolve(target)
    lowered = _lowered(network[0], cpu)
    if family in LAYERS:
        # LLVM checks what it is given; what it would then make of it takes most of the time and finds nothing.
        build.generate(lowered, tvm.target.Target({**json.loads(str(cpu)), "opt-level": 0}))
