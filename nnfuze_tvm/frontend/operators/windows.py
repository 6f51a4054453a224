"""Windows that slide over the spatial axes of an image: what pooling and convolution say of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from nnfuze_tvm.frontend.operators.node import Node


@dataclass(frozen=True)
class Windows:
    """Windows over spatial axes; every attribute has one number per axis.

    Attributes
    ----------
    extent, kernel, strides, dilations : tuple of int
        The image's size, the taps of a window, the distance of windows, the distance of taps.
    before, after : tuple of int
        Padding that belongs to the operator.
    count : tuple of int
        Number of windows.
    """

    extent: tuple[int, ...]
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    count: tuple[int, ...]

    @staticmethod
    def of(node: Node, extent: Sequence[int], kernel: Sequence[int]) -> Windows:
        """Return the windows of a node that has ``auto_pad``, ``pads``, ``strides``, ``dilations`` and ``ceil_mode``.

        Parameters
        ----------
        node : Node
            The node.
        extent, kernel : sequence of int
            Sizes of the spatial axes of its data and of its windows.

        Raises
        ------
        ValueError
            If the attributes are no windows.
        """
        rank = len(extent)
        if len(kernel) != rank:
            raise ValueError(f"its kernel has {len(kernel)} spatial dimensions, its data {rank}")
        strides, dilations, (before, after) = (
            ints(node, "strides", rank),
            ints(node, "dilations", rank),
            pads(node, rank),
        )
        spans = [(taps - 1) * dilation + 1 for taps, dilation in zip(kernel, dilations, strict=True)]
        mode = node.text("auto_pad", "NOTSET") or "NOTSET"
        if mode in ("SAME_UPPER", "SAME_LOWER"):
            count = [-(-size // stride) for size, stride in zip(extent, strides, strict=True)]
            needed = (
                max((n - 1) * stride + span - size, 0)
                for n, stride, span, size in zip(count, strides, spans, extent, strict=True)
            )
            before, after = halves(needed, more_in_front=mode == "SAME_LOWER")
            return Windows(tuple(extent), tuple(kernel), strides, dilations, before, after, tuple(count))
        if mode not in ("NOTSET", "VALID"):
            raise ValueError(f"auto_pad {mode!r} is not supported")
        if mode == "VALID":
            before = after = (0,) * rank
        count = []
        for size, span, stride, b, a in zip(extent, spans, strides, before, after, strict=True):
            rest = size + b + a - span
            if rest < 0:
                raise ValueError("its windows are larger than its padded data")
            n = rest // stride + 1
            # A window that would start behind the data and the padding in front is none.
            if node.attributes.get("ceil_mode", 0) and rest % stride and n * stride < size + b:
                n += 1
            count.append(n)
        return Windows(tuple(extent), tuple(kernel), strides, dilations, before, after, tuple(count))

    @property
    def taps(self) -> int:
        """Number of taps of a window."""
        return prod(self.kernel)

    @property
    def behind(self) -> tuple[int, ...]:
        """Return the padding behind that the windows reach: ``ceil_mode`` may need more of it, strides less."""
        return tuple(
            max((n - 1) * stride + (taps - 1) * dilation + 1 - size - b, 0)
            for n, stride, taps, dilation, size, b in zip(
                self.count, self.strides, self.kernel, self.dilations, self.extent, self.before, strict=True
            )
        )

    def places(self, axis: int) -> np.ndarray:
        """Return where the taps of every window lie along an axis, ``[count, kernel]``, negative before the data."""
        starts = np.arange(self.count[axis]) * self.strides[axis] - self.before[axis]
        return starts[:, None] + np.arange(self.kernel[axis]) * self.dilations[axis]

    def check_data(self) -> None:
        """Check that every window has a tap in the data.

        Raises
        ------
        ValueError
            If one hasn't.
        """
        for axis, size in enumerate(self.extent):
            places = self.places(axis)
            if not ((places >= 0) & (places < size)).any(1).all():
                raise ValueError("a window that lies in the padding only is not supported")


def halves(totals: Iterable[int], more_in_front: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Divide paddings into those in front and those behind; of odd ones the larger part comes as told."""
    small = [(total // 2, total - total // 2) for total in totals]
    front, behind = tuple(a for a, _ in small), tuple(b for _, b in small)
    return (behind, front) if more_in_front else (front, behind)


def pads(node: Node, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the padding in front of and behind ``rank`` axes.

    Raises
    ------
    ValueError
        If there are other than two numbers per axis, or negative ones.
    """
    given = [int(each) for each in node.attributes.get("pads") or [0] * (2 * rank)]
    if len(given) != 2 * rank:
        raise ValueError(f"{len(given)} pads for {rank} spatial dimensions are not supported")
    if min(given, default=0) < 0:
        raise ValueError("negative pads are not supported")
    return tuple(given[:rank]), tuple(given[rank:])


def ints(node: Node, name: str, rank: int) -> tuple[int, ...]:
    """Return an attribute of one number per axis, 1 by default."""
    given = tuple(int(each) for each in node.attributes.get(name) or [1] * rank)
    if len(given) != rank or min(given, default=1) < 1:
        raise ValueError(f"{name} {list(given)} for {rank} spatial dimensions are not supported")
    return given
