"""Which of NumPy and compiled kernels runs a float network for its calibration."""

import numpy as np
import pytest
import tvm

from nnfuze_tvm import load
from nnfuze_tvm.deploy import executor
from nnfuze_tvm.graph.evaluate import evaluate
from nnfuze_tvm.passes import pipeline
from tests.graph.calls import calls, examples
from tests.tiny_networks import classifier


@pytest.fixture
def built(monkeypatch):
    """What was compiled, which needs no compiler here."""
    found = []
    monkeypatch.setattr(executor, "host_executor", lambda mod: found.append(mod))
    return found


@pytest.fixture(scope="module")
def network():
    mod = load([classifier()], tasks=["net"])
    return tvm.transform.Sequential(pipeline.merge_phases())(mod)


@pytest.mark.parametrize("inferences", [1, 32])
def test_few_inferences_compile_nothing(network, built, inferences):
    (x,) = network["main"].params
    data = {x.name: np.ones([int(n) for n in x.ty.shape], "float32")}
    run = executor.calibration_executor(network, inferences)
    assert not built
    for got, want in zip(run(data), evaluate(network["main"], data), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("family", "inferences"),
    [
        ("convolution", 100_000),
        ("recurrence", 1),  # steps are loops of Python
    ],
)
def test_what_takes_numpy_long_is_compiled(built, family, inferences):
    mod, _ = calls(examples(family))
    executor.calibration_executor(mod, inferences)
    assert built == [mod]


def test_what_only_kernels_compute_is_compiled(network, built):
    lowered = tvm.relax.transform.LegalizeOps()(network)
    executor.calibration_executor(lowered, 1)
    assert built == [lowered]


@pytest.mark.parametrize("numbers", [100, 1 << 30])
def test_what_needs_much_memory_is_compiled(network, built, monkeypatch, numbers):
    monkeypatch.setattr(executor, "_MOST_NUMBERS", numbers)
    executor.calibration_executor(network, 1)
    assert bool(built) == (numbers == 100)
