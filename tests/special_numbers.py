"""A layer in 8 bits on numbers that no code stands for: NaN counts as zero, what is too large as the largest code."""

from __future__ import annotations

import numpy as np
import tvm
from tvm import relax

SHAPE = (1, 24, 5, 7)
SCALE = 0.5


def layer(dtype: str, zero_point: int) -> tvm.IRModule:
    """Return a pointwise convolution of quantized data, with the codes of the data as another output."""
    scale, zero = relax.const(np.float32(SCALE)), relax.const(np.dtype(dtype).type(zero_point))
    builder = relax.BlockBuilder()
    data = relax.Var("x", relax.TensorType(SHAPE, "float32"))
    with builder.function("main", [data]):
        with builder.dataflow():
            codes = builder.emit(relax.op.quantize(data, scale, zero, axis=0, out_dtype=dtype))
            value = builder.emit(relax.op.dequantize(codes, scale, zero, axis=0, out_dtype="float32"))
            one, none = relax.const(np.float32(1)), relax.const(np.int8(0))
            stored = relax.const(_weights().astype("int8"))
            weights = builder.emit(relax.op.dequantize(stored, one, none, axis=0, out_dtype="float32"))
            result = builder.emit(relax.op.nn.conv2d(value, weights))
            outputs = builder.emit_output(relax.Tuple([codes, result]))
        builder.emit_func_output(outputs)
    return builder.get()


def data() -> np.ndarray:
    """Return data in which every number is special somewhere, in whole vectors and in what is left of them."""
    special = [np.nan, np.inf, -np.inf, 3e38, -3e38, 2.0**31, -(2.0**31), 2.0**33, 1e-45, -1e-45, -0.0, -np.nan]
    x = np.random.default_rng(0).uniform(-90, 90, SHAPE).astype("float32")
    places = np.arange(0, x.size, 3)
    x.reshape(-1)[places] = np.resize(np.array(special, "float32"), places.size)
    return x


def expected(dtype: str, zero_point: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the codes of the data, and the layer's sums, exact in float32."""
    limits = np.iinfo(dtype)
    quotient = np.nan_to_num(data().astype("float64") / SCALE, nan=0.0, posinf=1e9, neginf=-1e9)
    codes = np.clip(np.rint(quotient) + zero_point, limits.min, limits.max).astype(dtype)
    values = (codes.astype("float64") - zero_point) * SCALE
    return codes, np.einsum("oi,nihw->nohw", _weights()[:, :, 0, 0], values).astype("float32")


def _weights() -> np.ndarray:
    return np.random.default_rng(1).integers(-127, 128, (16, SHAPE[1], 1, 1)).astype("float64")
