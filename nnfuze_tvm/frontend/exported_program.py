"""PyTorch's exported programs (``.pt2``) as ONNX networks, by PyTorch's own exporter.

Quantized programs become QuantizeLinear and DequantizeLinear, whose codes have all values of their type; where those of
a program have fewer, what is quantized is bounded before.
"""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from nnfuze_tvm.errors import ModelError
from nnfuze_tvm.frontend.onnx_tensors import first_line

_OPSET = 20


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
    """
    try:
        import onnxscript  # noqa: F401  the exporter needs it and says so too late
        import torch

        importlib.import_module("torch.ao.quantization.fx._decomposed")  # makes operators of quantized programs known
    except ImportError:
        raise ModelError(f"{path}: reading it needs PyTorch: pip install 'nnfuze-tvm[torch]'") from None
    with _quiet():
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


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's remarks on other packages to itself."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
