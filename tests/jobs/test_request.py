"""What jobs are asked for, from Python: the command line's options by name, checked alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nnfuze_tvm
from nnfuze_tvm.errors import InputError
from nnfuze_tvm.jobs.analyze import analyze
from nnfuze_tvm.jobs.graphs import make_graphs
from nnfuze_tvm.jobs.request import CompileRequest, NetworkRequest, TuneRequest
from nnfuze_tvm.passes import pipeline
from nnfuze_tvm.passes.compress import method_settings
from tests.tiny_networks import samples, save_pair


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"calibratoin": "samples.npz"}, "unknown option 'calibratoin'; did you mean 'calibration'?"),
        ({"quantise": "int8"}, "unknown option 'quantise'; did you mean 'quantize'?"),
        ({"options": {}}, "unknown option 'options'"),
        ({"xyz": 1}, "there are shared_inputs, .*, prune"),
        ({"quantize": "int4"}, "--quantize int4"),
        ({"prune": 2}, "--prune 2"),
        ({"threads": "many"}, "--threads many"),
        ({"shapes": {"x": ["wide"]}}, "--shapes wide"),
        ({"quantize": "int8"}, "give --calibration"),
        ({"tracker": "pi:9190"}, "--key"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    calls = [
        lambda: nnfuze_tvm.compile(["net.onnx"], tmp_path / "out", **fields),
        lambda: nnfuze_tvm.tune(["net.onnx"], work_dir=tmp_path / "work", **fields),
        lambda: analyze(["net.onnx"], **fields),
    ]
    for call in calls:
        with pytest.raises(InputError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_each_verb_has_its_own_options() -> None:
    CompileRequest.parse(["net.onnx"], {"compare": False, "trials": 3})
    TuneRequest.parse(["net.onnx"], {"trials": 3})
    with pytest.raises(InputError, match="unknown option 'compare'"):
        TuneRequest.parse(["net.onnx"], {"compare": False})
    with pytest.raises(InputError, match="unknown option 'trials'"):
        NetworkRequest.parse(["net.onnx"], {"trials": 3})


def test_a_job_that_goes_on_keeps_what_it_was_begun_with(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match="option 'quantize': a job that goes on takes trials, tracker, key, secret_file"
    ):
        nnfuze_tvm.tune(work_dir=tmp_path, quantize="fp16")
    with pytest.raises(InputError, match="no tuning job to go on with"):
        nnfuze_tvm.tune(work_dir=tmp_path, trials=3)


def test_what_is_asked_for_survives_being_written() -> None:
    request = CompileRequest.parse(["a=net.onnx"], {"prune": 0.5, "shapes": {"x": [1, 2]}, "trials": 3, "wait": 1.5})
    fields = request.to_fields()
    assert fields["prune"] == 0.5 and "options" not in fields
    assert CompileRequest.parse(fields.pop("models"), fields) == request
    assert set(request.options) == set(method_settings.options(pipeline.METHODS))


def test_the_public_face() -> None:
    assert set(nnfuze_tvm.__all__) == {"Bundle", "compile", "load", "passes", "pipeline", "tune"}
    assert all(getattr(nnfuze_tvm, name) is not None for name in nnfuze_tvm.__all__)
    assert nnfuze_tvm.pipeline is pipeline
    with pytest.raises(AttributeError, match="has no attribute 'tuna'"):
        getattr(nnfuze_tvm, "tuna")  # noqa: B009


def test_calibration_data_that_say_nothing_are_noted(tmp_path: Path) -> None:
    models, path = save_pair(tmp_path), str(tmp_path / "data.npz")
    for values, notes in ((samples(4), 0), (np.full_like(samples(4), 0.5), 1)):
        np.savez(path, x=values)
        said: list[str] = []
        make_graphs(NetworkRequest.parse(models, {"calibration": path}), said.append)
        assert [line.startswith("note: calibration data: 'x' is always 0.5;") for line in said].count(True) == notes


def test_a_single_name_is_no_list_of_networks():
    with pytest.raises(InputError, match="a text; give a list of networks"):
        CompileRequest.parse("a.onnx", {})
