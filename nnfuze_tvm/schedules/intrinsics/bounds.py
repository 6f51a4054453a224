"""Maximum and minimum of floats that are NaN where an operand is, as IEEE 754's ``maximum`` and ONNX have it.

TVM's own ``max(x, y)`` is ``x > y ? x : y``: NaN only where ``y`` is. x86 has that as one instruction, so with what
can't be NaN in front nothing is lost and nothing costs. Otherwise both orders are computed: they are the same bits, or
one of them is NaN, and then so are the bits of both together. ARM's instructions keep NaN of both sides; LLVM takes
them for its own operation only.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm import tirx

Bound = Callable[[tirx.Expr, tirx.Expr, bool], tirx.Expr]
"""``(x, y, safe)`` → the larger or the smaller one; ``safe`` says that ``x`` is never NaN."""

Ordered = Callable[[tirx.Expr, tirx.Expr], tirx.Expr]


def of_machine(arm: bool, half: bool) -> tuple[Bound, Bound]:
    """Return the quickest maximum and minimum.

    Parameters
    ----------
    arm : bool
        The CPU is one of ARM's.
    half : bool
        It computes in float16.
    """

    def quickest(name: str, ordered: Ordered) -> Bound:
        def bound(x: tirx.Expr, y: tirx.Expr, safe: bool) -> tirx.Expr:
            dtype = str(y.ty.dtype)
            if arm and (half or dtype != "float16"):
                return tirx.call_llvm_pure_intrin(dtype, f"llvm.{name}", x, y)
            return ordered(x, y) if safe else either(ordered, x, y)

        return bound

    return quickest("maximum", tirx.max), quickest("minimum", tirx.min)


def either(ordered: Ordered, x: tirx.Expr, y: tirx.Expr) -> tirx.Expr:
    """Return the bits of both orders: three instructions on x86, where LLVM's own operation has five."""
    dtype = str(y.ty.dtype)
    bits = dtype.replace("float", "int")
    both = tirx.bitwise_or(tirx.reinterpret(bits, ordered(x, y)), tirx.reinterpret(bits, ordered(y, x)))
    return tirx.reinterpret(dtype, both)
