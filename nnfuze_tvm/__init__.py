"""Several ONNX networks in, one merged, compressed and tuned bundle for an ARM CPU out, on top of Apache TVM."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nnfuze_tvm.deploy.bundle import Bundle
    from nnfuze_tvm.deploy.deployment import deploy
    from nnfuze_tvm.frontend import load
    from nnfuze_tvm.jobs.job import compile_bundle
    from nnfuze_tvm.jobs.tuning import tune

__all__ = ["Bundle", "compile_bundle", "deploy", "load", "tune"]

# Imported when used: a device that only runs a bundle doesn't wait for the compiler, nor does `nnfuze --help`.
_MODULES = {
    "Bundle": "nnfuze_tvm.deploy.bundle",
    "compile_bundle": "nnfuze_tvm.jobs.job",
    "deploy": "nnfuze_tvm.deploy.deployment",
    "load": "nnfuze_tvm.frontend",
    "tune": "nnfuze_tvm.jobs.tuning",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
