"""nnfuze analyze: the command from ONNX files to JSON."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from nnfuze_tvm import cli
from tests.servers import embedded
from tests.tiny_networks import samples, save_pair


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return save_pair(tmp_path_factory.mktemp("models"))


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


def test_what_winograd_multiplies_is_its_bound(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tiles of 4×4: 36 multiply-adds in place of 144, and never more than the peak."""
    weights = numpy_helper.from_array(np.random.default_rng(0).normal(size=(32, 32, 3, 3)).astype("float32"), "w")
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 32, 24, 24]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Conv", ["x", "w"], ["y"], pads=[1] * 4)], "c", [x], [y], [weights])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), tmp_path / "c.onnx")
    assert cli.run(["analyze", str(tmp_path / "c.onnx"), "--target", "rpi4", "--json"]) == 0
    (conv,) = (kernel for kernel in json.loads(capsys.readouterr().out)["kernels"] if kernel["convolution"])
    assert conv["rule"] == "winograd" and conv["operations"] == 2 * 24 * 24 * 32 * 32 * 9
    assert conv["bounds"]["compute"] == pytest.approx(conv["operations"] / 4 / 12e9)


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


def test_table_of_a_network_on_a_board(models: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with embedded(servers=1, key="board") as tracker:
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
