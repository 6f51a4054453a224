"""Teach a network to answer as others do, from samples without labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from nnfuze_tvm.training.course import Course, Schedule
from nnfuze_tvm.training.lessons import Remembered, Samples, are_scores, number
from nnfuze_tvm.training.network import Network, torch

Progress = Callable[[int, int, float], None]
"""``(step, steps, loss)``, called after each step."""

# A smaller part of the samples than this is too small to judge by.
_LEAST_HELD = 32


def answers(network: Network, samples: Samples, batch: int = 256) -> list[np.ndarray]:
    """Return a network's outputs for all samples, ``[N, *shape]`` each."""
    count = number(samples)
    parts = []
    with torch.no_grad():
        for start in range(0, count, batch):
            taken = {name: torch.from_numpy(values[start : start + batch]) for name, values in samples.items()}
            parts.append([output.numpy() for output in network(taken)])
    return [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]


def agreement(got: np.ndarray, want: np.ndarray) -> float:
    """Return in percent how far two networks' answers agree.

    Of scores of several classes, ``[N, …, K]``: how often the greatest is the same. Of other answers: how much of what
    they vary by is the same, in root mean square.
    """
    if are_scores(want):
        return 100 * float(np.mean(got.argmax(-1) == want.argmax(-1)))
    spread = float(np.sqrt(np.mean((want - want.mean(0)) ** 2))) or 1.0
    return 100 * max(0.0, 1 - float(np.sqrt(np.mean((got - want) ** 2))) / spread)


def held_back(count: int, part: float = 0.1, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return which of ``count`` samples are learnt from, and which are for judging."""
    order = np.random.default_rng(seed).permutation(count)
    held = min(max(int(part * count), _LEAST_HELD), count // 4)
    return np.sort(order[held:]), np.sort(order[:held])


def distill(
    student: Network,
    samples: Samples,
    wanted: Sequence[np.ndarray],
    schedule: Schedule,
    progress: Progress | None = None,
) -> None:
    """Train a network, in place, to give the answers that are wanted; the same seed gives the same network.

    Parameters
    ----------
    student : Network
        Its outputs are compared with ``wanted`` one by one, each relative to how much it varies; of scores the
        softened probabilities count, too.
    samples : mapping
        What it is shown.
    wanted : sequence of np.ndarray
        ``[N, *shape]`` per output.
    """
    course = Course(student, Remembered(samples, wanted), schedule)
    while course.step < course.steps:
        loss = course.advance()
        if progress is not None:
            progress(course.step, course.steps, loss)
