from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tvm import relax

from nnfuze_tvm.devices.targets import resolve
from tests.helpers import evaluate_module, few
from tests.schedules import kernels


def _layer_norm(x):
    width = int(x.ty.shape[-1])
    gamma = relax.const(np.linspace(0.5, 1.5, width, dtype="float32"))
    beta = relax.const(np.linspace(-1, 1, width, dtype="float32"))
    return relax.op.nn.layer_norm(x, gamma, beta, [-1])


OPERATORS = {
    "softmax": lambda x: relax.op.nn.softmax(x, -1),
    "log_softmax": lambda x: relax.op.nn.log_softmax(x, -1),
    "layer_norm": _layer_norm,
    "sum": lambda x: relax.op.sum(x, -1),
    "mean": lambda x: relax.op.mean(x, -1, True),
    "max": lambda x: relax.op.max(x, -1),
    "argmax": lambda x: relax.op.argmax(x, -1),
    "variance": lambda x: relax.op.variance(x, -1),
    "last_two": lambda x: relax.op.sum(x, [-2, -1]),
    "apart": lambda x: relax.op.mean(x, [0, -1]),
    "apart_kept": lambda x: relax.op.min(x, [0, -1], True),
    "squares_of_all": lambda x: relax.op.sum(relax.op.multiply(x, x)),
    "max_of_all": relax.op.max,
    "mean_of_all": lambda x: relax.op.mean(x, None, True),
}


def check(name, shape, tunable=False, seed=1, scale=1.0):
    mod = kernels.single_function(
        {"x": (shape, "float32")}, lambda builder, variables: builder.emit(OPERATORS[name](variables[0]))
    )
    x = (np.random.default_rng(0).standard_normal(shape) * scale).astype("float32")
    target = resolve("host")
    got = kernels.schedule_and_run(mod, target, {"x": x}, tunable=tunable, seed=seed)
    assert set(got.rules.values()) == {"reduction"}
    (reference,) = evaluate_module(mod, {"x": x})
    if reference.dtype.kind == "f":
        # A row is summed in another order than the reference sums it.
        np.testing.assert_allclose(got.outputs[0], reference, rtol=1e-5, atol=2e-6 * scale)
    else:
        np.testing.assert_array_equal(got.outputs[0], reference)


@few(10)
@given(
    name=st.sampled_from(sorted(OPERATORS)),
    rows=st.sampled_from([(1,), (5,), (1, 3), (2, 3, 5)]),
    width=st.sampled_from([1, 3, 7, 10, 12, 48, 64, 97, 128]),
)
def test_any_row(name, rows, width):
    check(name, (*rows, width))


@pytest.mark.parametrize("shape", [(5, 8, 37, 1), (5, 8, 1, 37), (8, 97, 1), (3, 1, 13)])
def test_rows_of_which_axes_have_one_place(shape):
    check("last_two", shape)


@pytest.mark.parametrize("name", ["softmax", "layer_norm"])
def test_many_rows_run_in_parallel(name):
    check(name, (1024, 128))


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("name", ["softmax", "layer_norm", "max"])
def test_every_sampled_schedule_is_correct(name, seed):
    check(name, (3, 128), tunable=True, seed=seed)


def test_softmax_of_large_values_is_finite():
    check("softmax", (2, 64), scale=100.0)
