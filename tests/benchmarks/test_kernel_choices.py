"""Records of kernels, and what is said of two that differ."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from benchmarks import kernel_choices


def test_a_record_is_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(tmp_path / name) for name in ("old.json", "new.json")]
    assert kernel_choices.main(["record", files[0], "--networks", "ds_cnn", "--targets", "host,rpi4"]) == 0
    shutil.copy(*files)
    assert kernel_choices.main(["compare", *files]) == 0
    assert "all kernels of 4 networks and targets are the same" in capsys.readouterr().out
    record = json.loads(Path(files[1]).read_text())
    kernel = next(iter(record["ds_cnn fp32 rpi4"]))
    record["ds_cnn fp32 rpi4"][kernel]["rule"] = "fallback"
    del record["ds_cnn int8 host"]["outputs"]
    Path(files[1]).write_text(json.dumps(record))
    assert kernel_choices.main(["compare", *files]) == 1
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and said[0].startswith(f"ds_cnn fp32 rpi4: {kernel}: ")
    assert said[1] == "ds_cnn int8 host: outputs: only before"
