"""Kernels against the machine: what bounds them, and what that comes to for a network."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nnfuze_tvm.analysis.kernels import Analysis, KernelUse, bounds
from nnfuze_tvm.analysis.roofline import Level, Machine
from nnfuze_tvm.report.roofline import render_analysis

MACHINE = Machine(
    fp32=100e9,
    int8=400e9,
    caches=(Level("L1", 32 << 10, 200e9), Level("L2", 512 << 10, 50e9)),
    dram=10e9,
    vector_bytes=32,
    threads=1,
    source="made up",
)


def use(
    seconds: float, *, integer: bool = False, convolution: bool = True, calls: int = 1, **delivered: int
) -> KernelUse:
    return KernelUse(
        name="kernel",
        layers=("t/layer",),
        rule="conv2d",
        calls=calls,
        convolution=convolution,
        integer=integer,
        operations=1e6,
        bytes=50_000,
        seconds=seconds,
        bounds=bounds(MACHINE, 1e6, integer, {"L1": 0, "L2": 0, "DRAM": 0, **delivered}),
    )


def test_the_slowest_limit_names_the_kernel() -> None:
    assert use(2e-5).bounds == pytest.approx({"compute": 1e-5, "L1": 0.0, "L2": 0.0, "DRAM": 0.0})
    assert use(2e-5).bound == "compute"
    assert use(2e-5, L1=1_000_000).bound == "compute"
    assert use(2e-5, L1=3_000_000).bound == "L1"
    assert use(2e-5, L1=3_000_000, L2=1_000_000).bound == "L2"
    assert use(2e-5, L1=3_000_000, L2=1_000_000, DRAM=250_000).bound == "DRAM"
    assert use(2e-5, integer=True, L1=1_000_000).bound == "L1"


def test_shares_of_the_peak_and_of_the_roofline() -> None:
    kernel = use(2e-5, L1=3_000_000)
    assert kernel.of_peak == pytest.approx(0.5)
    assert kernel.of_roofline == pytest.approx(0.75)
    assert kernel.rate == pytest.approx(50e9)
    assert kernel.intensity == pytest.approx(20.0)


def test_a_network_is_the_sum_of_all_calls() -> None:
    analysis = Analysis((use(2e-5, calls=3), use(4e-5, integer=True, convolution=False)), MACHINE)
    assert analysis.seconds == pytest.approx(1e-4)
    assert analysis.operations == pytest.approx(4e6)
    assert analysis.of_peak == pytest.approx((3 * 1e-5 + 0.25e-5) / 1e-4)
    assert analysis.convolutions == pytest.approx(0.5)
    assert Analysis((use(1e-5, convolution=False),), MACHINE).convolutions is None


def test_what_a_board_should_do_stands_beside_what_it_does() -> None:
    expected = replace(MACHINE, source="catalogue: some board")
    assert render_analysis(Analysis((use(2e-5),), MACHINE))[0] == (
        "made up, 1 thread: 100 GFLOP/s float32, 400 GOP/s int8, L1 200 GB/s, L2 50 GB/s, DRAM 10 GB/s"
    )
    shown = render_analysis(Analysis((use(2e-5),), MACHINE, expected))
    assert str(shown[1]).startswith("catalogue: some board, 1 thread: 100 GFLOP/s float32")
