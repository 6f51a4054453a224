"""The record that all views of a report are made from."""

from __future__ import annotations

import math
from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Record(BaseModel):
    """Fields that are known, and no others."""

    model_config = ConfigDict(extra="forbid")


class TaskQuality(Record):
    """How well a stage answers one task's output; see `measure.Quality`."""

    accuracy: float | None = None
    labelled: int = 0
    agreement: float | None = None
    error: float | None = None


class Stage(Record):
    """One stage of the compilation, or a reference beside it. What wasn't measured is None.

    Attributes
    ----------
    name : str
        ``separate``, ``merged``, ``pruned``, ``int8``, ``tuned``, or the reference's name.
    reference : bool
        Whether this is another runtime, not a stage.
    latency, latency_p95 : float
        Seconds for one inference of all tasks.
    macs, parameters : int
        Multiply-accumulates of one inference, elements of all constants.
    parameter_bytes, bytes : int
        Bytes of the constants, bytes on disk.
    weight_memory : int
        Bytes of the constants as kernels read them.
    peak_memory : int
        Planned bytes of what kernels hand to each other, of outputs, and of what kernels use besides.
    sparsity : float
        Fraction of the layers' weights that is zero.
    tasks : dict
        Quality per output: by task, or ``task:output`` where a task has several.
    """

    name: str
    reference: bool = False
    latency: float | None = None
    latency_p95: float | None = None
    macs: int | None = None
    parameters: int | None = None
    parameter_bytes: int | None = None
    bytes: int | None = None
    weight_memory: int | None = None
    peak_memory: int | None = None
    sparsity: float | None = None
    tasks: dict[str, TaskQuality] = Field(default_factory=dict)

    @property
    def throughput(self) -> float | None:
        """Inferences per second."""
        return 1 / self.latency if self.latency else None


class KernelTime(Record):
    """One kernel of the final stage: seconds of all its calls in one inference, each timed alone."""

    name: str
    calls: int
    seconds: float
    tasks: list[str]
    layers: list[str] = Field(default_factory=list)


class LayerUse(Record):
    """One layer of the final stage: its cost, how it computes, for which tasks, and whose work it does.

    ``reason`` says why it computes in floating point although it should have been quantized; empty for others.

    ``origins`` are layers of the networks as they were given: several where a merge shares one, and the layer that was
    taken apart where a pass made this one.
    """

    name: str
    op: str
    macs: int
    parameters: int
    integer: bool
    tasks: list[str]
    depth: int
    origins: list[str] = Field(default_factory=list)
    reason: str = ""


class Check(Record):
    """How what was built compares with the networks as they were given, on a few samples.

    Attributes
    ----------
    against : str
        What computed the networks as they were given; empty if nothing did.
    samples : int
        How many inferences were compared.
    loaded : float
        The largest difference of what was loaded from the networks as they were given, relative to the outputs' ranges.
    built : float
        That of what was built from the compressed graph; None where nothing was compressed, and ``loaded`` is of what
        was built.
    notes : list of str
        What to know of it.
    """

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings")

    against: str = ""
    samples: int = 0
    loaded: float | None = None
    built: float | None = None
    notes: list[str] = Field(default_factory=list)

    @property
    def text(self) -> str:
        """One line that says it."""
        parts = []
        if self.loaded is not None:
            stage = "" if self.built is None else "as loaded, "
            parts.append(f"{stage}{_compared(self.against, self.loaded)}")
        if self.built is not None:
            parts.append(f"as built, {_compared('its graph in NumPy', self.built)}")
        return "; ".join([*parts, *self.notes])


def _compared(against: str, error: float) -> str:
    if error == 0:
        return f"equal to {against}, bit by bit"
    if not math.isfinite(error):
        return f"equal to {against} but for what is infinite or NaN"
    size = f"{error:.0e}".replace("e-0", "e-")
    # No tolerance is larger; what is further apart is so for a reason, which the notes give.
    return f"equal to {against} within {size}" if error <= 0.02 else f"apart from {against} by {error:.2g} of the range"


class Budget(Record):
    """Which layers stay float so that the outputs are within a budget; see `within_budget.Choice`.

    Errors are relative to the outputs' standard deviations.
    """

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings")

    max_error: float
    samples: int
    before: dict[str, float]
    after: dict[str, float]
    layers: dict[str, float]
    policy: dict[str, Any]


class Report(Record):
    """What a compilation achieved.

    Attributes
    ----------
    tasks : list of str
        The tasks.
    target, threads
        The machine compiled for, by name, and threads per inference.
    measured_on : str
        Where the latencies were taken; empty when none were.
    data : str
        What accuracy and agreement were taken on; empty when nothing was.
    stages : list of Stage
        In order; the last one that is no reference is what the bundle holds.
    kernels : list of KernelTime
        In execution order.
    layers : list of LayerUse
        In execution order.
    budget : Budget
        Which layers stay float so that the outputs are within a budget; None if there was none.
    check : Check
        How what was built compares with the networks as they were given; None if it wasn't asked for.
    """

    tasks: list[str]
    target: str
    threads: int = 1
    measured_on: str = ""
    data: str = ""
    stages: list[Stage] = Field(default_factory=list)
    kernels: list[KernelTime] = Field(default_factory=list)
    layers: list[LayerUse] = Field(default_factory=list)
    budget: Budget | None = None
    check: Check | None = None
    versions: dict[str, str] = Field(default_factory=dict)

    @property
    def own(self) -> list[Stage]:
        """The stages without the references."""
        return [stage for stage in self.stages if not stage.reference]

    @property
    def final(self) -> Stage:
        """What the bundle holds."""
        return self.own[-1]

    @property
    def float_layers(self) -> list[str]:
        """Names of the layers that compute in floating point."""
        return [layer.name for layer in self.layers if not layer.integer]

    def to_json(self) -> str:
        """Return the report as JSON text."""
        return self.model_dump_json(indent=1) + "\n"
