"""What the benchmarks run: networks by name or by file, alone or several at once, with inputs for each."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from benchmarks import networks
from nnfuze_tvm.errors import InputError, ModelError

CALIBRATION_SAMPLES = 32
EVALUATION_SAMPLES = 8

# Per network, its inputs by name.
Feeds = list[dict[str, np.ndarray]]


@dataclass(frozen=True)
class Workload:
    """One network, or several that run on the same occasion.

    Attributes
    ----------
    name : str
        As it was asked for: ``resnet8``, ``resnet8+resnet8``, or names of files.
    models : list of Path
        ONNX files with static shapes and a batch of one.
    calibration : list of dict
        Per network and input, samples to quantize with, one after the other along the first axis: ``[N, ...]``.
    evaluation : list of list of dict
        Inputs, per sample and network, to judge answers on and to time; none of them is in ``calibration``.
    directory : Path
        Where whatever is made from these models is kept; its name changes with them.
    """

    name: str
    models: list[Path]
    calibration: Feeds
    evaluation: list[Feeds]
    directory: Path

    def calibration_rows(self, n: int) -> list[dict[str, np.ndarray]]:
        """Return the samples that one network is quantized with, inference by inference."""
        shapes = {name: array.shape for name, array in self.evaluation[0][n].items()}
        lengths = {name: shape[0] if shape else 1 for name, shape in shapes.items()}
        arrays = self.calibration[n]
        return [
            {
                name: array[row * lengths[name] :][: lengths[name]].reshape(shapes[name])
                for name, array in arrays.items()
            }
            for row in range(min(len(array) // lengths[name] for name, array in arrays.items()))
        ]


def workload(spec: str, work_dir: Path) -> Workload:
    """Return the workload for ``resnet8``, ``a.onnx``, or several of these with ``+`` between.

    Of a network that is named twice, the copies share their trunk and differ in their heads.

    Raises
    ------
    InputError, ModelError
        If there is no such network, a file can't be read, or an input has a dynamic shape or is no float32 tensor.
    """
    names = spec.split("+")
    if len(names) == 2 and names[0] == names[1] and names[0] in networks.NAMES:
        models = list(networks.shared_trunk_pair(names[0]))
    else:
        models = [_model(name) for name in names]
    for name, model in zip(names, models, strict=True):
        _fix_batch(name, model)
    calibration = [networks.inputs(model, CALIBRATION_SAMPLES, seed=1) for model in models]
    others = [networks.inputs(model, EVALUATION_SAMPLES, seed=2) for model in models]
    evaluation = [
        [{name: array[n : n + 1] for name, array in arrays.items()} for arrays in others]
        for n in range(EVALUATION_SAMPLES)
    ]
    digest = hashlib.sha256()
    for model in models:
        digest.update(model.SerializeToString(deterministic=True))
    for arrays in calibration:
        for array in arrays.values():
            digest.update(array.tobytes())
    label = re.sub(r"[^\w+.-]+", "_", "+".join(Path(name).name for name in names))
    directory = work_dir / f"{label}-{digest.hexdigest()[:10]}"

    def save(folder: Path) -> None:
        for n, model in enumerate(models):
            onnx.save(model, folder / f"task{n}.onnx")

    folder = kept(directory / "models", save)
    return Workload(spec, [folder / f"task{n}.onnx" for n in range(len(models))], calibration, evaluation, directory)


def kept(directory: Path, make: Callable[[Path], object]) -> Path:
    """Return a directory that ``make`` fills the first time; it appears whole or not at all."""
    if not directory.exists():
        directory.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
        try:
            make(scratch)
            os.replace(scratch, directory)
        except OSError:
            if not directory.exists():  # else another process was faster
                raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return directory


def _model(name: str) -> onnx.ModelProto:
    if name in networks.NAMES:
        return networks.build(name)
    if not Path(name).is_file():
        raise InputError(f"--networks {name}: no such network or file; there are {', '.join(networks.NAMES)}")
    try:
        return onnx.load(name)
    except Exception as error:  # protobuf's errors have no common type
        raise ModelError(f"{name}: can't be read as ONNX ({str(error).splitlines()[0]})") from None


def _fix_batch(name: str, model: onnx.ModelProto) -> None:
    """Give every input and output a batch of one: some engines are faster when they know all shapes."""
    weights = {tensor.name for tensor in model.graph.initializer}
    for value in [*model.graph.input, *model.graph.output]:
        tensor = value.type.tensor_type
        if value in model.graph.input:
            if value.name in weights:
                raise ModelError(
                    f"{name}: initializer {value.name!r} is an input, too; convert to IR version 4 or later"
                )
            dims = [dim.dim_value for dim in tensor.shape.dim]
            if tensor.elem_type != onnx.TensorProto.FLOAT or len(dims) < 2 or min(dims[1:]) < 1 or dims[0] > 1:
                raise ModelError(f"{name}: input {value.name!r} is not a float32 tensor [1, ...] of static shape")
        if tensor.shape.dim:
            tensor.shape.dim[0].dim_value = 1
