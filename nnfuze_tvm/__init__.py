"""Several trained networks in, one merged, compressed and tuned bundle for a small CPU out, on top of Apache TVM.

- `load`: model files into one IRModule, a function per task.
- `passes`: what can be done to that module; `pipeline` has the order in which `compile` does it.
- `compile`, `tune`: what the command line's verbs do, with the same options by name.
- `Bundle`: what `compile` wrote, ready to run.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nnfuze_tvm import passes
    from nnfuze_tvm.deploy.bundle import Bundle
    from nnfuze_tvm.frontend import load
    from nnfuze_tvm.jobs.compile import compile
    from nnfuze_tvm.jobs.tune import tune
    from nnfuze_tvm.passes import pipeline

__all__ = ["Bundle", "compile", "load", "passes", "pipeline", "tune"]

# Imported when used: a device that only runs a bundle doesn't wait for the compiler, nor does `nnfuze --help`.
_MODULES = {
    "Bundle": "nnfuze_tvm.deploy.bundle",
    "compile": "nnfuze_tvm.jobs.compile",
    "load": "nnfuze_tvm.frontend",
    "passes": "nnfuze_tvm",
    "pipeline": "nnfuze_tvm.passes",
    "tune": "nnfuze_tvm.jobs.tune",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in ("passes", "pipeline"):
        return import_module(f"{_MODULES[name]}.{name}")
    return getattr(import_module(_MODULES[name]), name)
