"""A model file becomes one Relax function per task."""

from nnfuze_tvm.frontend.onnx import load

__all__ = ["load"]
