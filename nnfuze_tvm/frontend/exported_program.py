"""PyTorch's exported programs (``.pt2``) as ONNX networks, by PyTorch's own exporter."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx

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
    except ImportError:
        raise ModelError(f"{path}: reading it needs PyTorch: pip install 'nnfuze-tvm[torch]'") from None
    with _quiet():
        try:
            program = torch.export.load(path)
        except Exception as error:  # whatever PyTorch says of damaged files
            raise ModelError(f"{path}: not a program that torch.export.save wrote ({first_line(error)})") from None
        try:
            exported = torch.onnx.export(program, dynamo=True, opset_version=_OPSET, verbose=False)
        except Exception as error:
            raise ModelError(f"{path}: PyTorch can't export it to ONNX ({first_line(error)})") from None
    assert exported is not None
    return exported.model_proto


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
