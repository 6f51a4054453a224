"""Spectra as products with constant matrices, made in float64: those have the schedules of contractions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from tvm.relax import op

from nnfuze_tvm.frontend.operators.node import Converter, Node, Operands, known, part_of, refused
from nnfuze_tvm.frontend.operators.values import dtype_of
from nnfuze_tvm.graph.constants import constant
from nnfuze_tvm.graph.dataflow import Value
from nnfuze_tvm.graph.ir import static_shape

# A matrix of 64 MB in float32. What is larger wants a fast Fourier transform.
_MOST_WEIGHTS = 1 << 24
_LANES = 16


def fourier(length: int, inputs: int, outputs: int, parts: tuple[int, int], inverse: bool = False) -> np.ndarray:
    """Return the discrete Fourier transform as a matrix.

    Parameters
    ----------
    length : int
        Of the transform.
    inputs, outputs : int
        How many values it reads, and makes, of the first ones.
    parts : tuple of int
        1 for real numbers, 2 for complex ones: of the inputs and of the outputs.
    inverse : bool
        Transform back, with a factor of one over the length.

    Returns
    -------
    np.ndarray
        float64 ``[inputs, parts, outputs, parts]``.
    """
    if inputs * outputs * parts[0] * parts[1] > _MOST_WEIGHTS:
        raise ValueError(f"a Fourier transform of length {length} is too long: its matrix has more than 2^24 numbers")
    # Products modulo the length first: angles stay small, and so exact.
    turns = np.outer(np.arange(inputs), np.arange(outputs)) % length / length
    angles = (2 if inverse else -2) * math.pi * turns
    cosine, sine = np.cos(angles), np.sin(angles)
    matrix = np.empty((inputs, 2, outputs, 2))
    matrix[:, 0, :, 0], matrix[:, 0, :, 1] = cosine, sine
    matrix[:, 1, :, 0], matrix[:, 1, :, 1] = -sine, cosine
    return matrix[:, : parts[0], :, : parts[1]] / (length if inverse else 1)


def _from_half(length: int, inputs: int) -> np.ndarray:
    """Return the way back from the first half of a real signal's spectrum: ``[inputs, 2, length, 1]``."""
    matrix = fourier(length, inputs, length, (2, 1), inverse=True)
    # The other half mirrors this one; the constant and the highest frequency of an even length have no mirror.
    mirrored = [k for k in range(1, inputs) if 2 * k != length]
    matrix[mirrored] *= 2
    matrix[[k for k in range(inputs) if k not in mirrored], 1] = 0
    return matrix


def _known_number(value: Value | None, name: str) -> int | None:
    values = known(value)
    if value is not None and values is None:
        raise ValueError(f"a computed {name} is not supported")
    return None if values is None else int(values.item())


def _dft(node: Node, inputs: Operands) -> Any:
    """Multiply along one axis by a matrix."""
    data, shape = inputs[0], static_shape(inputs[0])
    given = _known_number(inputs[1], "dft_length")
    axis: int | None = int(node.attributes.get("axis", 1))
    if node.opset >= 20:
        axis = _known_number(inputs[2], "axis")
        axis = -2 if axis is None else axis
    assert axis is not None
    rank, parts = len(shape), shape[-1]
    if not -rank <= axis < rank or axis % rank == rank - 1:
        raise ValueError(f"axis {axis} is none of the signal's {rank - 1}")
    if parts not in (1, 2):
        raise ValueError(f"its last axis has {parts} parts, where numbers have one or two")
    axis %= rank
    inverse, half = bool(node.attributes.get("inverse", 0)), bool(node.attributes.get("onesided", 0))
    if half and not inverse and parts == 2:
        raise ValueError("onesided spectra of complex signals are not supported")
    if half and inverse and parts == 1:
        raise ValueError("the way back from a real onesided spectrum is not supported")
    size = shape[axis]
    length = given if given is not None else 2 * (size - 1) if half and inverse else size
    if length < 1:
        raise ValueError(f"a dft_length of {length} is not supported")
    reads = min(size, length // 2 + 1 if half and inverse else length)
    if half and inverse:
        matrix = _from_half(length, reads)
    else:
        makes = length // 2 + 1 if half else length
        matrix = fourier(length, reads, makes, (parts, 2), inverse)
    return _along(node, data, axis, matrix)


def _along(node: Node, data: Value, axis: int, matrix: np.ndarray) -> Value:
    """Multiply the numbers along an axis, whose parts are the last axis, by ``[inputs, parts, outputs, parts]``."""
    reads, parts, makes, made = matrix.shape
    if static_shape(data)[axis] > reads:
        data = node.emit(part_of(data, axis, 0, reads))
    rank = len(static_shape(data))
    order = [*(n for n in range(rank - 1) if n != axis), axis, rank - 1]
    moved = order != list(range(rank))
    if moved:
        data = node.emit(op.permute_dims(data, order))
    front = list(static_shape(data)[:-2]) if not moved else [static_shape(data)[n] for n in range(rank - 2)]
    flat = node.emit(op.reshape(data, [math.prod(front), reads * parts]))
    columns = makes * made
    table = matrix.reshape(reads * parts, columns)
    # Half a spectrum has an odd number of values, or twice that: a width that no vectors fill.
    rest = -columns % _LANES if columns > _LANES else 0
    product = node.emit(op.matmul(flat, constant(np.pad(table, [(0, 0), (0, rest)]), dtype_of(data))))
    if rest:
        product = node.emit(part_of(product, 1, 0, columns))
    result = op.reshape(product, [*front, makes, made])
    if not moved:
        return result
    return op.permute_dims(node.emit(result), [order.index(n) for n in range(rank)])


def _stft(node: Node, inputs: Operands) -> Any:
    """Multiply every frame by the window and the transform: a convolution."""
    data, shape = inputs[0], static_shape(inputs[0])
    step, frame = _known_number(inputs[1], "frame_step"), _known_number(inputs[3], "frame_length")
    window = known(inputs[2])
    if inputs[2] is not None and window is None:
        raise ValueError("a computed window is not supported")
    parts = shape[2] if len(shape) == 3 else 1
    if len(shape) not in (2, 3) or parts not in (1, 2):
        raise ValueError(f"a signal of shape {list(shape)} is not supported")
    length = frame if frame is not None else shape[1] if window is None else len(window)
    if window is not None and len(window) != length:
        raise ValueError(f"its window has {len(window)} values, its frames have {length}")
    if step is None or step < 1 or not 1 <= length <= shape[1]:
        raise ValueError(f"frames of {length} every {step} of {shape[1]} values are not supported")
    half = bool(node.attributes.get("onesided", 1))
    if half and parts == 2:
        raise ValueError("onesided spectra of complex signals are not supported")
    bins = length // 2 + 1 if half else length
    matrix = fourier(length, length, bins, (parts, 2))
    if window is not None:
        matrix = matrix * window.astype("float64")[:, None, None, None]
    kernel = constant(matrix.transpose(2, 3, 1, 0).reshape(2 * bins, parts, length), dtype_of(data))
    if parts == 2:
        signal = op.permute_dims(data, [0, 2, 1])
    else:
        signal = op.reshape(data, [shape[0], 1, shape[1]])
    spectra = node.emit(op.nn.conv1d(node.emit(signal), kernel, strides=step))
    turned = node.emit(op.permute_dims(spectra, [0, 2, 1]))
    return op.reshape(turned, [shape[0], static_shape(turned)[1], bins, 2])


CONVERTERS: dict[str, Converter] = {
    "DFT": _dft,
    "STFT": _stft,
    "HannWindow": refused("a computed size of a window is not supported"),
    "HammingWindow": refused("a computed size of a window is not supported"),
    "BlackmanWindow": refused("a computed size of a window is not supported"),
    "MelWeightMatrix": refused("a computed size or frequency of a filter bank is not supported"),
}
