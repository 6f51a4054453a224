"""What a student is shown, and what it shall answer: remembered answers, or teachers asked about changed samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from nnfuze_tvm.training.network import Network, torch

Samples = Mapping[str, np.ndarray]
"""By input name ``[N, *shape]``: N samples."""
Given = dict[str, torch.Tensor]
"""The same, as the student takes it."""
Change = Callable[[Given, np.random.Generator], Given]
"""Makes other samples of some, of which there are few."""

# How many answers an output's spread is taken from.
_SEEN = 512


@dataclass(frozen=True)
class Aim:
    """How an output's answers are compared with those that are wanted.

    Attributes
    ----------
    scale : float
        How much they vary: a variance.
    scores : bool
        They are scores of several classes.
    guide : bool
        They are features on the way, which count the less the longer is learnt.
    """

    scale: float
    scores: bool
    guide: bool = False

    @classmethod
    def at(cls, wanted: np.ndarray, *, guide: bool = False) -> Aim:
        """Return the aim of answering as ``[N, *shape]``."""
        return cls(float(wanted.var(0).mean()) or 1.0, not guide and are_scores(wanted), guide)


class Lessons(Protocol):
    """Samples with the answers that are wanted to them."""

    count: int
    aims: Sequence[Aim]

    def __call__(self, own: torch.Tensor, rng: np.random.Generator) -> tuple[Given, list[torch.Tensor]]:
        """Return the samples of these numbers, perhaps changed, and what is to be answered, per aim."""
        ...


class Remembered:
    """Lessons whose answers are known.

    Parameters
    ----------
    samples : mapping
        What is shown.
    wanted : sequence of np.ndarray
        ``[N, *shape]`` per output.
    """

    def __init__(self, samples: Samples, wanted: Sequence[np.ndarray]) -> None:
        self.count = number(samples)
        self.aims: Sequence[Aim] = [Aim.at(values) for values in wanted]
        self._given = {name: torch.from_numpy(values) for name, values in samples.items()}
        self._wanted = [torch.from_numpy(values) for values in wanted]

    def __call__(self, own: torch.Tensor, rng: np.random.Generator) -> tuple[Given, list[torch.Tensor]]:
        """Return the samples of these numbers as they are."""
        return {name: values[own] for name, values in self._given.items()}, [values[own] for values in self._wanted]


class Asked:
    """Lessons whose answers are asked for, sample by sample: each is changed whenever it is shown.

    Parameters
    ----------
    samples : mapping
        What is shown.
    teachers : sequence of (Network, int)
        Who is asked, and how many of the first outputs are answers; those behind are features on the way.
    changes : sequence of callable
        Are applied one after the other.
    dtype : torch.dtype
        What teachers compute in.
    """

    def __init__(
        self,
        samples: Samples,
        teachers: Sequence[tuple[Network, int]],
        changes: Sequence[Change] = (),
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.count = number(samples)
        self._given = {name: torch.from_numpy(values) for name, values in samples.items()}
        self._teachers, self._changes, self._dtype = [teacher for teacher, _ in teachers], changes, dtype
        seen = {name: values[:_SEEN] for name, values in self._given.items()}
        with torch.no_grad():
            self.aims: Sequence[Aim] = [
                Aim.at(values.numpy(), guide=place >= answers)
                for teacher, answers in teachers
                for place, values in enumerate(teacher(seen))
            ]

    def __call__(self, own: torch.Tensor, rng: np.random.Generator) -> tuple[Given, list[torch.Tensor]]:
        """Return the samples of these numbers, changed, and what the teachers answer, one teacher after the other."""
        given = {name: values[own] for name, values in self._given.items()}
        for change in self._changes:
            given = change(given, rng)
        with torch.no_grad():
            return given, [output for teacher in self._teachers for output in teacher(given, self._dtype)]


def number(samples: Samples) -> int:
    """Return how many samples there are."""
    return len(next(iter(samples.values())))


def are_scores(values: np.ndarray) -> bool:
    """Tell whether a sample's answer is one row of scores."""
    return values.shape[-1] > 1 and values[0].size == values.shape[-1]


def mixed(given: Given, rng: np.random.Generator) -> Given:
    """Lay another sample over every second one, stronger or weaker (Zhang et al., 2018); integers stay as they are."""
    count = len(next(iter(given.values())))
    part = torch.from_numpy(np.where(rng.random(count) < 0.5, rng.random(count), 1.0).astype("float32"))
    others = torch.from_numpy(rng.permutation(count))

    def over(values: torch.Tensor) -> torch.Tensor:
        if not values.is_floating_point():
            return values
        own = part.to(values.dtype).reshape(-1, *[1] * (values.ndim - 1))
        return own * values + (1 - own) * values[others]

    return {name: over(values) for name, values in given.items()}


def shifted(most: int, axis: int) -> Change:
    """Return what moves samples by up to ``most`` places along an axis of theirs; their rims are repeated."""

    def change(given: Given, rng: np.random.Generator) -> Given:
        count = len(next(iter(given.values())))
        by = torch.from_numpy(rng.integers(-most, most + 1, count))

        def moved(values: torch.Tensor) -> torch.Tensor:
            if values.ndim <= axis + 1:
                return values
            places = (torch.arange(values.shape[axis + 1]) - by[:, None]).clamp(0, values.shape[axis + 1] - 1)
            wide = places.reshape(count, *[1] * axis, -1, *[1] * (values.ndim - axis - 2))
            return torch.take_along_dim(values, wide, axis + 1)

        return {name: moved(values) for name, values in given.items()}

    return change
