"""PyTorch's exported programs (``.pt2``) as ONNX networks, by PyTorch's own exporter.

Quantized programs become QuantizeLinear and DequantizeLinear, whose codes have all values of their type; where those of
a program have fewer, what is quantized is bounded before.
"""

from __future__ import annotations

import importlib
import logging
import os
import re
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from nnfuze_tvm.errors import ModelError, first_line

_OPSET = 20
# What PyTorch would unpickle or load as machine code, whatever it is: such parts of an archive are programs of others.
_CODE = re.compile(r"(^|/)(custom_obj_|opaque_obj_)|/aotinductor/|\.so$")
# Makes PyTorch's unpickler take tensors and plain values only, also where its caller asks for more.
_TENSORS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


def to_onnx(path: Path) -> onnx.ModelProto:
    """Return a program's network; inputs and outputs have the program's names.

    Parameters
    ----------
    path : Path
        What ``torch.export.save`` wrote.

    Raises
    ------
    ModelError
        If PyTorch is not installed, can't read the file, or can't export what is in it.

    Notes
    -----
    PyTorch's reader evaluates expressions that a file has for shapes: such files are as good as programs.
    """
    check_archive(path)
    try:
        import onnxscript  # noqa: F401  the exporter needs it and says so too late
        import torch

        importlib.import_module("torch.ao.quantization.fx._decomposed")  # makes operators of quantized programs known
    except ImportError:
        raise ModelError(f"{path}: reading it needs PyTorch: pip install 'nnfuze-tvm[torch]'") from None
    with _tensors_only():
        try:
            program = torch.export.load(path)
        except Exception as error:  # whatever PyTorch says of damaged files
            raise ModelError(f"{path}: not a program that torch.export.save wrote ({first_line(error)})") from None
        try:
            exported = torch.onnx.export(
                program, dynamo=True, opset_version=_OPSET, verbose=False, custom_translation_table=_translations()
            )
        except Exception as error:
            raise ModelError(f"{path}: PyTorch can't export it to ONNX ({first_line(error)})") from None
    assert exported is not None
    return exported.model_proto


def _translations() -> dict[Any, Any]:
    """Return how operators are exported that PyTorch's exporter takes for simpler ones."""
    import torch
    from onnxscript import opset20 as op

    def quantize(data, scale, zero_point, quant_min, quant_max, dtype):  # type: ignore[no-untyped-def]
        """Of numbers, and ``dtype`` as ONNX has it."""
        limits = np.iinfo(helper.tensor_dtype_to_np_dtype(dtype))
        if not all(isinstance(each, int | float) for each in (scale, zero_point)):
            raise ValueError("scales that are computed are not supported")
        if (quant_min, quant_max) != (limits.min, limits.max):
            bounds = (np.float32((bound - zero_point) * scale) for bound in (quant_min, quant_max))
            data = op.Clip(data, *(op.Constant(value=numpy_helper.from_array(np.array(bound))) for bound in bounds))
        return op.QuantizeLinear(data, scale, op.Constant(value=helper.make_tensor("zero", dtype, [], [zero_point])))

    operator = torch.ops.quantized_decomposed.quantize_per_tensor
    return {getattr(operator, name): quantize for name in operator.overloads()}


def check_archive(path: Path) -> None:
    """Check that a file is an archive, and holds neither machine code nor objects of any class.

    Raises
    ------
    ModelError
        If it isn't, or does.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        raise ModelError(f"{path}: not a program that torch.export.save wrote") from None
    for name in names:
        if _CODE.search(name):
            raise ModelError(f"{path}: holds {name!r:.80}, which is code or may be; only graphs and tensors are read")


@contextmanager
def _tensors_only() -> Iterator[None]:
    """Let PyTorch unpickle tensors only, and keep the exporter's remarks on other packages to itself."""
    before, said = logging.root.manager.disable, os.environ.get(_TENSORS_ONLY)
    logging.disable(logging.WARNING)
    os.environ[_TENSORS_ONLY] = "1"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
        os.environ.pop(_TENSORS_ONLY)
        os.environ.update({} if said is None else {_TENSORS_ONLY: said})
