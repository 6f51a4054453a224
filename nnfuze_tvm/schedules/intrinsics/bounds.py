"""Maximum and minimum of floats that are NaN where an operand is, as IEEE 754's ``maximum`` and ONNX have it.

TVM's own ``max(x, y)`` is ``x > y ? x : y``: NaN only where ``y`` is. x86 has that as one instruction, so with what
can't be NaN in front nothing is lost and nothing costs. ARM's instructions keep NaN of both sides; LLVM takes them for
its own operation only.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm import tirx

Bound = Callable[[tirx.Expr, tirx.Expr, bool], tirx.Expr]
"""``(x, y, safe)`` → the larger or the smaller one; ``safe`` says that ``x`` is never NaN."""


def of_machine(arm: bool, half: bool) -> tuple[Bound, Bound]:
    """Return the quickest maximum and minimum.

    Parameters
    ----------
    arm : bool
        The CPU is one of ARM's.
    half : bool
        It computes in float16.
    """

    def quickest(name: str, ordered: Callable[[tirx.Expr, tirx.Expr], tirx.Expr]) -> Bound:
        def bound(x: tirx.Expr, y: tirx.Expr, safe: bool) -> tirx.Expr:
            dtype = str(y.ty.dtype)
            if safe and (not arm or (dtype == "float16" and not half)):
                return ordered(x, y)
            # One instruction on ARM, five on x86.
            return tirx.call_llvm_pure_intrin(dtype, f"llvm.{name}", x, y)

        return bound

    return quickest("maximum", tirx.max), quickest("minimum", tirx.min)
