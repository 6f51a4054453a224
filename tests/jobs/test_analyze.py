"""nnfuze analyze: the model's arithmetic, and the command from ONNX files to JSON."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nnfuze_tvm import cli
from nnfuze_tvm.analysis.roofline import Level, Machine
from nnfuze_tvm.devices.remote.tracker import EmbeddedTracker
from nnfuze_tvm.jobs.analyze import Analysis, KernelUse, bounds
from nnfuze_tvm.report.roofline import render_analysis
from tests.tiny_networks import samples, save_pair

MACHINE = Machine(
    fp32=100e9,
    int8=400e9,
    caches=(Level("L1", 32 << 10, 200e9), Level("L2", 512 << 10, 50e9)),
    dram=10e9,
    vector_bytes=32,
    threads=1,
    source="made up",
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return save_pair(tmp_path_factory.mktemp("models"))


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


@pytest.mark.parametrize("quantized", [False, True])
def test_json_of_a_network(
    models: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], quantized: bool
) -> None:
    np.savez(tmp_path / "calibration.npz", x=samples(4))
    options = ["--quantize", "int8", "--calibration", str(tmp_path / "calibration.npz")] if quantized else []
    assert cli.run(["analyze", *models, *options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    kernels = [kernel for kernel in found["kernels"] if kernel["layers"]]
    layers = [layer for kernel in kernels for layer in kernel["layers"]]
    assert layers[0] == "one/conv" and len(layers) == len(set(layers))
    (conv,) = (kernel for kernel in kernels if kernel["convolution"])
    # 36 pixels, 8 channels, 3 × 3 taps of 2 channels.
    assert conv["operations"] == 2 * 36 * 8 * 18
    assert conv["integer"] == quantized
    assert found["seconds"] == pytest.approx(sum(k["seconds"] * k["calls"] for k in found["kernels"]))
    for kernel in found["kernels"]:
        assert kernel["seconds"] > 0 and kernel["bytes"] > 0 and kernel["rule"]
        assert kernel["bound"] in {"compute", "DRAM", *(level["name"] for level in found["machine"]["caches"])}
        assert kernel["bounds"][kernel["bound"]] == max(kernel["bounds"].values())


@pytest.mark.parametrize("quantized", [False, True])
def test_json_of_a_network_for_a_board_that_is_not_at_hand(
    models: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], quantized: bool
) -> None:
    np.savez(tmp_path / "calibration.npz", x=samples(4))
    options = ["--quantize", "int8", "--calibration", str(tmp_path / "calibration.npz")] if quantized else []
    assert cli.run(["analyze", *models, *options, "--target", "rpi4", "--threads", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    machine = found["machine"]
    assert machine["source"] == "catalogue: Raspberry Pi 4, Cortex-A72" and found["catalogue"] is None
    # Per cycle of 1/1.5 ns, each of two threads: 4 or 8 multiply-adds, 16 bytes.
    assert (machine["fp32"], machine["int8"]) == pytest.approx((24e9, 48e9))
    assert machine["caches"][0]["bandwidth"] == pytest.approx(48e9)
    (conv,) = (kernel for kernel in found["kernels"] if kernel["convolution"])
    assert conv["integer"] == quantized
    assert conv["bounds"]["compute"] == pytest.approx(2 * 36 * 8 * 18 / (48e9 if quantized else 24e9))
    assert found["seconds"] is found["of_peak"] is found["of_roofline"] is found["convolutions_of_peak"] is None
    for kernel in found["kernels"]:
        assert kernel["seconds"] is kernel["rate"] is kernel["of_peak"] is kernel["of_roofline"] is None
        assert kernel["least"] == kernel["bounds"][kernel["bound"]] == max(kernel["bounds"].values()) > 0
    assert found["least"] == pytest.approx(sum(k["least"] * k["calls"] for k in found["kernels"]))


def test_table_for_a_board_that_is_not_at_hand(
    models: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "150")
    assert cli.run(["analyze", *models, "--target", "rpi5"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("catalogue: Raspberry Pi 5, Cortex-A76, 1 thread: 38.4 GFLOP/s float32")
    words = set(shown.split())
    assert {"one/conv", "compute", "L1", "L2", "L3", "DRAM", "least", "bound"} <= words
    assert not {"rate", "peak", "roofline", "–"} & words


def test_what_a_board_should_do_stands_beside_what_it_does() -> None:
    expected = replace(MACHINE, source="catalogue: some board")
    assert render_analysis(Analysis((use(2e-5),), MACHINE))[0] == (
        "made up, 1 thread: 100 GFLOP/s float32, 400 GOP/s int8, L1 200 GB/s, L2 50 GB/s, DRAM 10 GB/s"
    )
    shown = render_analysis(Analysis((use(2e-5),), MACHINE, expected))
    assert str(shown[1]).startswith("catalogue: some board, 1 thread: 100 GFLOP/s float32")


def test_table_of_a_network_on_a_board(models: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with EmbeddedTracker(servers=1, key="board") as tracker:
        assert cli.run(["analyze", *models, "--tracker", tracker.address, "--key", "board"]) == 0
    shown = capsys.readouterr().out
    assert "board at 127.0.0.1" in shown
    assert "one/conv" in shown and "convolutions together" in shown


def test_what_cannot_be_analyzed_is_one_line(
    models: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    (bundle / "manifest.json").write_text("{}")
    for arguments, expected in (
        ([str(bundle)], "ONNX files"),
        ([*models, "--target", "aarch64"], "give the --tracker and --key of one, or name a board (rpi3, rpi4,"),
        ([*models, "--target", "rpi4", "--threads", "5"], "4 cores"),
        ([*models, "--tracker", "127.0.0.1:9"], "--key"),
        ([*models, "--work-dir", str(tmp_path)], "no tuning records"),
        ([str(tmp_path / "none.onnx")], "none.onnx"),
    ):
        assert cli.run(["analyze", *arguments]) == 2
        captured = capsys.readouterr()
        errors = [line for line in captured.err.splitlines() if not line.startswith("nnfuze: ")]
        assert len(errors) == 1 and expected in errors[0] and not captured.out
