"""Several ONNX networks in, one merged, compressed and tuned bundle for an ARM CPU out, on top of Apache TVM."""

from nnfuze_tvm.bundle import Bundle
from nnfuze_tvm.frontend import load
from nnfuze_tvm.job import compile_bundle
from nnfuze_tvm.tuning import tune

__all__ = ["Bundle", "compile_bundle", "load", "tune"]
