"""A model file becomes one Relax function per task."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nnfuze_tvm.frontend.onnx import load

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    # Imported when used: what is wrong with a file is told before TVM is imported, which takes seconds.
    if name != "load":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from nnfuze_tvm.frontend.onnx import load

    return load
