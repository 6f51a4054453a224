"""The command line from ONNX files to answers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from nnfuze_tvm import cli
from nnfuze_tvm.cli import verbs
from nnfuze_tvm.cli.console import print_arrays
from nnfuze_tvm.deploy.bundle import Bundle, unfit
from nnfuze_tvm.deploy.manifest import describe_target
from nnfuze_tvm.devices.targets import resolve
from nnfuze_tvm.passes import pipeline
from nnfuze_tvm.passes.compress import method, method_settings
from nnfuze_tvm.report import Report
from tests.servers import embedded
from tests.tiny_networks import classifier, samples, save_pair


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return save_pair(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def compiled(models: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compile the pair, pruned and in int8, with labels for one of the tasks."""
    directory = tmp_path_factory.mktemp("compiled")
    np.savez(directory / "calibration.npz", x=samples(8))
    np.savez(directory / "evaluation.npz", x=samples(12, seed=5), one=np.array([0, 1, 2, -1] * 3))
    command = ["compile", *models, "--quantize", "int8", "--prune", "0.75"]
    data = ["--calibration", directory / "calibration.npz", "--evaluation", directory / "evaluation.npz"]
    assert cli.run([*command, *map(str, data), "-o", str(directory / "out")]) == 0
    return directory / "out"


@pytest.fixture
def sample(tmp_path: Path) -> str:
    np.save(tmp_path / "x.npy", samples(1))
    return f"x={tmp_path / 'x.npy'}"


def shown_without_tvm(arguments: list[str], cache: Path) -> tuple[str, bool]:
    """What a fresh process prints, and whether it did without TVM."""
    script = f"import sys, nnfuze_tvm.cli as c; c.run({arguments}); print('tvm' in sys.modules)"
    env = {**os.environ, "XDG_CACHE_HOME": str(cache), "COLUMNS": "120"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=env)
    return done.stdout + done.stderr, done.stdout.strip().endswith("False")


@pytest.mark.parametrize("arguments", [["-h"], ["run", "-h"], ["deploy", "-h"], ["devices", "-h"], ["run", "--wobble"]])
def test_help_is_quick(arguments: list[str], tmp_path: Path) -> None:
    shown, quick = shown_without_tvm(arguments, tmp_path)
    assert "nnfuze" in shown and quick


def test_the_version_is_shown_without_tvm(tmp_path: Path) -> None:
    text, quick = shown_without_tvm(["--version"], tmp_path)
    assert text.startswith("nnfuze 0.") and "TVM 0.27" in text and quick


@pytest.fixture(scope="module")
def helped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A cache after one help, and what that was."""
    cache = tmp_path_factory.mktemp("cache")
    return cache, shown_without_tvm(["compile", "-h"], cache)[0]


def test_help_has_examples_and_the_methods_options(helped: tuple[Path, str], tmp_path: Path) -> None:
    cache, first = helped
    shutil.copytree(cache, tmp_path, dirs_exist_ok=True)
    again, quick = shown_without_tvm(["compile", "-h"], tmp_path)
    assert quick and again.splitlines()[:-1] == first.splitlines()[:-1]
    assert "nnfuze compile keyword.onnx" in again
    assert all(f"--{name.replace('_', '-')} " in again for name in method_settings.options(pipeline.METHODS))
    (kept,) = (tmp_path / "nnfuze" / "options").iterdir()
    kept.write_text('[{"name": "damaged"}]')
    assert shown_without_tvm(["compile", "-h"], tmp_path) == (first, False)
    assert shown_without_tvm(["compile", "-h"], Path("/proc")) == (first, False)


def test_what_is_wrong_with_files_and_shapes_is_said_quickly(models: list[str], helped: tuple[Path, str]) -> None:
    cache, _ = helped
    nowhere, quick = shown_without_tvm(["compile", "nowhere.onnx", "-o", "x"], cache)
    assert "nowhere.onnx: no such file" in nowhere and quick
    shape, quick = shown_without_tvm(["compile", *models, "--shape", "x=1,2,3", "-o", "x"], cache)
    assert "input 'x' is 1x2x6x6, of 4 dimensions; 1x2x3 has 3" in shape and quick


def test_a_method_brings_its_options(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    option = method.Option("sharpness", int, None, "How sharp.")
    sharpen = method.Method("sharp", "sharpening", lambda _: [], wants=lambda _: False, options=(option,))
    monkeypatch.setattr(pipeline, "METHODS", (*pipeline.METHODS, sharpen))
    monkeypatch.setenv("COLUMNS", "120")
    assert cli.run(["tune", "-h"]) == 0
    assert "--sharpness" in capsys.readouterr().out
    assert cli.run(["tune", "a.onnx", "--sharpness", "high"]) == 2
    assert "--sharpness" in capsys.readouterr().err


def test_a_new_verb_is_one_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "greet.py").write_text(
        "from nnfuze_tvm.cli.options import AsJson, Models\n"
        "def command(models: Models, *, as_json: AsJson = False) -> None:\n"
        '    """Greet networks."""\n'
        "    print('hello', *models)\n"
    )
    monkeypatch.setattr(verbs, "__path__", [*verbs.__path__, str(tmp_path)])
    monkeypatch.setitem(sys.modules, "nnfuze_tvm.cli.verbs.greet", None)
    del sys.modules["nnfuze_tvm.cli.verbs.greet"]
    assert list(cli.find_verbs()) == [
        "compile", "tune", "analyze", "merge", "export", "policy", "run", "deploy", "bench", "inspect", "devices",
        "ops", "bundle", "greet",
    ]  # fmt: skip
    assert cli.run(["-h"]) == 0
    assert "Greet networks." in capsys.readouterr().out
    assert cli.run(["greet", "a.onnx", "b.onnx"]) == 0
    assert capsys.readouterr().out == "hello a.onnx b.onnx\n"
    assert cli.run(["greet"]) == 2
    assert "models" in capsys.readouterr().err.lower()


def test_compile_reports_every_stage(compiled: Path) -> None:
    assert sorted(p.name for p in compiled.iterdir()) == [
        "lib.so",
        "manifest.json",
        "report.html",
        "report.json",
        "weights.bin",
    ]
    report = Report.model_validate_json((compiled / "report.json").read_text())
    assert [s.name for s in report.own] == ["separate", "merged", "pruned", "int8"]
    separate, merged, pruned, int8 = report.own
    assert separate.macs == 2 * (36 * 8 * 18 + 24)
    assert merged.macs == 36 * 8 * 18 + 2 * 24
    assert pruned.macs == 36 * 6 * 18 + 2 * 18
    assert int8.parameter_bytes is not None
    assert pruned.parameter_bytes is not None
    assert int8.parameter_bytes < pruned.parameter_bytes
    for stage in report.stages:
        assert stage.latency is not None
        assert stage.latency > 0
        assert stage.tasks["one"].labelled == 9
        assert stage.tasks["two"].accuracy is None
    assert merged.tasks["two"].agreement == 1.0
    assert merged.tasks["two"].error is not None
    assert merged.tasks["two"].error < 1e-5
    assert int8.tasks["two"].agreement is not None
    assert {kernel.name for kernel in report.kernels}
    shared = [layer for layer in report.layers if len(layer.tasks) == 2]
    assert [layer.name for layer in shared] == ["one/conv"]
    assert report.float_layers == []
    assert report.final.bytes == sum((compiled / name).stat().st_size for name in ("lib.so", "weights.bin"))
    assert report.final.weight_memory is not None
    assert report.final.weight_memory <= 1.02 * (compiled / "weights.bin").stat().st_size


def test_onnx_runtime_is_shown_beside(compiled: Path) -> None:
    pytest.importorskip("onnxruntime")
    report = Report.model_validate_json((compiled / "report.json").read_text())
    assert report.stages[0].reference
    assert report.stages[0].name == "ONNX Runtime, separate"
    assert report.own[0].tasks["one"].accuracy == report.stages[0].tasks["one"].accuracy


def test_json_is_all_there_is_on_stdout(models: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    arguments = ["compile", f"a={models[0]}", "-o", str(out), "--no-compare", "--json"]
    assert cli.run(arguments) == 0
    report = Report.model_validate_json(capsys.readouterr().out)
    assert report.tasks == ["a"]
    assert [stage.name for stage in report.stages] == ["merged"]
    assert cli.run([*arguments, "--force"]) == 0


def test_run(compiled: Path, sample: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = Bundle.load(compiled).run({"x": samples(1)})
    assert cli.run(["run", str(compiled), "--input", sample, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    np.testing.assert_array_equal(np.float32(printed["one"]), expected["one"])
    assert cli.run(["run", str(compiled), "--input", sample, "-o", str(tmp_path / "answers")]) == 0
    np.testing.assert_array_equal(np.load(tmp_path / "answers" / "two.npy"), expected["two"])
    capsys.readouterr()
    assert cli.run(["run", str(compiled), "--input", sample]) == 0
    assert f"at {int(np.argmax(expected['one']))}" in capsys.readouterr().out
    np.savez(tmp_path / "inputs.npz", x=samples(3))
    assert cli.run(["run", str(compiled), "--input", str(tmp_path / "inputs.npz"), "--json"]) == 0
    assert np.shape(json.loads(capsys.readouterr().out)["one"]) == (3, *expected["one"].shape)


def test_bench(compiled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["bench", str(compiled), "--repeats", "20", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["repeats"] == 20
    assert 0 < result["latency"] <= result["latency_p95"]
    assert {"name", "calls", "seconds", "tasks", "layers"} == set(result["kernels"][0])
    assert "one/conv" in {layer for kernel in result["kernels"] for layer in kernel["layers"]}
    assert cli.run(["bench", str(compiled), "--repeats", "20", "--threads", "2"]) == 0
    assert "on disk" in capsys.readouterr().out


def test_inspect(compiled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["inspect", str(compiled), "--json"]) == 0
    fields = json.loads(capsys.readouterr().out)
    assert fields["tasks"] == ["one", "two"]
    assert fields["quantization"]["integer_layers"] == 3
    assert fields["metrics"]["tasks"]["one"]["labelled"] == 9
    assert cli.run(["inspect", str(compiled), "--kernels"]) == 0
    shown = capsys.readouterr().out
    assert "3 int8, 0 float32" in shown
    assert all(kernel["rule"] in shown for kernel in fields["kernels"])
    assert f"{fields['hardware']['registers']} registers" in shown
    rules = {kernel["rule"]: kernel for kernel in fields["kernels"]}
    assert "conv2d" in rules and "" not in rules
    for kernel in fields["kernels"]:
        assert all(name in shown for name in (kernel["rule"], *kernel["knobs"])), kernel


def test_policy_file_goes_before_options(models: list[str], tmp_path: Path) -> None:
    (tmp_path / "policy.json").write_text(json.dumps({"layers": {"one/conv": {"keep": 1.0}}}))
    out = tmp_path / "out"
    policy = ["--prune", "0.5", "--policy", str(tmp_path / "policy.json")]
    assert cli.run(["compile", *models, *policy, "--no-compare", "--json", "-o", str(out)]) == 0
    report = Report.model_validate_json((out / "report.json").read_text())
    assert report.final.macs == 36 * 8 * 18 + 2 * 24


def test_inputs_of_one_name_that_are_not_shared(tmp_path: Path) -> None:
    onnx.save(classifier(), tmp_path / "small.onnx")
    onnx.save(classifier(shape=(1, 2, 8, 8)), tmp_path / "large.onnx")
    arrays = {"small.x": samples(4), "large.x": np.ones((4, 2, 8, 8), np.float32)}
    np.savez(tmp_path / "evaluation.npz", **arrays, large=np.array([0, 1, 2, -1]))
    models = [str(tmp_path / "small.onnx"), str(tmp_path / "large.onnx")]
    out = tmp_path / "out"
    data = ["--evaluation", str(tmp_path / "evaluation.npz"), "--threads", "2"]
    assert cli.run(["compile", *models, *data, "--json", "-o", str(out)]) == 0
    report = Report.model_validate_json((out / "report.json").read_text())
    assert [stage.tasks["small"].agreement for stage in report.own] == [1.0, 1.0]
    assert not any(len(layer.tasks) > 1 for layer in report.layers)
    bundle = Bundle.load(out)
    assert {i.name: i.shape for i in bundle.inputs} == {"small.x": (1, 2, 6, 6), "large.x": (1, 2, 8, 8)}
    assert bundle.runner.threads == 2


def test_a_better_cpu_of_the_same_family(models: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lacking = unfit(describe_target(resolve("x86-64-v4")))
    if lacking is None:
        pytest.skip("this CPU has everything")
    out = tmp_path / "out"
    assert cli.run(["compile", *models, "--target", "x86-64-v4", "--no-compare", "--json", "-o", str(out)]) == 0
    assert cli.run(["bench", str(out)]) == 2
    assert lacking in capsys.readouterr().err


def test_another_machines_bundle(models: list[str], tmp_path: Path) -> None:
    if shutil.which("aarch64-linux-gnu-gcc") is None:
        pytest.importorskip("ziglang")
    np.savez(tmp_path / "calibration.npz", x=samples(8))
    out = tmp_path / "out"
    data = ["--quantize", "int8", "--calibration", str(tmp_path / "calibration.npz")]
    assert cli.run(["compile", *models, *data, "--target", "aarch64", "--json", "-o", str(out)]) == 0
    report = Report.model_validate_json((out / "report.json").read_text())
    assert report.measured_on == ""
    assert report.final.latency is None
    # judged on this machine: integers give the same answers on every one
    assert report.final.tasks["one"].agreement is not None
    assert cli.run(["inspect", str(out)]) == 0


def test_tune_then_compile_with_what_was_found(
    models: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work, out = str(tmp_path / "work"), str(tmp_path / "out")
    assert cli.run(["tune", models[0], "--work-dir", work, "--trials", "2"]) == 0
    printed = capsys.readouterr().out
    assert "trials" in printed and "lost" in printed and "127.0.0.1:" in printed
    assert cli.run(["tune", "--work-dir", work, "--trials", "3", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["work_dir"] == work
    measured = [json.loads(line) for line in (tmp_path / "work" / "journal.jsonl").read_text().splitlines()]
    assert sum(one["trials"] for one in told["devices"]) == sum(one["device"] is not None for one in measured)
    assert all(one["device"].startswith("127.0.0.1:") and one["lost"] == 0 for one in told["devices"])
    assert json.loads((tmp_path / "work" / "options.json").read_text())["trials"] == 3
    assert cli.run(["compile", models[0], "--work-dir", work, "--json", "-o", out]) == 0
    report = Report.model_validate_json((tmp_path / "out" / "report.json").read_text())
    assert [stage.name for stage in report.own] == ["merged", "tuned"]


def test_latency_is_taken_on_the_board(models: list[str], tmp_path: Path) -> None:
    with embedded(key="board") as tracker:
        command = ["compile", *models, "--tracker", tracker.address, "--key", "board", "--json"]
        assert cli.run([*command, "-o", str(tmp_path / "out")]) == 0
    report = Report.model_validate_json((tmp_path / "out" / "report.json").read_text())
    assert report.measured_on.startswith("board at 127.0.0.1")
    assert all(stage.latency for stage in report.own)


def test_layers_that_are_not_quantized_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weight = onnx.numpy_helper.from_array(np.eye(4, dtype="float32"), "w")
    nodes = [
        onnx.helper.make_node("MatMul", ["x", "w"], ["a"], "constant"),
        onnx.helper.make_node("MatMul", ["a", "z"], ["y"], "computed"),
    ]
    inputs = [onnx.helper.make_tensor_value_info(name, 1, [4, 4]) for name in ("x", "z")]
    graph = onnx.helper.make_graph(nodes, "t", inputs, [onnx.helper.make_empty_tensor_value_info("y")], [weight])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)]), tmp_path / "t.onnx")
    np.savez(tmp_path / "samples.npz", **{name: np.ones((4, 4), "float32") for name in ("x", "z")})
    arguments = ["--quantize", "int8", "--calibration", str(tmp_path / "samples.npz"), "--no-compare"]
    assert cli.run(["compile", str(tmp_path / "t.onnx"), *arguments, "--json", "-o", str(tmp_path / "out")]) == 0
    captured = capsys.readouterr()
    note = "nnfuze: 1 of 2 layers stay in float32: t/computed (its weights are not constant)"
    assert captured.err.splitlines()[-1] == note
    report = Report.model_validate_json(captured.out)
    assert [(layer.integer, layer.reason) for layer in report.layers] == [
        (True, ""),
        (False, "its weights are not constant"),
    ]


def test_auto_says_which_layers_stay_float_and_how_to_do_it_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    spread = np.logspace(0, -4, 8, dtype="float32")
    first = rng.standard_normal((4, 8)).astype("float32") * spread
    second = rng.standard_normal((8, 4)).astype("float32") / spread[:, None]
    weights = [onnx.numpy_helper.from_array(array, name) for name, array in (("a", first), ("b", second))]
    nodes = [
        onnx.helper.make_node("MatMul", ["x", "a"], ["m"], "fine"),
        onnx.helper.make_node("MatMul", ["m", "b"], ["y"], "spoiled"),
    ]
    ends = [onnx.helper.make_tensor_value_info(name, 1, [4, 4]) for name in "xy"]
    graph = onnx.helper.make_graph(nodes, "t", ends[:1], ends[1:], weights)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)]), tmp_path / "t.onnx")
    data = {"x": rng.standard_normal((16, 4)).astype("float32")}
    np.savez(tmp_path / "samples.npz", **data)  # type: ignore[arg-type]
    # For another machine: on this one, so small a network may be faster in float32, which is measured.
    command = ["compile", str(tmp_path / "t.onnx"), "--calibration", str(tmp_path / "samples.npz"), "--target", "rpi4"]
    out, again = str(tmp_path / "out"), str(tmp_path / "again")
    assert cli.run([*command, "--quantize", "auto", "-o", out]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("auto: "))
    assert "0.1 allowed: 1 of 2 layers stay in float32: t/spoiled" in line
    assert line.endswith(f"; again: --policy {out}/policy.json")
    assert cli.run([*command, "--policy", f"{out}/policy.json", "-o", again]) == 0
    report, other = (Report.model_validate_json(Path(path, "report.json").read_text()) for path in (out, again))
    assert report.layers[1].reason.startswith("its 8 bits alone make an error of ") and other.budget is None
    assert [layer.integer for layer in report.layers] == [layer.integer for layer in other.layers] == [True, False]
    one, two = (Path(path, "lib.so").read_bytes() for path in (out, again))
    assert one == two, "the same choice makes the same code and weights"


def test_arrays_without_elements_have_no_largest(capsys: pytest.CaptureFixture[str]) -> None:
    print_arrays({"y": np.zeros((2, 0), "int8"), "z": np.ones(1, "float32")})
    assert capsys.readouterr().out.splitlines() == ["y: [2, 0] int8", "z: [1] float32, largest 1 at 0"]


def test_the_largest_of_several_inferences_is_at_places_along_all_axes(capsys: pytest.CaptureFixture[str]) -> None:
    scores = np.zeros((3, 1, 5), "float32")
    scores[2, 0, 3] = 7
    print_arrays({"both": scores, "one": scores[2:], "number": np.float32(4)[...]})
    assert [line.split(" at ")[1] for line in capsys.readouterr().out.splitlines()] == ["[2, 3]", "3", "0"]
