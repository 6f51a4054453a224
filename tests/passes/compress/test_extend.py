"""docs/extend.md stays true: its file and its line, in a copy of the package, do what the page says."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "extend.md").read_text(encoding="utf-8")
PIPELINE = Path("nnfuze_tvm/passes/pipeline.py")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.S)


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package with the page's file and line, and the page's policy beside it."""
    root = tmp_path_factory.mktemp("extended")
    shutil.copytree(ROOT / "nnfuze_tvm", root / "nnfuze_tvm", symlinks=True)
    (root / "examples").symlink_to(ROOT / "examples")
    file, line = blocks("python")
    (root / "nnfuze_tvm/passes/compress/factored.py").write_text(file, encoding="utf-8")
    text = (root / PIPELINE).read_text(encoding="utf-8")
    without = line.replace('            "factored",\n', "")
    assert text.count(without) == 1, "the page shows another list of methods than pipeline.py"
    (root / PIPELINE).write_text(text.replace(without, line), encoding="utf-8")
    (policy,) = blocks("json")
    (root / "policy.json").write_text(policy, encoding="utf-8")
    return root


def python(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(root), "TVM_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *arguments], cwd=root, env=environment, capture_output=True, text=True)


def told(command: str) -> str:
    """Return what the page says that a command prints."""
    (session,) = [part for block in blocks("console") for part in block.split("$ ") if part.startswith(command)]
    return session.partition("\n")[2].strip()


@pytest.mark.slow
def test_one_file_and_one_line_compress_as_the_page_says(extended: Path) -> None:
    (command,) = [line for line in PAGE.splitlines() if line.startswith("$ nnfuze compile") and "evaluation" in line]
    arguments = re.sub(r" --evaluation \S+", "", command).split()[2:]
    done = python(extended, "-m", "nnfuze_tvm", *arguments, "--no-compare", "--json")
    assert done.returncode == 0, done.stderr
    assert "factoring" in done.stderr
    report = json.loads(done.stdout)
    final = report["stages"][-1]
    columns = {
        row[0]: row for row in (line.split("│")[1:-1] for line in PAGE.splitlines() if line.startswith("│")) if row
    }
    table = {name.strip(): row[-1].strip() for name, row in columns.items()}
    assert f"{final['macs'] / 1e6:.1f} M" == table["MACs"]
    assert f"{final['parameters'] / 1e3:.0f} k" == table["parameters"]
    inspected = python(extended, "-m", "nnfuze_tvm", "inspect", "out", "--json")
    floats = json.loads(inspected.stdout)["quantization"]["float_layers"]
    assert floats == json.loads(told("nnfuze inspect")), "a made layer escaped the policy"
    origins = {layer["name"]: layer["origins"] for layer in report["layers"]}
    assert origins["keyword//head/Gemm.thin"] == ["keyword//head/Gemm"]


def test_the_stage_and_the_field_are_there(extended: Path) -> None:
    script = """
from nnfuze_tvm.passes import pipeline
from nnfuze_tvm.passes.compress import method
from nnfuze_tvm.passes.compress.policy import Policy
policy = Policy.load("policy.json")
layers = [policy.for_layer(name) for name in ("keyword//trunk/block2/conv1/Conv", "keyword//head/Gemm")]
print([one.name for one in method.asked(pipeline.METHODS, layers)], [layer.share for layer in layers])
"""
    assert python(extended, "-c", script).stdout == "['factored', 'int8'] [0.75, 0.75]\n"
    assert " factored " in PAGE
    (extended / "bad.json").write_text('{"default": {"share": 1.5}}', encoding="utf-8")
    bad = python(
        extended,
        "-m",
        "nnfuze_tvm",
        "compile",
        "examples/speech/shared/keyword.onnx",
        "--policy",
        "bad.json",
        "-o",
        "out2",
    )
    assert bad.returncode == 2
    assert bad.stderr.splitlines()[-1] == told("nnfuze compile examples/speech/shared/keyword.onnx --policy bad.json")
