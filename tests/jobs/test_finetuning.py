"""Fine-tuning where PyTorch is missing; with it: tests/training."""

from __future__ import annotations

import sys

import onnx
import pytest

from nnfuze_tvm.errors import NNFuzeError
from nnfuze_tvm.jobs.graphs import make_graphs
from nnfuze_tvm.jobs.request import NetworkRequest
from tests.tiny_networks import classifier


def test_without_pytorch_one_line_says_what_to_install(monkeypatch, tmp_path):
    for name in [name for name in sys.modules if name.startswith("nnfuze_tvm.training")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "nnfuze_tvm.jobs.finetuning", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    onnx.save(classifier(), tmp_path / "net.onnx")
    fields = {"finetune": "data.npz", "prune": 0.5, "work_dir": str(tmp_path / "work")}
    request = NetworkRequest.parse([str(tmp_path / "net.onnx")], fields)
    with pytest.raises(NNFuzeError, match=r"^training needs PyTorch: pip install 'nnfuze-tvm\[train\]'$"):
        make_graphs(request)
    assert not (tmp_path / "work").exists()
