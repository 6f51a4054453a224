"""PyTorch's exported programs: what PyTorch computes; without PyTorch one line that says what to install."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tvm

import nnfuze_tvm
from nnfuze_tvm import cli
from nnfuze_tvm.graph import evaluate
from nnfuze_tvm.passes import pipeline


def test_without_pytorch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    path = tmp_path / "a.pt2"
    zipfile.ZipFile(path, "w").close()
    assert cli.run(["compile", str(path), "-o", str(tmp_path / "out")]) == 2
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .endswith(f"{path}: reading it needs PyTorch: pip install 'nnfuze-tvm[torch]'")
    )


@pytest.mark.parametrize(
    "name", ["a/data/constants/custom_obj_0", "a/data/constants/opaque_obj_1", "a/data/aotinductor/model/x.cpp", "x.so"]
)
def test_code_in_an_archive(name: str, tmp_path: Path) -> None:
    """PyTorch would run it while it reads the file."""
    with zipfile.ZipFile(tmp_path / "a.pt2", "w") as archive:
        archive.writestr(name, b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(nnfuze_tvm.errors.ModelError, match="which is code or may be"):
        nnfuze_tvm.load([tmp_path / "a.pt2"])


def test_damaged(tmp_path: Path) -> None:
    path = tmp_path / "a.pt2"
    path.write_bytes(b"PK\3\4 and nothing else")
    with pytest.raises(nnfuze_tvm.errors.ModelError, match=r"a.pt2: not a program that torch.export.save wrote"):
        nnfuze_tvm.load([path])


@pytest.mark.parametrize("recurrent", [False, True])
def test_values(recurrent: bool, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("onnxscript")

    class Image(torch.nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.first = torch.nn.Conv2d(3, 8, 3, stride=2, padding=1)
            self.norm = torch.nn.BatchNorm2d(8)
            self.last = torch.nn.Linear(8, 5)

        def forward(self, image):
            return self.last(torch.nn.functional.silu(self.norm(self.first(image))).mean((2, 3)))

    class Sequence(torch.nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.cell = torch.nn.GRU(10, 16, batch_first=True)

        def forward(self, sound):
            return self.cell(sound)

    torch.manual_seed(0)
    module, x = (Sequence(), torch.randn(1, 7, 10)) if recurrent else (Image(), torch.randn(1, 3, 32, 32))
    path = tmp_path / "a.pt2"
    torch.export.save(torch.export.export(module.eval(), (x,)), path)
    mod = tvm.transform.Sequential(pipeline.merge_phases())(nnfuze_tvm.load([path]))
    (name,) = (param.name for param in mod["main"].params)
    assert name == ("sound" if recurrent else "image")
    with torch.no_grad():
        want = module(x)
    for got, each in zip(evaluate.executor(mod)({name: x.numpy()}), want if recurrent else [want], strict=True):
        np.testing.assert_allclose(got, each.numpy(), rtol=0, atol=1e-5)
