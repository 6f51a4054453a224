"""How large the numbers of a tensor are, and the range of 8 bits that follows: in constant memory for any samples."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

CalibrationMethod = Literal["minmax", "percentile", "mse", "kl", "average"]
"""How the range of an activation follows from its samples."""
CALIBRATION_METHODS: tuple[CalibrationMethod, ...] = get_args(CalibrationMethod)

# What the percentile method keeps of the absolute values; the rest saturates.
_KEPT = 0.9999
# A bin is what float32 numbers with the same first bits share, 128 to the octave; these are all of finite ones.
_DROPPED_BITS = 16
_BINS = 255 * 128
# A sample whose largest number is so many times that of the one in the middle is no measure for the others.
_OUTLIER = 100.0
# How finely the divergence of two distributions is computed: bins of equal width, and how many limits are skipped.
_LINEAR_BINS, _STRIDE = 2048, 16


class Magnitudes:
    """Absolute values that were seen, sample by sample."""

    def __init__(self) -> None:
        self._peaks: list[float] = []
        # By the octave of the sample's largest number.
        self._counts: dict[int, np.ndarray] = {}

    def add(self, values: np.ndarray) -> int:
        """Add one sample, absolute values; return the octave of the largest."""
        narrow = np.ascontiguousarray(values, "float32")
        self._peaks.append(float(narrow.max()))
        octave = int(np.frexp(self._peaks[-1])[1])
        counts = np.bincount((narrow.view("uint32") >> _DROPPED_BITS).ravel(), minlength=_BINS)
        self._counts[octave] = self._counts.get(octave, 0) + counts
        return octave

    def is_usual(self, octave: int) -> bool:
        """Tell whether samples whose largest number is in an octave are a measure for the others."""
        return octave <= int(np.frexp(_OUTLIER * float(np.median(self._peaks)))[1])

    def counts(self) -> np.ndarray:
        """Return how many numbers each bin has, without those of samples that are no measure."""
        return np.sum([counts for octave, counts in self._counts.items() if self.is_usual(octave)], 0)

    def limit(self, method: CalibrationMethod, levels: int) -> float:
        """Return the absolute value that becomes the largest of so many codes."""
        peak = max(self._peaks)
        if method == "minmax" or peak == 0:
            return peak
        if method == "average":
            return float(np.mean(self._peaks))
        counts = self.counts()
        peak = min(peak, float(_edges()[np.flatnonzero(counts)[-1] + 1]))
        if method == "percentile":
            share = np.cumsum(counts) / counts.sum()
            return min(float(_edges()[np.searchsorted(share, _KEPT) + 1]), peak)
        if method == "kl":
            return _least_divergence(counts, peak, levels)
        candidates = peak * np.linspace(0.2, 1.0, 81)
        return float(min(candidates[::-1], key=lambda limit: _squared_error(counts, limit / levels, levels)))

    def error(self, scale: float, levels: int) -> float:
        """Return the error of 8 bits of a scale on what was seen, a root mean square over what does not saturate."""
        inside = np.where(_centers() <= (levels + 0.5) * scale, self.counts(), 0)
        return float(np.sqrt(_squared_error(inside, scale, levels) / max(int(inside.sum()), 1)))


def _edges() -> np.ndarray:
    """Return the lowest number of each bin, and of the one after the last."""
    edges = (np.arange(_BINS + 1, dtype="uint32") << _DROPPED_BITS).view("float32").astype("float64")
    edges[-1] = np.finfo("float32").max
    return edges


def _centers() -> np.ndarray:
    edges = _edges()
    return (edges[:-1] + edges[1:]) / 2


def _squared_error(counts: np.ndarray, scale: float, levels: int) -> float:
    """Return the sum of the squared errors of codes of a scale."""
    used = np.flatnonzero(counts)
    centers, widths = _centers()[used], np.diff(_edges())[used]
    rounded = (centers - np.clip(np.rint(centers / scale), 0, levels) * scale) ** 2
    # Over a bin as wide as a step, all errors are as likely.
    rounded = np.where((widths > scale / 2) & (centers <= levels * scale), scale**2 / 12, rounded)
    return float(np.sum(counts[used] * rounded))


def _least_divergence(counts: np.ndarray, peak: float, levels: int) -> float:
    """Return the limit with which the distribution of the codes tells most of that of the values.

    That is the least Kullback-Leibler divergence (Migacz, "8-bit Inference with TensorRT", GTC 2017).
    """
    total = np.concatenate([[0.0], np.cumsum(counts)])
    linear = np.linspace(0, peak, _LINEAR_BINS + 1)
    values = np.diff(np.interp(linear, _edges(), total))
    best, least = _LINEAR_BINS, np.inf
    for size in range(levels + 1, _LINEAR_BINS + 1, _STRIDE):
        reference = values[:size].copy()
        code = np.arange(size) * levels // size
        filled = reference > 0
        held = np.bincount(code, reference, levels) / np.maximum(np.bincount(code, filled, levels), 1)
        reference[-1] += values[size:].sum()
        told = np.where(filled, held[code], 0)
        both = (reference > 0) & (told > 0)
        if not both.any():
            continue
        ours, theirs = reference / reference.sum(), told / told.sum()
        # What saturates where nothing was before is told by no code at all.
        divergence = float(np.sum(ours[both] * np.log(ours[both] / theirs[both])))
        divergence += 0.0 if both[-1] or reference[-1] == 0 else np.inf
        if divergence < least:
            best, least = size, divergence
    return float(linear[best])
