"""Constants of a graph as arrays, and back."""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import relax
from tvm.ir import GenericConst


def array(constant: GenericConst) -> np.ndarray:
    """Return the value of a constant."""
    return constant.value.numpy()


def scalar(operand: Any) -> Any:
    """Return the number that a scalar operand is; anything else as it is."""
    inner = getattr(operand, "value", operand)
    return getattr(inner, "value", inner)


def constant(value: np.ndarray, dtype: str | np.dtype | None = None) -> GenericConst:
    """Return ``value`` as a Relax constant of its own dtype, or of ``dtype``."""
    kept = np.asarray(value, dtype=dtype, order="C")
    # Without a dtype TVM narrows 64-bit numbers to 32 bits.
    return relax.const(kept, str(kept.dtype))
