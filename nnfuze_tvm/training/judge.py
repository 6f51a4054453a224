"""How well networks answer as their originals do, and how much of that they may lose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from nnfuze_tvm.training.distill import agreement, answers
from nnfuze_tvm.training.lessons import Samples
from nnfuze_tvm.training.network import Network


@dataclass(frozen=True)
class Score:
    """How well a task is answered.

    Attributes
    ----------
    agreement : float
        With the original's answers, in percent; of several outputs that of the worst.
    accuracy : float, optional
        Of the labelled samples, in percent.
    """

    agreement: float
    accuracy: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """Samples ``[N, *shape]`` by input, and by task the class ``[N]`` of each, -1 where there is none."""

    samples: Samples = field(default_factory=dict)
    labels: Mapping[str, np.ndarray] = field(default_factory=dict)


class Judge:
    """Compares tasks with their originals.

    Parameters
    ----------
    originals : mapping of str to Network
        By task.
    held : mapping
        Samples that nothing is learnt from: agreement is that on these.
    evaluation : Evaluation
        Accuracy is that on this.

    Attributes
    ----------
    originals : dict of str to Score
        What the originals get.
    """

    def __init__(self, originals: Mapping[str, Network], held: Samples, evaluation: Evaluation) -> None:
        self._held, self._evaluation = held, evaluation
        self._right = {task: answers(network, held) for task, network in originals.items()}
        self.originals = {}
        for task, network in originals.items():
            found = answers(network, evaluation.samples)[0] if task in evaluation.labels else None
            self.originals[task] = Score(100.0, None if found is None else self._accuracy(task, found))

    def __call__(self, network: Network, owners: Sequence[str | None]) -> dict[str, Score]:
        """Return the score of each task whose outputs a network has; ``owners`` says whose they are, if anybody's."""
        tasks = list(dict.fromkeys(filter(None, owners)))
        labelled = [task for task in tasks if task in self._evaluation.labels]
        found = answers(network, self._held)
        shown = answers(network, self._evaluation.samples) if labelled else []
        scores = {}
        for task in tasks:
            own = [values for values, owner in zip(found, owners, strict=True) if owner == task]
            agreed = min(agreement(*pair) for pair in zip(own, self._right[task], strict=True))
            accuracy = self._accuracy(task, shown[list(owners).index(task)]) if task in labelled else None
            scores[task] = Score(agreed, accuracy)
        return scores

    def lost(self, scores: Mapping[str, Score]) -> dict[str, float]:
        """Return by task the points that are lost: of accuracy where there are labels, else of agreement."""
        lost = {}
        for task, score in scores.items():
            original = self.originals[task]
            if score.accuracy is not None and original.accuracy is not None:
                lost[task] = original.accuracy - score.accuracy
            else:
                lost[task] = original.agreement - score.agreement
        return lost

    def _accuracy(self, task: str, scores: np.ndarray) -> float:
        """Return the part of the labelled samples whose largest score, of their first output, is their class's."""
        labels = self._evaluation.labels[task]
        best = scores.reshape(len(labels), -1).argmax(1)
        return 100 * float(np.mean(best[labels >= 0] == labels[labels >= 0]))
