"""Inputs for networks that people ship: what sounds, looks or counts enough like the real thing to judge answers on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

Make: TypeAlias = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]


@dataclass(frozen=True)
class Given:
    """One input of a network.

    Attributes
    ----------
    shape : tuple of int
        Its shape, whole: also what the file leaves open.
    make : callable
        Makes one sample of that shape.
    """

    shape: tuple[int, ...]
    make: Make

    def sample(self, rng: np.random.Generator) -> np.ndarray:
        """Return one sample."""
        return self.make(rng, self.shape)


def normal(std: float = 1.0, mean: float = 0.0) -> Make:
    """Return a maker of float32 noise, each sample as loud as it happens to be: features, embeddings, states."""

    def make(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        return (mean + std * rng.uniform(0.5, 1.5) * rng.standard_normal(shape)).astype(np.float32)

    return make


def spectrogram(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Return float32 logarithms of a spectrum, ``[1, bands, frames]``, about -1 to 1.5: silence, then some speech."""
    bands, frames = shape[1:]
    start, syllables = rng.integers(0, frames), np.sin(np.arange(frames) / rng.uniform(3, 12))
    tones = np.sin(np.arange(bands) / rng.uniform(2, 6) + rng.uniform(0, 6))[:, None]
    loud = rng.uniform(0.3, 1.2) * tones * syllables + 0.3 * rng.standard_normal((bands, frames))
    return np.where(np.arange(frames) < start, -1.0, np.clip(loud, -1, 1.5)).reshape(shape).astype(np.float32)


def magnitudes(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Return float32 magnitudes of a spectrum, ``[..., bins]``: not negative, more in the low bins."""
    slope = np.geomspace(10.0, 0.1, shape[-1])
    return (np.abs(rng.standard_normal(shape)) * slope * rng.uniform(0.05, 1.0)).astype(np.float32)


def audio(peak: float = 0.5) -> Make:
    """Return a maker of sound, ``[..., samples]`` at 16 kHz: overtones of a gliding voice, and noise.

    Parameters
    ----------
    peak : float
        The loudest samples are about this high; others are softer.
    """

    def make(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        time = np.arange(int(np.prod(shape))) / 16000
        pitch = rng.uniform(80, 400) * (1 + 0.1 * np.sin(2 * np.pi * rng.uniform(1, 5) * time))
        phase = 2 * np.pi * np.cumsum(pitch) / 16000
        voice = sum(np.sin(k * phase + rng.uniform(0, 6)) / k for k in range(1, 12))
        sound = voice * rng.uniform(0, 0.4) + rng.standard_normal(time.size) * rng.uniform(0, 0.2)
        return (peak * np.clip(sound, -1, 1)).reshape(shape).astype(np.float32)

    return make


def image(low: float, high: float, channels_last: bool = False) -> Make:
    """Return a maker of float32 pictures of soft blobs between two values, ``[N, C, H, W]`` or ``[N, H, W, C]``."""

    def make(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        planes = np.moveaxis(np.empty(shape), -1, 1).shape if channels_last else shape
        height, width = planes[2:]
        coarse = rng.uniform(-0.2, 1.2, (*planes[:2], height // 16 + 2, width // 16 + 2))
        rows, columns = np.arange(height) / 16, np.arange(width) / 16
        top, left = rows.astype(int), columns.astype(int)
        down, right = (rows - top)[:, None], columns - left
        upper, lower = coarse[:, :, top], coarse[:, :, top + 1]
        blobs = (upper[..., left] * (1 - right) + upper[..., left + 1] * right) * (1 - down)
        blobs += (lower[..., left] * (1 - right) + lower[..., left + 1] * right) * down
        picture = np.clip(blobs + 0.05 * rng.standard_normal(planes), 0, 1) * (high - low) + low
        return np.ascontiguousarray(np.moveaxis(picture, 1, -1) if channels_last else picture, np.float32)

    return make


def page(low: float, high: float) -> Make:
    """Return a maker of float32 pages ``[N, C, H, W]``: rows of dark marks as large as letters on a light ground."""

    def make(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        scale, (height, width) = int(rng.integers(2, 5)), shape[2:]
        rows, columns = np.divmod(np.arange(height) // scale, 11), np.divmod(np.arange(width) // scale, 6)
        letters = rng.random((rows[0].max() + 1, columns[0].max() + 1, 7, 5)) < 0.6
        letters &= rng.random(letters.shape[:2])[..., None, None] < 0.8
        inked = letters[rows[0][:, None], columns[0], np.minimum(rows[1], 6)[:, None], np.minimum(columns[1], 4)]
        inked = inked & (rows[1] < 7)[:, None] & (columns[1] < 5)
        picture = np.where(inked, 0.1, 0.9) + 0.02 * rng.standard_normal(shape)
        return (np.clip(picture, 0, 1) * (high - low) + low).astype(np.float32)

    return make


def integers(below: int, dtype: str = "int64") -> Make:
    """Return a maker of numbers from 0 on: bytes, indices of words; also where a file has them as floats."""

    def make(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        return rng.integers(0, below, shape).astype(dtype)

    return make


def always(value: float, dtype: str = "float32") -> Make:
    """Return a maker of one and the same value: sample rates, masks."""
    return lambda rng, shape: np.full(shape, value, dtype)
