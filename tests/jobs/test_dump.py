"""--dump-ir: the module after every pass of every phase."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import tvm

from nnfuze_tvm import cli
from nnfuze_tvm.errors import InputError
from nnfuze_tvm.graph import ir
from nnfuze_tvm.jobs.compile import compile
from nnfuze_tvm.jobs.dump import open_dump
from nnfuze_tvm.passes import pipeline
from tests.tiny_networks import samples, save_pair


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return save_pair(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def dumped(models: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dump of an int8 compilation with all its stages: only the way of what is in the bundle counts."""
    directory = tmp_path_factory.mktemp("dumped")
    np.savez(directory / "calibration.npz", x=samples(8))
    data = {"quantize": "int8", "prune": 0.75, "calibration": str(directory / "calibration.npz")}
    compile(models, directory / "out", dump_ir=directory / "ir", **data)
    return directory / "ir"


def passes(directory: Path) -> list[tuple[str, str]]:
    """Phase and pass of every file, in order; their numbers have no gap."""
    names = sorted(file.name for file in directory.iterdir())
    found = [re.fullmatch(r"(\d+)-([\w-]+)-(\w+)\.py", name) for name in names]
    assert [int(match[1]) for match in found if match] == list(range(1, len(names) + 1))
    return [(match[2], match[3]) for match in found if match]


def test_every_pass_once_and_in_order(dumped: Path) -> None:
    found = passes(dumped)
    assert list(dict.fromkeys(phase for phase, _ in found)) == [
        "merge", "simplify", "pruned", "int8", "layout", "integer", "batch", "winograd", "fuse", "schedule",
    ]  # fmt: skip
    assert len(found) == len(set(found))
    assert found[:2] == [("merge", "MergeTasks"), ("merge", "ShareTrunk")]
    assert ("int8", "InsertQDQ") in found and ("schedule", "ScheduleKernels") in found


def test_layers_kernels_and_shapes_of_constants_can_be_read(dumped: Path) -> None:
    texts = [file.read_text() for file in sorted(dumped.iterdir())]
    assert all("metadata[" not in text and "one_conv" in text for text in texts)
    assert 'R.nn.conv2d(x, constant("float32[8, 2, 3, 3]")' in texts[0]
    assert 'constant("float32[6, 2, 3, 3]")' in next(text for text in texts if "[6, 2, 3, 3]" in text)
    assert "T.prim_func" not in texts[0] and "T.prim_func" in texts[-1] and '"nnfuze.rule": "conv2d"' in texts[-1]


def test_an_earlier_dump_is_replaced_and_nothing_else(
    models: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["analyze", models[0], "--target", "rpi4", "--json", "--dump-ir"]
    (tmp_path / "ir").mkdir()
    for name in ("99-merge-Old.py", ".98-merge-Older.py.new"):
        (tmp_path / "ir" / name).write_text("")
    assert cli.run([*arguments, str(tmp_path / "ir"), "--shape", "nothing=1"]) == 2
    assert (tmp_path / "ir" / "99-merge-Old.py").is_file()  # lost only when there is a new one
    assert cli.run([*arguments, str(tmp_path / "ir")]) == 0
    assert ("merge", "Old") not in passes(tmp_path / "ir") and not list((tmp_path / "ir").glob(".*"))
    assert cli.run(["compile", models[0], "-o", str(tmp_path / "out"), "--dump-ir", str(tmp_path / "out" / "ir")]) == 2
    assert not (tmp_path / "out").exists()
    (tmp_path / "thesis.py").write_text("irreplaceable")
    (tmp_path / "file").write_text("")
    for path, message in (
        (tmp_path, f"--dump-ir {tmp_path}: holds other files than a dump's"),
        (tmp_path / "file", "can't be written"),
        (Path("/proc/ir"), "can't be written"),
    ):
        capsys.readouterr()
        assert cli.run([*arguments, str(path)]) == 2
        assert message in capsys.readouterr().err
    assert (tmp_path / "thesis.py").read_text() == "irreplaceable"


def test_a_pass_that_fails_leaves_what_came_before(tmp_path: Path) -> None:
    @tvm.transform.module_pass(opt_level=0, name="Fails")
    def fails(mod: tvm.IRModule, _: tvm.transform.PassContext) -> tvm.IRModule:
        raise InputError("on purpose")

    @tvm.transform.module_pass(opt_level=0, name="Nothing")
    def nothing(mod: tvm.IRModule, _: tvm.transform.PassContext) -> tvm.IRModule:
        return mod

    dump = open_dump(tmp_path / "ir")
    mod = ir.with_task_outputs(tvm.IRModule({}), [])
    with pytest.raises(InputError, match="on purpose"), dump:
        pipeline.phase("bad", nothing, fails)(mod)
    with dump:
        pipeline.phase("good", nothing)(mod)
    assert passes(tmp_path / "ir") == [("bad", "Nothing"), ("good", "Nothing")]
