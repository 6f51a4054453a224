"""Teach a network to answer as others do, from samples without labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from nnfuze_tvm.training.network import Network, torch

Samples = Mapping[str, np.ndarray]
"""By input name ``[N, *shape]``: N samples."""
Progress = Callable[[int, int, float], None]
"""``(step, steps, loss)``, called after each step."""

# Hinton, Vinyals, Dean (2015): what a network thinks of wrong classes shows when its scores are softened.
_TEMPERATURE = 2.0
# What the scores themselves weigh beside that.
_EXACT = 0.1
# A smaller part of the samples than this is too small to judge by.
_LEAST_HELD = 32


@dataclass(frozen=True)
class Schedule:
    """How long and how fast is learnt.

    Attributes
    ----------
    epochs : int
        How often each sample is seen, if that makes enough steps.
    least : int
        How many steps there are at least: few samples are seen more often.
    batch : int
        Samples of a step.
    rate : float
        Adam's learning rate at the beginning; it falls to zero along a cosine.
    seed : int
        Of the order of the samples.
    """

    epochs: int = 5
    least: int = 300
    batch: int = 64
    rate: float = 2e-3
    seed: int = 0


def answers(network: Network, samples: Samples, batch: int = 256) -> list[np.ndarray]:
    """Return a network's outputs for all samples, ``[N, *shape]`` each."""
    count = len(next(iter(samples.values())))
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
    if _are_scores(want):
        return 100 * float(np.mean(got.argmax(-1) == want.argmax(-1)))
    spread = float(np.sqrt(np.mean((want - want.mean(0)) ** 2))) or 1.0
    return 100 * max(0.0, 1 - float(np.sqrt(np.mean((got - want) ** 2))) / spread)


def _are_scores(values: np.ndarray) -> bool:
    """Tell whether a sample's answer is one row of scores."""
    return values.shape[-1] > 1 and values[0].size == values.shape[-1]


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
    count = len(next(iter(samples.values())))
    given = {name: torch.from_numpy(values) for name, values in samples.items()}
    targets = [torch.from_numpy(values) for values in wanted]
    scales = [float(values.var(0).mean()) or 1.0 for values in wanted]
    scores = [_are_scores(values) for values in wanted]
    batch = min(schedule.batch, count)
    steps = max(schedule.least, schedule.epochs * (count // batch))
    optimizer = torch.optim.Adam(student.parameters(), lr=schedule.rate)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    rng = np.random.default_rng(schedule.seed)
    order = np.empty(0, "int64")
    for step in range(steps):
        if len(order) < batch:
            order = np.concatenate([order, rng.permutation(count)])
        own, order = torch.from_numpy(order[:batch]), order[batch:]
        got = student({name: values[own] for name, values in given.items()})
        loss = sum(
            _distance(each, target[own], scale, soft)
            for each, target, scale, soft in zip(got, targets, scales, scores, strict=True)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        falling.step()
        if progress is not None:
            progress(step + 1, steps, float(loss.detach()))


def _distance(got: torch.Tensor, want: torch.Tensor, scale: float, scores: bool) -> torch.Tensor:
    exact = torch.nn.functional.mse_loss(got, want) / scale
    if not scores:
        return exact
    log = torch.nn.functional.log_softmax
    soft = torch.nn.functional.kl_div(
        log(got / _TEMPERATURE, -1), log(want / _TEMPERATURE, -1), reduction="batchmean", log_target=True
    )
    return _TEMPERATURE**2 * soft + _EXACT * exact
