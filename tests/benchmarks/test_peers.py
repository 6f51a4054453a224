import json

import numpy as np
import pytest
from rich.console import Console

from benchmarks import peers
from benchmarks.engines import base, mnn
from benchmarks.engines.base import relative_error
from benchmarks.engines.onnxruntime import reference
from benchmarks.interleaved import Timing
from benchmarks.peers import Result
from benchmarks.workloads import workload


def result(network: str, engine: str, seconds: float | None, **fields) -> Result:
    timing = Timing(seconds, seconds, (seconds, seconds), 30) if seconds else None
    return Result(network, fields.pop("precision", "fp32"), engine, timing, **fields)


RESULTS = [
    result("a", "nnfuze", 1e-3),
    result("a", "nnfuze tuned", 0.5e-3),
    result("a", "onnxruntime", 4e-3),
    result("a", "openvino", 2e-3),
    result("b", "nnfuze", 8e-3),
    result("b", "nnfuze tuned", 4e-3),
    result("b", "onnxruntime", 4e-3),
    result("b", "openvino", None, reason="does not convert"),
]


def test_ratios_are_to_the_fastest_peer_of_each_network():
    ratio = peers.ratios(RESULTS, "nnfuze")
    assert ratio.values == pytest.approx({"a": 2.0, "b": 0.5})
    assert ratio.peers == {"a": "openvino", "b": "onnxruntime"}
    assert ratio.geometric_mean == pytest.approx(1.0)
    assert ratio.least == 0.5
    assert peers.ratios(RESULTS, "nnfuze tuned").geometric_mean == pytest.approx(2.0)


def test_a_network_without_peers_has_no_ratio():
    alone = [result("a", "nnfuze", 1e-3), result("a", "ncnn", None, reason="does not convert")]
    assert peers.ratios(alone, "nnfuze").values == {}
    assert peers.as_json(alone)["ratios"] == {}


def test_the_table_shows_latencies_ratios_and_what_is_missing():
    console = Console(width=160)
    with console.capture() as captured:
        console.print(peers.render("fp32", RESULTS))
    lines = captured.get().splitlines()
    row = next(line for line in lines if line.startswith("│ b"))
    assert [cell.strip() for cell in row.strip("│").split("│")] == ["b", "8 ms", "4 ms", "4 ms", "–", "0.50×", "1.00×"]
    mean, least = (next(line for line in lines if word in line) for word in ("geometric mean", "least"))
    assert "1.00×" in mean and "2.00×" in mean
    assert "0.50×" in least and "1.00×" in least
    assert peers.footnotes(RESULTS) == ["openvino, fp32: does not convert (b)"]


def test_several_networks_at_once_have_means_of_their_own():
    found = peers.groups([*RESULTS, result("a+a", "nnfuze", 1e-3), result("a+a", "onnxruntime", 3e-3)])
    assert list(found) == ["fp32", "fp32, several networks at once"]
    assert found["fp32"] == RESULTS
    ratio = peers.as_json([r for shown in found.values() for r in shown])["ratios"]
    assert ratio["fp32"]["nnfuze"]["geometric_mean"] == pytest.approx(1.0)
    assert ratio["fp32, several networks at once"]["nnfuze"]["geometric_mean"] == pytest.approx(3.0)


def test_int8_latencies_carry_their_error():
    console = Console(width=160)
    with console.capture() as captured:
        console.print(peers.render("int8", [result("a", "nnfuze", 1e-3, precision="int8", error=0.034)]))
    assert "1 ms ±3.4%" in captured.get()


def test_errors_are_relative_to_the_range_of_each_output():
    exact = [np.array([[0.0, 10.0]]), np.array([[-1.0, 1.0]])]
    assert relative_error(exact, exact) == 0
    assert relative_error([exact[0] + [[0, 1]], exact[1]], exact) == pytest.approx(0.1)
    assert relative_error([exact[0], exact[1] - 0.5], exact) == pytest.approx(0.25)
    assert relative_error([exact[0].reshape(2), exact[1]], exact) == 0
    assert relative_error([exact[0][:, :1], exact[1]], exact) == np.inf
    assert relative_error([exact[0] * np.nan, exact[1]], exact) == np.inf


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--peers", "onnxruntime,tensorflow"], "'tensorflow'"),
        (["--precision", "int4"], "'int4'"),
        (["--peers", "tvm-ms"], "give --trials"),
        (["--trials", "-1"], "'-1'"),
        (["--threads", "0"], "'0'"),
        (["--rounds", "many"], "'many'"),
        (["--networks", ""], "empty name"),
        (["--plot", "figure.docx"], "use a file name that ends in .png"),
        (["--networks", "resnet9"], "resnet9: no such network or file"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_code_2(arguments, message, capsys, tmp_path):
    try:
        code = peers.main([*arguments, "--work-dir", str(tmp_path / "work")])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "error" in last and message in last
    assert not (tmp_path / "work").exists()


def test_the_figure_holds_every_network_and_engine(tmp_path):
    pytest.importorskip("matplotlib").rcParams["svg.fonttype"] = "none"
    file = tmp_path / "figure.svg"
    peers.draw(file, [*RESULTS, result("a", "ncnn", 3e-3, precision="int8")], "a machine")
    drawn = file.read_text()
    for expected in ("a machine", "fp32", "int8", "onnxruntime", "openvino", "ncnn", ">a<", ">b<"):
        assert expected in drawn


def test_mnn_answers_in_both_precisions(tmp_path):
    pytest.importorskip("MNN")
    work = workload("ds_cnn", tmp_path)
    exact = reference(work)
    assert relative_error(mnn.make(work, "fp32", 1).answers(work.evaluation), exact) < 1e-4
    assert 1e-4 < relative_error(mnn.make(work, "int8", 1).answers(work.evaluation), exact) < 0.5


def test_a_peer_that_is_missing_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setattr(base, "find_spec", lambda package: None)
    with pytest.raises(base.Unavailable, match="peers"):
        mnn.make(workload("ds_cnn", tmp_path), "fp32", 1)


def test_a_pair_beside_onnx_runtime(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    file = tmp_path / "figures.json"
    arguments = ["--networks", "mlp_autoencoder+mlp_autoencoder", "--peers", "onnxruntime", "--rounds", "2"]
    arguments += ["--work-dir", str(tmp_path / "work"), "--json", str(file)]
    found = {}
    for more in (["--precision", "int8"], ["--precision", "fp32", "--trials", "2"]):
        assert peers.main([*arguments, *more]) == 0
        printed = capsys.readouterr().out
        assert "mlp_autoencoder+mlp_autoencoder" in printed and "geometric mean" in printed
        document = json.loads(file.read_text())
        found.update({(r["precision"], r["engine"]): r for r in document["results"]})
    assert {engine for precision, engine in found if precision == "int8"} == {"nnfuze", "onnxruntime"}
    assert {engine for precision, engine in found if precision == "fp32"} == {"nnfuze", "nnfuze tuned", "onnxruntime"}
    assert all(r["timing"]["median"] > 0 and r["reason"] is None for r in found.values())
    assert found["fp32", "nnfuze"]["error"] < 1e-4
    assert found["fp32", "onnxruntime"]["error"] < 1e-6
    assert 1e-4 < found["int8", "nnfuze"]["error"] < 0.3
    assert 1e-4 < found["int8", "onnxruntime"]["error"] < 0.3
    assert found["int8", "onnxruntime"]["details"]["chosen"] in found["int8", "onnxruntime"]["details"]["seconds"]
    ratio = document["ratios"]["fp32, several networks at once"]["nnfuze"]
    expected = found["fp32", "onnxruntime"]["timing"]["median"] / found["fp32", "nnfuze"]["timing"]["median"]
    assert ratio["networks"] == {"mlp_autoencoder+mlp_autoencoder": pytest.approx(expected)}
    assert document["machine"]["threads"] == 1 and "onnxruntime" in document["machine"]["versions"]
