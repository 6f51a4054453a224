"""Training, with a slimming step that leaves a quarter of every group of channels nearly unused."""

from __future__ import annotations

import time

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from groups import GROUPS, weakest
from networks import FEATURES, ConvNorm, Trunk
from synthesize import KEYWORD_LABELS, NO_SPEAKER, SPEAKERS, STEPS_PER_UNIT, progress

CLASSES = {"keyword": len(KEYWORD_LABELS), "speaker": len(SPEAKERS)}
BATCH = 128
PEAK_RATE = 3e-3
WEIGHT_DECAY = 0.02
GAMMA_PENALTY = 2e-4

# From FADE_START to FADE_END of the steps the weakest channels fade to FLOOR of their strength; the rest of the
# training recovers from it. The floor is not zero: a network whose channels are exactly zero is an odd test for
# whoever computes quantization scales.
FADE_FRACTION = 0.25
FADE_START, FADE_END = 0.35, 0.65
FLOOR = 0.01

Labels = dict[str, torch.Tensor]


def to_input(audio: np.ndarray) -> torch.Tensor:
    """Turn int8 features [batch, frames, bands] into the network's float32 input."""
    return torch.from_numpy(audio).float().div_(STEPS_PER_UNIT).unsqueeze(1).to(memory_format=torch.channels_last)


class Fading:
    """Holds the weakest channels of every group, and everything that reads them, at a given strength."""

    def __init__(self, trunk: Trunk, heads: nn.ModuleDict) -> None:
        self.held: list[tuple[torch.Tensor, int, torch.Tensor, torch.Tensor]] = []
        for group in GROUPS.values():
            producers = [trunk.get_submodule(name) for name in group.producers]
            chosen = torch.from_numpy(weakest([p.folded_weight().numpy() for p in producers], FADE_FRACTION))
            for producer in producers:
                self._hold(producer.norm.weight, 0, chosen)
                self._hold(producer.norm.bias, 0, chosen)
            for name in group.consumers:
                readers = heads.values() if name == "head" else [trunk.get_submodule(name).conv]
                for reader in readers:
                    self._hold(reader.weight, 1, chosen)

    def _hold(self, parameter: torch.Tensor, dimension: int, chosen: torch.Tensor) -> None:
        before = parameter.detach().index_select(dimension, chosen)
        self.held.append((parameter, dimension, chosen, before))

    @torch.no_grad()
    def apply(self, strength: float) -> None:
        """Set the held channels to `strength` times what they were when they were chosen."""
        for parameter, dimension, chosen, before in self.held:
            parameter.index_copy_(dimension, chosen, before * strength)


def train(
    name: str, tasks: tuple[str, ...], audio: np.ndarray, labels: Labels, epochs: int, seed: int
) -> tuple[Trunk, nn.ModuleDict]:
    """Train one trunk with a head for every task.

    Parameters
    ----------
    name : str
        What the progress line calls it.
    tasks : tuple of str
        "keyword", "speaker" or both.
    audio : numpy.ndarray
        int8 features of the training clips.
    labels : dict
        int64 labels per task; negative labels do not count.
    epochs, seed : int
        How long, and from where.
    """
    torch.manual_seed(seed)
    trunk = Trunk().to(memory_format=torch.channels_last)
    heads = nn.ModuleDict({task: nn.Linear(FEATURES, CLASSES[task]) for task in tasks})
    gammas = [module.norm.weight for module in trunk.modules() if isinstance(module, ConvNorm)]
    parameters = [*trunk.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
            {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
        ]
    )
    steps = epochs * (len(audio) // BATCH)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, total_steps=steps, pct_start=0.15)
    fading: Fading | None = None
    start, step, smooth = time.monotonic(), 0, 0.0
    for epoch in range(epochs):
        order = torch.randperm(len(audio))
        for batch in order[: len(audio) // BATCH * BATCH].split(BATCH):
            hidden = trunk(to_input(audio[batch.numpy()]))
            loss = GAMMA_PENALTY * sum(gamma.abs().sum() for gamma in gammas)
            for task, head in heads.items():
                loss = loss + functional.cross_entropy(head(hidden), labels[task][batch], ignore_index=NO_SPEAKER)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rates.step()
            step += 1
            if step >= FADE_START * steps:
                fading = fading or Fading(trunk, heads)
                faded = min(1.0, (step / steps - FADE_START) / (FADE_END - FADE_START))
                fading.apply(FLOOR**faded)
            smooth += (loss.item() - smooth) / min(step, 50)
            if step % 10 == 0:
                spent = time.monotonic() - start
                left = spent / step * (steps - step)
                progress(f"{name}: epoch {epoch + 1}/{epochs}, loss {smooth:.3f}, {spent:.0f} s, {left:.0f} s left")
    progress(f"{name}: trained in {time.monotonic() - start:.0f} s, loss {smooth:.3f}", last=True)
    return trunk.eval(), heads.eval()


def train_heads(trunk: nn.Module, heads: nn.ModuleDict, audio: np.ndarray, labels: Labels, seed: int) -> None:
    """Train the heads further on a frozen trunk, in place.

    Parameters
    ----------
    trunk : torch.nn.Module
        The frozen trunk, folded as it will be exported.
    heads : torch.nn.ModuleDict
        The heads of the joint training.
    audio : numpy.ndarray
        int8 features of the training clips.
    labels : dict
        int64 labels per task.
    seed : int
        Seed of the order of the clips.
    """
    torch.manual_seed(seed)
    with torch.no_grad():
        hidden = torch.cat([trunk(to_input(part)) for part in np.array_split(audio, len(audio) // BATCH)])
    for task, head in heads.items():
        optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3, weight_decay=WEIGHT_DECAY)
        for _ in range(10):
            for batch in torch.randperm(len(hidden)).split(BATCH):
                loss = functional.cross_entropy(head(hidden[batch]), labels[task][batch], ignore_index=NO_SPEAKER)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        progress(f"head of {task} on the frozen trunk: loss {loss.item():.3f}", last=True)
