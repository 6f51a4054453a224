"""What is known of a value in an integer graph: what its integers mean."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from tvm import relax

from nnfuze_tvm.graph.ir import static_shape

INT32_MAX = 2**31 - 1


@dataclass(frozen=True)
class ConstantCodes:
    """Integers known at compile time, e.g. quantized weights before their dequantize."""

    codes: np.ndarray
    dtype: str


@dataclass(frozen=True)
class Constant:
    """Real numbers known at compile time.

    Attributes
    ----------
    values
        float64, the real numbers.
    codes, scale
        Where they came out of a dequantize: the int32 codes with the zero point already subtracted, and the
        float64 scale, of as many dimensions as the codes and broadcastable to them.
    """

    values: np.ndarray
    codes: np.ndarray | None = None
    scale: np.ndarray | None = None

    def reshape(self, shape: tuple[int, ...]) -> Constant:
        """Return the constant in another shape."""
        if self.codes is None or self.scale is None:
            return Constant(self.values.reshape(shape))
        scale = np.broadcast_to(self.scale, self.codes.shape).reshape(shape)
        for axis in range(len(shape)):
            first = scale.take([0], axis)
            scale = first if np.all(scale == first) else scale
        return Constant(self.values.reshape(shape), self.codes.reshape(shape), scale)

    def transpose(self, axes: tuple[int, ...]) -> Constant:
        """Return the constant with permuted axes."""
        if self.codes is None or self.scale is None:
            return Constant(self.values.transpose(axes))
        return Constant(self.values.transpose(axes), self.codes.transpose(axes), self.scale.transpose(axes))


@dataclass(frozen=True)
class Codes:
    """An int8 or uint8 tensor.

    Attributes
    ----------
    expr
        The tensor as the integer graph stores it.
    lo, hi
        Range of the stored numbers.
    offset
        The number the float graph had in this place is ``expr + offset`` of type ``dtype``: its uint8 is
        stored as int8 with offset 128.
    """

    expr: relax.Expr
    lo: int
    hi: int
    offset: int
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Static shape of the tensor."""
        return static_shape(self.expr)


@dataclass(frozen=True)
class Quantized:
    """A tensor whose real value is ``(codes.expr - zero_point) * scale``."""

    codes: Codes
    scale: float
    zero_point: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Static shape of the tensor."""
        return self.codes.shape

    @property
    def magnitude(self) -> int:
        """Largest possible ``|codes.expr - zero_point|``."""
        return max(abs(self.codes.lo - self.zero_point), abs(self.codes.hi - self.zero_point))


@dataclass
class Sum:
    """An int32 accumulator whose real value is ``clamp((expr + bias) * scale, lo, hi)``.

    ``bias`` (int64) and ``scale`` (float64) have as many dimensions as ``expr`` and broadcast to it; the bias
    is not emitted before the value is used, so that everything constant is added at once. ``bound`` is the
    largest possible ``|expr + bias|``, and no part of the sum exceeds it. ``lo`` and ``hi`` are numbers, or float64 of
    as many dimensions, too.
    """

    expr: relax.Expr
    scale: np.ndarray
    bias: np.ndarray
    bound: np.ndarray
    lo: float | np.ndarray = -np.inf
    hi: float | np.ndarray = np.inf
    total: relax.Expr | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        self.lo, self.hi = (float(np.min(each)) if np.size(each) == 1 else each for each in (self.lo, self.hi))

    @property
    def shape(self) -> tuple[int, ...]:
        """Static shape of the tensor."""
        return static_shape(self.expr)

    @property
    def clamped(self) -> bool:
        """Whether an activation is pending."""
        return bool(np.any(np.isfinite(self.lo)) or np.any(np.isfinite(self.hi)))

    @property
    def nonnegative(self) -> bool:
        """Whether an activation keeps the real value from being negative."""
        return bool(np.all(np.asarray(self.lo) >= 0))

    def clamp(self, lo: float | np.ndarray, hi: float | np.ndarray) -> Sum:
        """Return the sum with a further bound on its real value, which is applied when it is requantized."""
        lowest, highest = np.maximum(self.lo, lo), np.minimum(self.hi, hi)
        return replace(self, lo=np.minimum(lowest, self.hi), hi=np.maximum(highest, self.lo))


@dataclass(frozen=True)
class Parts:
    """A concatenation whose parts are still to be brought to one scale."""

    parts: tuple[Quantized | Sum, ...]
    axis: int


@dataclass(frozen=True)
class Pieces:
    """The fields of a tuple, e.g. what a split gives."""

    fields: tuple[Codes | Quantized, ...]


Known = ConstantCodes | Constant | Codes | Quantized | Sum | Parts | Pieces
"""Everything better known than as a float expression."""
