"""Arrays from files and into files: what users give to judge and run networks with, and what they get back."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nnfuze_tvm.analysis import measure
from nnfuze_tvm.deploy.runner import Input, sample_batches, signature
from nnfuze_tvm.errors import InputError
from nnfuze_tvm.jobs.destination import destination, whole
from nnfuze_tvm.jobs.graphs import Graphs
from nnfuze_tvm.reading.arrays import read_arrays, read_npy
from nnfuze_tvm.reading.files import check_kind

Arrays = Mapping[str, np.ndarray]
Answers = Mapping[str, Any]


@dataclass(frozen=True)
class EvaluationData:
    """What the stages of a compilation are judged on.

    Attributes
    ----------
    batches : list of dict
        Arrays by input, one dict per inference.
    labels : dict of str to numpy.ndarray
        Classes ``[N]`` by task.
    what : str
        A line that says what they are; empty if there are none.
    """

    batches: list[dict[str, np.ndarray]] = field(default_factory=list)
    labels: Arrays = field(default_factory=dict)
    what: str = ""


def evaluation_data(graphs: Graphs, path: str | None, arrays: Arrays) -> EvaluationData:
    """Return what to judge the stages on: the evaluation data, else the calibration samples, else nothing.

    Parameters
    ----------
    graphs : Graphs
        The graphs to judge.
    path : str, optional
        The file of the evaluation data.
    arrays : dict of str to numpy.ndarray
        What was read from it.

    Raises
    ------
    InputError
        If the evaluation data doesn't fit the networks.
    """
    inputs, outputs, _ = signature(graphs.last)
    if path:
        _check_names(arrays, [*(i.name for i in inputs), *graphs.tasks], path)
        batches = sample_batches(arrays, inputs)
        labels = measure.labels_of(arrays, outputs, max(len(arrays[i.name]) for i in inputs))
        kind = "labelled samples" if labels else "samples without labels"
        return EvaluationData(batches, labels, f"{len(batches) * _batch_size(inputs)} {kind} of {Path(path).name}.")
    if graphs.calibration is not None:
        batches = sample_batches(graphs.calibration, inputs)
        count = len(batches) * _batch_size(inputs)
        return EvaluationData(batches, {}, f"Agreement on the calibration samples ({count}).")
    return EvaluationData()


def _batch_size(inputs: Sequence[Input]) -> int:
    return inputs[0].shape[0] if inputs and inputs[0].shape else 1


def _check_names(arrays: Arrays, known: Sequence[str], path: str) -> None:
    """Complain about arrays that belong to nothing, and about values that aren't numbers."""
    for name, array in arrays.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
            raise InputError(f"evaluation data {path}: {name!r} is neither an input nor a task{hint}")
        if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
            raise InputError(f"evaluation data {path}: {name!r} holds NaN or infinite values")


def read_inputs(texts: Sequence[str]) -> dict[str, np.ndarray]:
    """Return the arrays of ``["audio=x.npy"]``, or of an ``.npz`` file with several, by input name.

    Raises
    ------
    InputError
        If a text is written otherwise, or a file can't be read.
    """
    arrays: dict[str, np.ndarray] = {}
    for text in texts:
        name, found, path = text.partition("=")
        if found and name in arrays:
            raise InputError(f"--input {text}: {name!r} was given before; give each input once")
        if not found and text.endswith(".npz"):
            arrays.update(read_arrays(text, "inputs"))
            continue
        if not found or not name or not path:
            raise InputError(f"--input {text}: write it as name=array.npy, or name an .npz file")
        try:
            arrays[name] = read_npy(path)
        except OSError as error:
            raise InputError(f"--input {text}: can't be read ({error.strerror or error})") from None
        except ValueError as error:
            raise InputError(f"--input {text}: {error}") from None
    return arrays


def flat(answers: Answers) -> dict[str, np.ndarray]:
    """Return answers by task, or by ``task.output`` where a task has several outputs."""
    result = {}
    for task, value in answers.items():
        if isinstance(value, Mapping):
            result.update({f"{task}.{name}": array for name, array in value.items()})
        else:
            result[task] = value
    return result


def save_answers(answers: Answers, directory: str | os.PathLike[str]) -> list[Path]:
    """Write one ``.npy`` file per output and return their paths.

    Raises
    ------
    InputError
        If the directory can't be written.
    """
    written = []
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
        for name, array in flat(answers).items():
            path = Path(directory) / f"{name.replace(os.sep, '_')}.npy"
            if path.exists():
                check_kind(path)
            np.save(path, array)
            written.append(path)
    except OSError as error:
        raise InputError(f"--output {directory}: can't be written ({error.strerror or error})") from None
    return written


@contextmanager
def array_file(path: str | os.PathLike[str]) -> Iterator[dict[str, np.ndarray]]:
    """Give a dict that becomes an ``.npz`` file when the block ends well; that it can be is found out before.

    Raises
    ------
    InputError
        If it can't be written.
    """
    with whole(destination(path, force=True), path) as file:
        arrays: dict[str, np.ndarray] = {}
        yield arrays
        with open(file, "wb") as out:
            np.savez(out, **arrays)  # type: ignore[arg-type]
