"""How many channels each group keeps, so that the network is within a budget and loses the least."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from nnfuze_tvm.errors import InputError
from nnfuze_tvm.graph import ops
from nnfuze_tvm.graph.channels import CoupledLayer
from nnfuze_tvm.passes.compress.prune.channel_groups import ChannelGroup, CoupledFunction

# A group shrinks by this part of it at a time.
_STEP = 1 / 32


@dataclass(frozen=True)
class Budget:
    """What of a network may be left; None is no limit.

    Attributes
    ----------
    macs : float, optional
        Of its multiply-accumulates.
    bytes : float, optional
        Of the bytes of its layers' weights in float32.
    """

    macs: float | None = None
    bytes: float | None = None


class _Cost:
    """What the layers of a function cost, by how many channels of each group there are."""

    def __init__(self, coupling: CoupledFunction, groups: Sequence[ChannelGroup], bits: Callable[[str], int]) -> None:
        self.roots = coupling.channels.roots()
        number = np.full(len(self.roots), len(groups))
        for n, group in enumerate(groups):
            number[group.classes] = n
        self.members = number[self.roots]
        self.sizes = np.array([*(len(group.classes) for group in groups), 1])
        self.macs, self.bytes = list[float](), list[float]()
        self.sides: list[tuple[np.ndarray, np.ndarray]] = []
        whole = [0.0, 0.0]
        for binding in coupling.bindings:
            layer, macs = coupling.layers.get(binding.var), ops.macs(binding.value)
            whole[0] += macs
            if layer is None:
                # What is no layer with channels costs what it did.
                self._add(macs, 0, None, len(groups))
                continue
            whole[1] += 4 * layer.weight.size
            self._add(macs, layer.weight.size * bits(layer.name) / 8, layer, len(groups))
        self.whole = np.array(whole)

    def _add(self, macs: float, size: float, layer: CoupledLayer | None, groups: int) -> None:
        self.macs.append(macs)
        self.bytes.append(size)
        one = np.bincount([groups], minlength=groups + 1)
        # Of a depthwise layer the inputs are the outputs, and count once.
        labels = [] if layer is None else [layer.outputs, *([layer.inputs] if layer.has_own_channels else [])]
        counts = [np.bincount(self.members[each], minlength=groups + 1) for each in labels]
        self.sides.append((counts[0] if counts else one, counts[1] if len(counts) > 1 else one))

    def left(self, counts: np.ndarray) -> np.ndarray:
        """Return the parts of multiply-accumulates and bytes that are left."""
        share = np.array([*counts, 1]) / self.sizes
        factors = np.array([(a @ share) * (b @ share) / (a.sum() * b.sum()) for a, b in self.sides])
        return np.array([factors @ self.macs, factors @ self.bytes]) / np.maximum(self.whole, 1)


def within(
    budget: Budget,
    coupling: CoupledFunction,
    groups: Sequence[ChannelGroup],
    errors: Sequence[np.ndarray],
    most: Sequence[int],
    is_free: Sequence[bool],
    bits: Callable[[str], int],
) -> list[int]:
    """Return how many channels each group keeps.

    Again and again that group shrinks a bit which loses least for what that saves.

    Parameters
    ----------
    budget : Budget
        What may be left.
    coupling : CoupledFunction
        The function.
    groups : sequence of ChannelGroup
        Its groups of channels.
    errors : sequence of numpy.ndarray
        Of each group: what is lost when 0, 1, … of its channels have gone, see `elimination.Elimination`.
    most : sequence of int
        How many channels each group keeps at most.
    is_free : sequence of bool
        Whether it may keep fewer.
    bits : callable
        From a layer's name to the bits of its weights.

    Raises
    ------
    InputError
        If the budget can't be met.
    """
    cost, counts = _Cost(coupling, groups, bits), np.array(most, "int64")
    limits = np.array([np.inf if each is None else each for each in (budget.macs, budget.bytes)])
    sizes = cost.sizes[:-1]
    now = cost.left(counts)
    while (over := now > limits).any():
        best, fewest = None, np.inf
        for n in np.flatnonzero((counts > 1) & np.array(is_free, bool)).tolist():
            fewer = counts.copy()
            fewer[n] = max(1, counts[n] - max(1, round(_STEP * sizes[n])))
            then = cost.left(fewer)
            saved = float(((now - then) / limits)[over].sum())
            lost = float(errors[n][sizes[n] - fewer[n]] - errors[n][sizes[n] - counts[n]])
            if saved > 0 and lost / saved < fewest:
                best, fewest = (fewer, then), lost / saved
        if best is None:
            which = int(np.flatnonzero(over)[0])
            name = ("macs", "bytes")[which]
            raise InputError(
                f"--{name} {limits[which]:g}: with one channel of each group that may shrink, {now[which]:.3g} of its "
                f"{name} are left"
            )
        counts, now = best
    return [int(count) for count in counts]
