"""What NaN, infinities and huge numbers become in 8 bits: on every CPU the same; see also `tests/arm`."""

from __future__ import annotations

import platform

import numpy as np
import pytest
import tvm
from tvm import relax

from nnfuze_tvm.deploy import build
from nnfuze_tvm.deploy.bundle import unfit
from nnfuze_tvm.deploy.manifest import describe_target
from nnfuze_tvm.devices.targets import resolve
from tests import special_numbers
from tests.helpers import evaluate_module

KINDS = [("int8", 0), ("int8", 5), ("uint8", 0), ("uint8", 128)]


@pytest.mark.parametrize(("dtype", "zero_point"), KINDS)
def test_in_numpy(dtype: str, zero_point: int) -> None:
    with np.errstate(all="raise", under="ignore"):
        got = evaluate_module(special_numbers.layer(dtype, zero_point), {"x": special_numbers.data()})
    for found, right in zip(got, special_numbers.expected(dtype, zero_point), strict=True):
        np.testing.assert_array_equal(found, right)


@pytest.mark.parametrize(
    ("target", "dtype", "zero_point"),
    [("host", "int8", 0), ("host", "uint8", 128), ('{"kind": "llvm", "mcpu": "x86-64"}', "int8", 5)],
)
def test_in_kernels(target: str, dtype: str, zero_point: int) -> None:
    if not platform.machine().startswith("x86") and target != "host":
        pytest.skip("another processor's")
    cpu = resolve(target)
    if unfit(describe_target(cpu)):
        pytest.skip("another CPU's")
    machine = relax.VirtualMachine(build.build(special_numbers.layer(dtype, zero_point), cpu), tvm.cpu())
    got = machine["main"](tvm.runtime.tensor(special_numbers.data()))
    for found, right in zip(got, special_numbers.expected(dtype, zero_point), strict=True):
        np.testing.assert_array_equal(found.numpy(), right)
