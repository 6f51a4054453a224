"""``nnfuze merge`` where PyTorch is not installed; what it does where it is: tests/training."""

from __future__ import annotations

import sys

import pytest

from nnfuze_tvm import cli
from nnfuze_tvm.cli import guard
from tests.tiny_networks import save_pair


def test_what_to_install_is_said(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    for name in [name for name in sys.modules if name.startswith("nnfuze_tvm.training")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "nnfuze_tvm.jobs.merge", raising=False)
    output = tmp_path / "merged"
    assert cli.run(["merge", *save_pair(tmp_path), "--data", "data.npz", "-o", str(output)]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "error: training needs PyTorch: pip install 'nnfuze-tvm[train]'"
    assert not output.exists()


@pytest.mark.parametrize("option", ["-o {}", "-o{}", "--output {}", "--output={}"])
def test_what_is_interrupted_says_how_to_go_on(tmp_path, option):
    begun, new = tmp_path / "a merge", tmp_path / "new"
    begun.mkdir()
    (begun / "job.json").touch()
    for place, said in ((begun, f"; nnfuze merge -o '{begun}' goes on with what has been learnt"), (new, "")):
        words = [word.format(place) for word in option.split(" ")]
        assert guard.interrupted(["merge", "a.onnx", "b.onnx", *words]) == (130, f"interrupted{said}")
