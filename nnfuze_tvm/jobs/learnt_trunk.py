"""What ``nnfuze merge`` leaves in a directory, and networks that go on with it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import tvm
from tvm_ffi import structural_equal

from nnfuze_tvm.errors import InputError
from nnfuze_tvm.frontend import load
from nnfuze_tvm.graph import dataflow, ir
from nnfuze_tvm.graph.views import forms
from nnfuze_tvm.jobs.directory import JOB
from nnfuze_tvm.jobs.request import model_path
from nnfuze_tvm.passes import pipeline
from nnfuze_tvm.reading.files import open_file, parse_json, read_file

_BLOCK = 1 << 20


def file_names(tasks: Sequence[str]) -> dict[str, str]:
    """Return the name of each task's file: no two are the same, and none is hidden."""
    found: dict[str, str] = {}
    for task in tasks:
        name = task.replace(os.sep, "_").lstrip(".") or "_"
        while f"{name}.onnx" in found.values():
            name += "_"
        found[task] = f"{name}.onnx"
    return found


def digest(path: str | os.PathLike[str]) -> str:
    """Return what stands for a file's content."""
    found = hashlib.sha256()
    with open_file(path) as file:
        while block := file.read(_BLOCK):
            found.update(block)
    return found.hexdigest()


def with_learnt_trunk(
    directory: str, models: Sequence[str], shared_inputs: Sequence[str], merged: tvm.IRModule
) -> tvm.IRModule:
    """Return networks as ``nnfuze merge`` made them, merged.

    Parameters
    ----------
    directory : str
        What it was told to write to.
    models : sequence of str
        The networks that it was given, ``path`` or ``task=path``.
    shared_inputs : sequence of str
        What was said of their inputs.
    merged : tvm.IRModule
        The same, merged without learning.

    Raises
    ------
    InputError
        If the directory is of other networks, or of none.
    """
    what = f"--merge {directory}"
    if ir.states(merged):
        raise InputError(f"{what}: networks with states can't share a learnt trunk: {', '.join(ir.states(merged))}")
    tasks = ir.tasks(merged)
    folder = Path(directory)
    files = {task: folder / name for task, name in file_names(tasks).items()}
    if not folder.is_dir():
        raise InputError(f"{what}: no such directory; give one that nnfuze merge made of these networks")
    if missing := [file.name for file in files.values() if not file.is_file()]:
        hint = "give a directory that nnfuze merge made of the same tasks"
        if (folder / JOB).is_file() and not (folder / "report.json").is_file():
            hint = f"it was interrupted, and goes on with nnfuze merge -o {directory}"
        raise InputError(f"{what}: {', '.join(missing)} not there; {hint}")
    if (folder / JOB).is_file():
        networks, inputs = _made_of(folder)
        if networks != [digest(model_path(model)) for model in models]:
            raise InputError(f"{what}: was made of other networks than the given ones")
        if inputs != forms(shared_inputs):
            raise InputError(
                f"{what}: was made with --share-input {' '.join(inputs) or 'of names only'}; give the same"
            )
    mod = load([str(file) for file in files.values()], tasks=list(files))
    if ir.small_weights(merged):
        mod = ir.with_small_weights(mod)
    learnt = tvm.transform.Sequential(list(pipeline.merge_phases()))(mod)
    if ir.task_outputs(learnt) != ir.task_outputs(merged) or not _alike(learnt, merged):
        raise InputError(f"{what}: its networks have other inputs or outputs than the given ones")
    return learnt


def _made_of(folder: Path) -> tuple[object, list[str]]:
    """Return what a merge says of its networks, and of inputs in several forms."""
    try:
        facts = parse_json(read_file(folder / JOB))
        return facts["networks"], forms([str(said) for said in facts.get("shared_inputs", [])])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"--merge {folder}: {JOB} is damaged") from None


def _alike(one: tvm.IRModule, other: tvm.IRModule) -> bool:
    """Tell whether two networks have the same inputs and outputs."""
    ends = [
        [(param.name, param.ty) for param in mod["main"].params]
        + [("", field.ty) for field in dataflow.output_fields(mod["main"])]
        for mod in (one, other)
    ]
    return len(ends[0]) == len(ends[1]) and all(
        a == b and structural_equal(own, right) for (a, own), (b, right) in zip(*ends, strict=True)
    )
