"""The engines that run a workload side by side: one file each, from ONNX files to a call with numpy arrays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version

from benchmarks.engines import mnn, ncnn, onnxruntime, openvino, tvm
from benchmarks.engines.base import Engine
from benchmarks.workloads import Workload
from nnfuze_tvm.deploy.manifest import package_versions

PEERS: dict[str, Callable[[Workload, str, int], Engine]] = {
    "onnxruntime": onnxruntime.make,
    "openvino": openvino.make,
    "ncnn": ncnn.make,
    "mnn": mnn.make,
    "tvm": tvm.make,
}


_PACKAGES = {
    "onnxruntime": ["onnxruntime"],
    "openvino": ["openvino", "nncf"],
    "ncnn": ["ncnn", "pnnx"],
    "mnn": ["mnn"],
}


def versions(peers: Sequence[str]) -> dict[str, str]:
    """Return the versions of all packages that are compared."""
    found = package_versions()
    for package in (name for peer in peers for name in _PACKAGES.get(peer, [])):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
