"""3×3 convolutions by fewer multiplications, where that is modelled to pay."""

from __future__ import annotations

import tvm
from tvm import relax
from tvm.ir import Call, GenericConst
from tvm.ir.transform import PassContext, module_pass

from nnfuze_tvm.graph.dataflow import Emitter, Value, op_name, with_rewritten, with_values
from nnfuze_tvm.graph.ir import small_weights, static_shape, with_sources
from nnfuze_tvm.passes.lower.winograd.winograd_kernel import Shape, prim_func
from nnfuze_tvm.passes.lower.winograd.winograd_weights import at_points, fit, taps

# Weights of a layer that are more than this come from memory.
_NEAR_BYTES = 1 << 20
# What both transforms take, per tile and channel, in multiply-adds of the inner loop, by m: of floats and of integers,
# whose larger tiles are put together in int32 and products made in pairs of int16.
_TRANSFORM = {2: 80, 4: 200}
_TRANSFORM_WHOLE = {2: 80, 4: 420}
# Integer weights that are near come from the second cache in the time of so many of their products each.
_NEAR_PRODUCTS = 1
# Fewer channels than this fill no vector, or make the transforms most of the work.
_MIN_CHANNELS = 8
# Vectors run over channels: these many at least must fit in whole.
_CHANNEL_MULTIPLE = 4
# Longer vectors are not filled up with channels of zeros.
_VECTOR = 8


@module_pass(opt_level=0, name="Winograd")
class Winograd:
    """Compute 3×3 convolutions of stride 1 as Winograd's F(4×4, 3×3) or F(2×2, 3×3).

    Takes NHWC data and constant OHWI weights, not dilated, not grouped. F(4×4) multiplies a quarter as often as a
    direct convolution, F(2×2) 4/9 as often, with 4 times and 16/9 times the weights: layers with many channels and
    small images are bound by those and stay direct. A float32 result differs from a direct convolution's by rounding,
    about 1e-6 of its range. In float16, whose rounding F(4×4) would amplify, there is F(2×2) only. Of a module whose
    weights shall stay small (`ir.small_weights`), nothing is rewritten.

    Parameters
    ----------
    integers : bool
        Also int8 convolutions with int32 sums, in int16 with the same sums, if they are sure to fit: for machines that
        multiply pairs of int8 no faster than pairs of int16.
    far_macs : float
        Float32 multiply-adds that the machine does in the time in which a byte comes from memory.
    lanes : int
        How many float32 a vector of the machine holds: output channels are computed in whole vectors.
    """

    def __init__(self, integers: bool, far_macs: float, lanes: int = 4) -> None:
        self.integers, self.far_macs, self.lanes = integers, far_macs, lanes

    def transform_module(self, mod: tvm.IRModule, _: PassContext) -> tvm.IRModule:
        """Rewrite every Relax function of ``mod``."""
        if small_weights(mod):
            return mod
        pairs: list[tuple[tvm.runtime.Tensor, tvm.runtime.Tensor]] = []
        rewritten = with_rewritten(mod, lambda func, builder: self._rewrite(func, builder, pairs))
        return with_sources(rewritten, pairs) if pairs else rewritten

    def share(self, value: Value) -> float:
        """Return the time that a convolution is modelled to take, as a part of what it takes if it stays direct."""
        shape = _shape(value, self)
        if shape is None:
            return 1.0
        costs = _costs(shape.out_height, shape.out_width, shape.channels, shape.outputs, self.far_macs, shape.dtype)
        return costs[shape.m] / costs[0]

    def _rewrite(
        self,
        func: relax.Function,
        builder: relax.BlockBuilder,
        pairs: list[tuple[tvm.runtime.Tensor, tvm.runtime.Tensor]],
    ) -> relax.Function:
        def multiplied_less(value: Value, _name: str, _emitter: Emitter) -> Value | None:
            shape = _shape(value, self)
            if shape is None:
                return None
            kernel = builder.add_func(prim_func(shape), f"winograd{shape.m}x{shape.m}_conv2d")
            parts = taps(value.args[1].value.numpy(), shape.computed)
            weights = relax.const(at_points(parts, shape.m))
            pairs.append((weights.value, tvm.runtime.tensor(parts)))
            return relax.call_tir(kernel, [value.args[0], weights], value.ty)

        return with_values(func, multiplied_less)


def best_tiles(
    out_height: int, out_width: int, channels: int, outputs: int, far_macs: float, dtype: str = "float32"
) -> list[int]:
    """Return edges m of output tiles, 4, 2, and 0 for a direct convolution, those modelled to be fastest first."""
    costs = _costs(out_height, out_width, channels, outputs, far_macs, dtype)
    return sorted(costs, key=lambda m: costs[m])


def _costs(
    out_height: int, out_width: int, channels: int, outputs: int, far_macs: float, dtype: str
) -> dict[int, float]:
    """Return what a convolution is modelled to take, by the edge of the output tiles."""
    pairs = channels * outputs
    direct_bytes, bytes_each = {"float32": (4, 4), "float16": (2, 2)}.get(dtype, (1, 2))

    def cost(points: int, products: int, weight_bytes: int) -> float:
        # Twice as many of everything else as of float32 is multiplied in the time in which a byte comes.
        far = weight_bytes * (far_macs if dtype == "float32" else 2 * far_macs)
        near = 0 if "float" in dtype else _NEAR_PRODUCTS
        return pairs * points * (products + (far if points * pairs * weight_bytes > _NEAR_BYTES else near))

    transform = _TRANSFORM if "float" in dtype else _TRANSFORM_WHOLE
    costs = {0: cost(9, out_height * out_width, direct_bytes)}
    for m in (2,) if dtype == "float16" else (2, 4):
        tiles = -(-out_height // m) * -(-out_width // m)
        products = cost((m + 2) ** 2, tiles, bytes_each)
        costs[m] = products + tiles * (channels + outputs) * transform[m]
    return costs


def _shape(value: Value, winograd: Winograd) -> Shape | None:
    """Return the shape of a convolution that Winograd's algorithm should compute, else None."""
    if not isinstance(value, Call) or op_name(value) != "nn.conv2d":
        return None
    attrs, (data, weights) = value.attrs, value.args
    layouts = (str(attrs.data_layout), str(attrs.kernel_layout), str(attrs.out_layout or attrs.data_layout))
    if layouts != ("NHWC", "OHWI", "NHWC") or not isinstance(weights, GenericConst) or int(attrs.groups) != 1:
        return None
    outputs, *kernel, channels = static_shape(weights)
    if kernel != [3, 3] or {int(s) for s in (*attrs.strides, *attrs.dilation)} != {1}:
        return None
    if min(channels, outputs) < _MIN_CHANNELS or channels % _CHANNEL_MULTIPLE or outputs % _CHANNEL_MULTIPLE:
        return None
    dtype, factor, result = (str(e.ty.dtype) for e in (data, weights, value))
    whole = winograd.integers and dtype in ("int8", "uint8") and (factor, result) == ("int8", "int32")
    if not whole and {dtype, factor, result} not in ({"float32"}, {"float16"}):
        return None
    n, height, width, _ = static_shape(data)
    _, out_height, out_width, _ = static_shape(value)
    parts = taps(weights.value.numpy()) if whole else None
    known = best_tiles(out_height, out_width, channels, outputs, winograd.far_macs, dtype)
    m = next(m for m in known if not m or parts is None or fit(parts, m))
    top, left, bottom, right = (int(p) for p in attrs.padding)
    # Products of pairs of int16 are made in vectors of eight channels at least, everywhere.
    lanes = _VECTOR if whole else min(winograd.lanes, _VECTOR)
    return Shape(n, height, width, channels, outputs, (top, left, bottom, right), m, dtype, lanes) if m else None
