"""Libraries with one function ``main(a)`` on one float32 that does what a kernel should not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import tvm
from tvm.script import tirx as T

from nnfuze_tvm.devices import targets, toolchain

FAR = 1 << 44
FOREVER = 1 << 62


def endless() -> tvm.tirx.PrimFunc:
    @T.prim_func(s_tir=True)
    def main(a: T.Buffer((1,), "float32")) -> None:
        for _ in range(T.int64(FOREVER)):
            with T.sblock("a"):
                a[0] = a[0] * T.float32(0.5) + T.float32(1.0)

    return main


def segfault() -> tvm.tirx.PrimFunc:
    @T.prim_func(s_tir=True)
    def main(a: T.Buffer((1,), "float32")) -> None:
        for _ in range(1):
            with T.sblock("a"):
                a[T.int64(FAR)] = T.float32(0.0)

    return main


def good() -> tvm.tirx.PrimFunc:
    @T.prim_func(s_tir=True)
    def main(a: T.Buffer((1,), "float32")) -> None:
        for _ in range(1):
            with T.sblock("a"):
                a[0] = T.float32(7.0)

    return main


def library(function: Callable[[], tvm.tirx.PrimFunc], folder: Path) -> Path:
    """Build one of the functions for this machine."""
    target = targets.resolve("host")
    named = function().with_attr("global_symbol", "main")
    built = tvm.compile(tvm.IRModule({"main": named}), target=target)
    return toolchain.export_library(built, folder / "misbehaving.so", target)
