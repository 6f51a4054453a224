"""Weights of few bits that have a scale for each block of inputs: `MatMulNBits`, and block-wise DequantizeLinear."""

from __future__ import annotations

from math import gcd
from typing import Any

import numpy as np
from tvm import relax

from nnfuze_tvm.frontend.operators.expansion import Expansion, in_float32
from nnfuze_tvm.frontend.operators.node import Converter, Node, Operands, known
from nnfuze_tvm.frontend.operators.values import dtype_of
from nnfuze_tvm.graph import ir
from nnfuze_tvm.graph.constants import constant
from nnfuze_tvm.graph.dataflow import Value


def real_blocks(node: Node, codes: np.ndarray, scale: np.ndarray, zero: np.ndarray, axis: int, size: int) -> Value:
    """Return real numbers of codes: each block's in a row of its own, dequantized, and then in their places.

    Parameters
    ----------
    node : Node
        The node that they are of.
    codes : numpy.ndarray
        int8 or uint8.
    scale, zero : numpy.ndarray
        A number per block, in float32 and of the codes' dtype.
    axis, size : int
        The axis that is cut into blocks of so many codes; the last one may have fewer.
    """
    even = gcd(codes.shape[axis], size)
    shape = [*codes.shape[:axis], codes.shape[axis] // even, even, *codes.shape[axis + 1 :]]
    rows = np.moveaxis(codes.reshape(shape), axis + 1, -1)
    own = [np.repeat(each, size // even, axis).take(range(shape[axis]), axis).ravel() for each in (scale, zero)]
    operands = map(constant, (rows.reshape(-1, even), *own))
    real = node.emit(relax.op.dequantize(*operands, axis=0, out_dtype="float32"))
    apart = node.emit(relax.op.reshape(real, rows.shape))
    order = [*range(axis + 1), codes.ndim, *range(axis + 1, codes.ndim)]
    if order != sorted(order):
        apart = node.emit(relax.op.permute_dims(apart, order))
    return relax.op.reshape(apart, codes.shape)


def _fields(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Return ``[..., count]`` numbers of so many bits, of which bytes hold some, the first in the lowest bits."""
    shifts = np.arange(0, 8, bits, dtype="uint8")
    apart = packed[..., None] >> shifts & (2**bits - 1)
    return apart.reshape(*packed.shape[:-1], -1)[..., :count].astype("uint8")


def _matmul_of_codes(node: Node, inputs: Operands) -> Any:
    """Multiply by a matrix ``[N, K]`` of 2, 4 or 8 bits with a scale, and perhaps a zero point, per block of inputs."""
    data, matrix, scales, points, order, bias = (inputs[k] for k in range(6))
    depth, outputs, size = (int(node.attributes.get(name, 0)) for name in ("K", "N", "block_size"))
    bits = int(node.attributes.get("bits", 4))
    if bits not in (2, 4, 8):
        raise ValueError(f"weights of {bits} bits are not supported, only of 2, 4 and 8")
    packed, scale, point = known(matrix), known(scales), known(points)
    if packed is None or scale is None or (points is not None and point is None):
        raise ValueError("weights that are not constant are not supported")
    if min(depth, outputs, size) < 1:
        raise ValueError(f"{outputs}×{depth} weights in blocks of {size} are not supported")
    blocks = -(-depth // size)
    whole = packed.size == outputs * blocks * size * bits // 8 and scale.size == outputs * blocks
    if packed.dtype != np.uint8 or not whole:
        raise ValueError(f"{packed.size} bytes and {scale.size} scales are none of {outputs}×{depth} weights")
    _check_order(known(order) if order is not None else np.arange(depth) // size, depth, size)
    codes = _fields(packed.reshape(outputs, -1), bits, blocks * size)[:, :depth]
    scale = scale.reshape(outputs, blocks).astype("float32")
    expansion = Expansion(node)
    if point is not None and point.dtype != np.uint8:
        wide = [np.repeat(each, size, 1)[:, :depth] for each in (point.reshape(outputs, blocks), scale)]
        weights = expansion.operand(constant((codes - wide[0].astype("float32")) * wide[1]))
    else:
        real = real_blocks(node, codes, scale, _points(point, bits, outputs, blocks), 1, size)
        weights = expansion.operand(node.emit(real))
    operand = expansion.operand(in_float32(node, data))
    result = expansion.add("MatMul", operand, expansion.add("Transpose", weights, perm=[1, 0]))
    if bias is not None:
        result = expansion.add("Add", result, expansion.operand(in_float32(node, bias)))
    (product,) = expansion.results(result)
    return product if dtype_of(data) == "float32" else relax.op.astype(product, dtype_of(data))


def _points(point: np.ndarray | None, bits: int, outputs: int, blocks: int) -> np.ndarray:
    """Return the zero points ``[outputs, blocks]``: rows of whole bytes in the file, or the middle of all codes."""
    if point is None:
        return np.full((outputs, blocks), 2 ** (bits - 1), "uint8")
    if point.size != outputs * -(-blocks * bits // 8):
        raise ValueError(f"{point.size} bytes of zero points are none of {outputs}×{blocks} blocks")
    return _fields(point.reshape(outputs, -1), bits, blocks)


def _check_order(order: np.ndarray | None, depth: int, size: int) -> None:
    if order is None or order.size != depth or (order.ravel() != np.arange(depth) // size).any():
        raise ValueError("a g_idx that reorders the inputs of blocks is not supported")


def spread(node: Node, data: Value, scale: Value, zero: Value | None) -> list[Value]:
    """Return a scale per element of the data, and a zero point in float32, where each is for a block of them."""
    size, axis = block_of(node, data, scale)
    shape = ir.static_shape(data)
    found = []
    for value in (scale, zero):
        if value is None:
            found.append(constant(np.zeros((), "float32")))
            continue
        value, number = in_float32(node, value), known(value)
        if number is not None:
            repeated = np.repeat(number.astype("float32"), size, axis)
            found.append(constant(repeated.take(range(shape[axis]), axis)))
            continue
        repeated = node.emit(relax.op.repeat(value, size, axis))
        found.append(node.emit(relax.op.strided_slice(repeated, [axis], [0], [shape[axis]])))
    return found


def block_of(node: Node, data: Value, scale: Value) -> tuple[int, int]:
    """Return how many elements share a scale, and along which axis."""
    size, axis = node.attributes["block_size"], node.attributes.get("axis", 1)
    shape = ir.static_shape(data)
    axis %= len(shape)
    blocks = [*shape[:axis], -(-shape[axis] // size), *shape[axis + 1 :]]
    if list(ir.static_shape(scale)) != blocks:
        raise ValueError(
            f"a scale of shape {list(ir.static_shape(scale))} for blocks of shape {blocks} is not supported"
        )
    return size, axis


def dequantized(node: Node, data: Value, scale: Value, zero: Value | None) -> Value:
    """Return the real numbers, in float32, of codes of which each block has a scale."""
    size, axis = block_of(node, data, scale)
    codes, factor, point = known(data), known(scale), known(zero)
    if codes is not None and codes.dtype in (np.int8, np.uint8) and factor is not None and codes.size:
        point = np.zeros(factor.shape, codes.dtype) if zero is None else point
        if point is not None and (point.shape, point.dtype) == (factor.shape, codes.dtype):
            return real_blocks(node, codes, factor.astype("float32"), point, axis, size)
    scale, zero = spread(node, data, scale, zero)
    return relax.op.multiply(relax.op.subtract(relax.op.astype(data, "float32"), zero), scale)


CONVERTERS: dict[str, Converter] = {"com.microsoft.MatMulNBits": _matmul_of_codes}
