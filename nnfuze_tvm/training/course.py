"""A training in steps, which can be put aside at any of them and gone on with: the result is the same, bit by bit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nnfuze_tvm.training.lessons import Aim, Lessons
from nnfuze_tvm.training.network import Network, torch

# Of Adam: how long it remembers gradients and their squares, and what keeps it from dividing by zero.
_DECAYS, _TINY = (0.9, 0.999), 1e-8
# Hinton, Vinyals, Dean (2015): what a network thinks of wrong classes shows when its scores are softened.
_TEMPERATURE = 2.0
# What the scores themselves weigh beside that.
_EXACT = 0.1


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
        Of the order of the samples, and of what is changed in them.
    """

    epochs: int = 5
    least: int = 300
    batch: int = 64
    rate: float = 2e-3
    seed: int = 0


class Course:
    """A student that learns from lessons, in place; the same seed gives the same student.

    Parameters
    ----------
    student : Network
        Its outputs are compared with what is wanted one by one, each relative to how much it varies; of scores the
        softened probabilities count, too.
    lessons : Lessons
        What it is shown.
    schedule : Schedule
        How long and how fast.
    dtype : torch.dtype
        What the student computes in while it learns.

    Attributes
    ----------
    step, steps : int
        How many steps were made, and how many there are.
    """

    def __init__(
        self, student: Network, lessons: Lessons, schedule: Schedule, dtype: torch.dtype = torch.float32
    ) -> None:
        self.student, self._lessons, self._dtype = student, lessons, dtype
        self._batch = min(schedule.batch, lessons.count)
        self.step, self.steps = 0, max(schedule.least, schedule.epochs * (lessons.count // self._batch))
        self._rate = schedule.rate
        self._optimizer = _Adam(list(student.parameters()))
        self._rng = np.random.default_rng(schedule.seed)
        self._order = np.empty(0, "int64")

    def advance(self) -> float:
        """Make a step and return its loss."""
        left = 0.5 * (1 + math.cos(math.pi * self.step / self.steps))
        if len(self._order) < self._batch:
            self._order = np.concatenate([self._order, self._rng.permutation(self._lessons.count)])
        own, self._order = torch.from_numpy(self._order[: self._batch]), self._order[self._batch :]
        given, wanted = self._lessons(own, self._rng)
        found = self.student(given, self._dtype)
        loss = sum(
            (left if aim.guide else 1.0) * _distance(got, want, aim)
            for got, want, aim in zip(found, wanted, self._lessons.aims, strict=True)
        )
        self.student.zero_grad()
        loss.backward()
        self._optimizer.step(self._rate * left)
        self.step += 1
        return float(loss.detach())

    def state(self) -> dict[str, Any]:
        """Return what `restore` goes on from: tensors and plain values."""
        return {
            "step": self.step,
            "student": self.student.state_dict(),
            "optimizer": self._optimizer.moments,
            "random": self._rng.bit_generator.state,
            "order": torch.from_numpy(self._order.copy()),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from where a course of the same student, lessons and schedule was."""
        self.step = state["step"]
        self.student.load_state_dict(state["student"])
        self._optimizer.moments = state["optimizer"]
        self._rng.bit_generator.state = state["random"]
        self._order = state["order"].numpy()


class _Adam:
    """Kingma and Ba's optimizer (2015). PyTorch's own takes seconds to import."""

    def __init__(self, parameters: Sequence[torch.Tensor]) -> None:
        self._parameters = parameters
        self.moments: dict[str, Any] = {
            "count": 0,
            "first": [torch.zeros_like(each) for each in parameters],
            "second": [torch.zeros_like(each) for each in parameters],
        }

    def step(self, rate: float) -> None:
        self.moments["count"] += 1
        first, second = (1 - decay ** self.moments["count"] for decay in _DECAYS)
        with torch.no_grad():
            for each, mean, square in zip(self._parameters, self.moments["first"], self.moments["second"], strict=True):
                if each.grad is None:
                    continue
                mean.lerp_(each.grad, 1 - _DECAYS[0])
                square.lerp_(each.grad.square(), 1 - _DECAYS[1])
                each.addcdiv_(mean, (square / second).sqrt_().add_(_TINY), value=-rate / first)


def _distance(got: torch.Tensor, want: torch.Tensor, aim: Aim) -> torch.Tensor:
    exact = torch.nn.functional.mse_loss(got, want) / aim.scale
    if not aim.scores:
        return exact
    log = torch.nn.functional.log_softmax
    soft = torch.nn.functional.kl_div(
        log(got / _TEMPERATURE, -1), log(want / _TEMPERATURE, -1), reduction="batchmean", log_target=True
    )
    return _TEMPERATURE**2 * soft + _EXACT * exact
