from __future__ import annotations

import math
import re

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax

from nnfuze_tvm.devices.targets import resolve
from tests.schedules import kernels

FUNCTIONS = {
    "exp": (relax.op.exp, np.exp, 0.0, 2.5e-7),
    "log": (lambda x: relax.op.log(relax.op.abs(x)), lambda x: np.log(np.abs(x)), 1e-9, 2.5e-7),
    "erf": (relax.op.erf, np.vectorize(math.erf), 7e-7, 1e-6),
    "tanh": (relax.op.tanh, np.tanh, 2.5e-7, 0.0),
    "sigmoid": (relax.op.sigmoid, lambda x: 1 / (1 + np.exp(-x)), 1e-37, 5e-7),
}


def module(name, length):
    operator = FUNCTIONS[name][0]
    return kernels.single_function(
        {"x": ((length,), "float32")}, lambda builder, variables: builder.emit(operator(variables[0]))
    )


def evaluate(name, x):
    return kernels.schedule_and_run(module(name, len(x)), resolve("host"), {"x": x}).outputs[0]


@settings(max_examples=20, deadline=None)
@given(
    name=st.sampled_from(sorted(FUNCTIONS)),
    length=st.sampled_from([1, 7, 64, 1003]),
    reach=st.sampled_from([0.1, 3.0, 20.0, 87.0]),
    seed=st.integers(0, 1000),
)
def test_close_to_the_function_in_double_precision(name, length, reach, seed):
    _, reference, atol, rtol = FUNCTIONS[name]
    x = np.random.default_rng(seed).uniform(-reach, reach, length).astype("float32")
    np.testing.assert_allclose(evaluate(name, x), reference(x.astype("float64")), rtol=rtol, atol=atol)


@pytest.mark.parametrize(
    ("name", "limits"),
    [("exp", [np.inf, 0.0]), ("erf", [1.0, -1.0]), ("tanh", [1.0, -1.0]), ("sigmoid", [1.0, 0.0])],
)
def test_beyond_all_bounds(name, limits):
    infinite = evaluate(name, np.array([np.inf, -np.inf] * 8, "float32"))
    np.testing.assert_allclose(infinite, limits * 8, atol=1e-6)
    large = evaluate(name, np.array([1e30, -1e30] * 8, "float32"))
    np.testing.assert_array_equal(large, infinite)
    assert np.isnan(evaluate(name, np.full(16, np.nan, "float32"))).all()


def test_logarithms():
    x = np.concatenate([np.geomspace(1e-45, 3e38, 977), 1 + np.linspace(-0.3, 0.4, 1001)]).astype("float32")
    np.testing.assert_allclose(evaluate("log", x), np.log(x.astype("float64")), rtol=2.5e-7, atol=1e-9)


def test_logarithms_of_what_has_none():
    x = np.array([0, -0.0, -1, -np.inf, np.inf, np.nan, 1, -1e-40] * 2, "float32")
    mod = kernels.single_function(
        {"x": ((16,), "float32")}, lambda builder, variables: builder.emit(relax.op.log(variables[0]))
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        want = np.log(x)
    np.testing.assert_allclose(kernels.schedule_and_run(mod, resolve("host"), {"x": x}).outputs[0], want, rtol=2.5e-7)


def test_large_exponentials_are_finite_up_to_the_largest_float():
    x = np.array([88.0, 88.7, 88.72, -87.0, -87.3], "float32")
    np.testing.assert_allclose(evaluate("exp", x), np.exp(x.astype("float64")), rtol=1e-6)


@pytest.mark.parametrize(
    ("target", "register"), [("x86-64-v3", r"%ymm"), ("x86-64-v4", r"%[yz]mm"), ("aarch64", r"\.4s")]
)
@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_whole_vectors_and_no_call_of_the_c_library(name, target, register):
    cpu = resolve(target)
    scheduled, _ = kernels.schedule(module(name, 1024), cpu)
    (kernel,) = (f for f in scheduled.functions.values() if isinstance(f, tvm.tirx.PrimFunc))
    alone = tvm.IRModule({"main": kernel.with_attr("global_symbol", "main")})
    assembly = tvm.compile(alone, target=cpu).mod.inspect_source("asm")
    assert not re.search(rf"\b({name}|exp)f\b", assembly)
    arithmetic = re.findall(r"^\s+v?f?m(?:ul|add|la).*$", assembly, re.MULTILINE)
    arithmetic = [line for line in arithmetic if re.search(register, line)]
    assert len(arithmetic) >= 5
    # Lanes that were taken apart and put together again by LLVM would have to change places.
    assert not re.search(r"^\s+(vunpck|vshufps|vinsert|zip1|ins\b)", assembly, re.MULTILINE)


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_double_precision_stays_what_it_was(name):
    operator, reference, *_ = FUNCTIONS[name]
    mod = kernels.single_function(
        {"x": ((64,), "float64")}, lambda builder, variables: builder.emit(operator(variables[0]))
    )
    x = np.linspace(-3, 3, 64)
    got = kernels.schedule_and_run(mod, resolve("host"), {"x": x}).outputs[0]
    np.testing.assert_allclose(got, reference(x), rtol=1e-12, atol=1e-14)
