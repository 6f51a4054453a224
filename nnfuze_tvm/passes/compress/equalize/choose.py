"""Which factors the channels get: those with which 8 bits lose least, by what samples say of values and weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from nnfuze_tvm.graph.channels import FIXED

_LEVELS = 127
# How far a channel's factor follows the range of its values, and that of the weights that read it. Half and half is
# what SmoothQuant starts from (Xiao et al., "SmoothQuant", ICML 2023); where the weights have a scale per channel,
# as those of depthwise convolutions, all of it costs nothing.
_EXPONENTS = (0.0, 0.25, 0.5, 0.75, 1.0)
# Channels differ at most so much.
_LARGEST_SPREAD = 1e6
# Channels of a layer's result are taken to reach this part of what they vary by, compared with the others: what is
# almost never on, and was not on the samples, may be on later.
_ALMOST_OFF = 0.1
# The largest of ten thousand normally distributed numbers is about so many standard deviations: of a channel of which
# few values were seen, others may be as large.
_DEVIATIONS = 4.3
# Of a channel of which so many values were seen, half counts of what these say of it: the others may be as large as
# those of the largest channel.
_HALF_KNOWN = 16
# Factors must make the loss so many times smaller. It is what samples say, and with ranges that fit these more tightly,
# others are beyond them more often: below this, dense layers of a few dozen samples became less exact, not more.
_WORTH_IT = 4.0


@dataclass(frozen=True)
class Seen:
    """What was seen of a tensor's channels.

    Attributes
    ----------
    labels : np.ndarray
        The class of each channel's factor, `FIXED` for none.
    peaks, powers, means : np.ndarray
        Largest absolute value, mean square and mean of each.
    count : int
        How many values of each channel were seen.
    """

    labels: np.ndarray
    peaks: np.ndarray
    powers: np.ndarray
    means: np.ndarray
    count: int

    @property
    def reach(self) -> np.ndarray:
        """How large the values of each channel are to be expected; of one that is off, nothing is known: 0."""
        deviations = np.sqrt(np.maximum(self.powers - self.means**2, 0))
        seen = np.maximum(self.peaks, np.abs(self.means) + _DEVIATIONS * deviations)
        top = max(float(seen.max(initial=0)), 1e-30)
        known = self.count / (self.count + _HALF_KNOWN)
        return np.where(seen * _LARGEST_SPREAD < top, 0, top * (seen / top) ** known)


@dataclass(frozen=True)
class Reader:
    """A layer that multiplies 8 bits.

    Attributes
    ----------
    data : Seen
        What it reads.
    group : int
        Which tensors share its data's scale.
    squares, largest : np.ndarray
        Of its weights, ``[groups, outputs, inputs]``: the sum over the kernel of the squares, and the largest
        absolute value, both of rows brought to the same largest weight.
    taps : int
        Weights in a kernel.
    """

    data: Seen
    group: int
    squares: np.ndarray
    largest: np.ndarray
    taps: int


@dataclass(frozen=True)
class Writer:
    """A layer that makes a tensor with factors: its labels, and about how much each channel varies before its bias."""

    labels: np.ndarray
    deviations: np.ndarray


def reader_of(weight: np.ndarray, data: Seen, group: int) -> Reader:
    """Return a reader with weights ``[groups, outputs, inputs, *kernel]``."""
    flat = np.abs(weight.reshape(*weight.shape[:3], -1).astype("float64"))
    flat = flat / np.maximum(flat.max((2, 3), keepdims=True), 1e-30)
    return Reader(data, group, np.square(flat).sum(3), flat.max(3), flat.shape[3])


class Choice:
    """Chooses the factors of the classes that occur together.

    Parameters
    ----------
    groups : sequence of sequence of Seen
        The tensors that become 8 bits; those of a group share a scale.
    readers : sequence of Reader
        The layers that read them.
    writers : sequence of Writer
        The layers that make what has factors.
    """

    def __init__(self, groups: Sequence[Sequence[Seen]], readers: Sequence[Reader], writers: Sequence[Writer]) -> None:
        self.groups, self.readers, self.writers = groups, readers, writers

    def factors(self, count: int) -> np.ndarray:
        """Return the factor of each of ``count`` classes."""
        result = np.ones(count)
        for part in self._parts(count):
            groups = [n for n, group in enumerate(self.groups) if any(part[seen.labels].any() for seen in group)]
            readers = [reader for reader in self.readers if reader.group in groups]
            if not readers:
                continue
            ranges, weights = self._wanted(part, groups, readers)
            plain = self._loss(result, groups, readers)
            best, least = result, plain
            for a, b in product(_EXPONENTS, _EXPONENTS):
                if a == b == 0:
                    continue
                own = result.copy()
                own[part] = ranges[part] ** -a * weights[part] ** b
                own[part] /= np.max(ranges[part] * own[part])
                loss = self._loss(own, groups, readers)
                if loss < least:
                    best, least = own, loss
            if least * _WORTH_IT < plain:
                result = best
        return result

    def _parts(self, count: int) -> Iterable[np.ndarray]:
        """Return the classes that occur together, a mask each."""
        parent = np.arange(count)

        def find(label: int) -> int:
            while parent[label] != label:
                label = parent[label]
            return label

        sets = [np.concatenate([seen.labels for seen in group]) for group in self.groups if group]
        for labels in [*sets, *(reader.data.labels for reader in self.readers)]:
            own = sorted({find(label) for label in labels.tolist() if label != FIXED})
            for other in own[1:]:
                parent[other] = own[0]
        roots = np.array([find(label) for label in range(count)], "int64")
        used = np.unique(np.concatenate([np.zeros(0, "int64"), *sets]))
        for root in np.unique(roots[used[used != FIXED]]):
            yield roots == root

    def _wanted(
        self, part: np.ndarray, groups: Sequence[int], readers: Sequence[Reader]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return how large the values of each class are, and the weights that read it, as parts of the largest."""
        values, weights = np.zeros(len(part)), np.zeros(len(part))
        tensors = [seen for n in groups for seen in self.groups[n]] + [reader.data for reader in readers]
        for seen in tensors:
            _raise(values, seen.labels, seen.reach)
        for writer in self.writers:
            _raise(values, writer.labels, writer.deviations, _ALMOST_OFF)
        for reader in readers:
            _raise(weights, reader.data.labels, reader.largest.max(1).ravel())
        known = [np.where(each == 0, 1, np.maximum(each, 1 / _LARGEST_SPREAD)) for each in (values, weights)]
        return known[0], known[1]

    def _loss(self, factors: np.ndarray, groups: Sequence[int], readers: Sequence[Reader]) -> float:
        """Return the power of the errors of 8-bit tensors and of what their readers make, as parts of their own."""
        scales = {
            n: max(float(np.max(seen.reach * factors[seen.labels], initial=0)) for seen in self.groups[n]) / _LEVELS
            for n in groups
        }
        total = 0.0
        for n in groups:
            for seen in self.groups[n]:
                whole = max(float(seen.powers.sum()), 1e-30)
                total += scales[n] ** 2 * float(np.sum(factors[seen.labels] ** -2.0)) / whole
        for reader in readers:
            count, _, inputs = reader.squares.shape
            own = factors[reader.data.labels].reshape(count, 1, inputs)
            power = reader.data.powers.reshape(count, 1, inputs)
            results = (reader.squares * power).sum(2)
            of_values = scales[reader.group] ** 2 * (reader.squares / own**2).sum(2)
            steps = (reader.largest / own).max(2) / _LEVELS
            of_weights = steps**2 * reader.taps * (own**2 * power).sum(2)
            floor = max(float(results.mean()) * 1e-3, 1e-30)
            total += float(np.mean((of_values + of_weights) / np.maximum(results, floor)))
        return total


def _raise(least: np.ndarray, labels: np.ndarray, values: np.ndarray, share: float = 1.0) -> None:
    """Make what is known of each class at least a share of what one tensor says, as parts of the tensor's largest."""
    np.maximum.at(least, labels, share * values / max(float(values.max(initial=0)), 1e-30))
