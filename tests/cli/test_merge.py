"""``nnfuze merge`` where PyTorch is not installed; what it does where it is: tests/training."""

from __future__ import annotations

import sys

from nnfuze_tvm import cli
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
