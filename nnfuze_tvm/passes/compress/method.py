"""A way of compressing as one object: what it reads of a policy, what it is asked for with, what it needs, its passes.

``pipeline.METHODS`` lists the objects in the order in which they are applied. The fields of a policy, the options of
the command line and the stages of a report are built from that list; nothing else has to know of a new method.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import tvm
from tvm import relax

from nnfuze_tvm.errors import InputError
from nnfuze_tvm.graph import evaluate
from nnfuze_tvm.graph.evaluate import Executor

if TYPE_CHECKING:
    from nnfuze_tvm.passes.compress.policy import LayerPolicy, Policy


class Precision(NamedTuple):
    """What a layer multiplies.

    Attributes
    ----------
    weights, activations
        Bits per value.
    format
        What the bits are, for example ``int`` or ``float``.
    """

    weights: int
    activations: int
    format: str

    def __str__(self) -> str:
        return f"weights {self.weights} with activations {self.activations} ({self.format})"


# What a layer computes in where no method is asked for.
FLOAT32 = Precision(32, 32, "float")


@dataclass(frozen=True, eq=False)
class PolicyField:
    """A field that a policy may state of a layer.

    Attributes
    ----------
    name
        Its name in the JSON document, and the attribute of `policy.LayerPolicy`.
    type
        What pydantic checks its values by: a type, ``Annotated[...]`` with a ``pydantic.Field``, or a ``Literal``.
    default
        What counts where nothing is stated.
    help
        What it means, in a few words, for documentation.
    combine : callable
        What counts where several names of one layer state different values, as after a merge: by default the largest.
    """

    name: str
    type: Any
    default: Any
    help: str
    combine: Callable[[Sequence[Any]], Any] = max


class _Given:
    """What holds every value that is given."""

    def __contains__(self, value: Any) -> bool:
        return value is not None


GIVEN: Container[Any] = _Given()
"""For `Option.samples`: every value needs them."""


@dataclass(frozen=True, eq=False)
class Option:
    """An option of the command line, and of `jobs` in Python.

    Attributes
    ----------
    name
        As a Python name: ``calibration_method`` is ``--calibration-method``.
    type
        What pydantic checks a value by that is given.
    default
        Its value where it is not given; may be None.
    help
        One line.
    sets : callable, optional
        From its value, if that is not None, to the policy fields whose defaults it states. An option without is an
        argument of its method's passes, in `Inputs.options`.
    samples : container
        The values that need sample inputs.
    metavar : str, optional
        How ``--help`` shows a value.
    variant
        Whether only the method's variant reads it.
    """

    name: str
    type: Any
    default: Any
    help: str
    sets: Callable[[Any], Mapping[str, Any]] | None = None
    samples: Container[Any] = ()
    metavar: str | None = None
    variant: bool = False


class Features(NamedTuple):
    """What a CPU must have.

    Attributes
    ----------
    any_of
        LLVM's names of features, one of which must be there.
    message
        What to say where none is: why, and what to do instead.
    """

    any_of: frozenset[str]
    message: str


@dataclass(frozen=True, eq=False)
class Inputs:
    """What the passes of a method are made from.

    Attributes
    ----------
    policy : Policy
        What happens to each layer.
    samples : dict of str to numpy.ndarray, optional
        Checked calibration data: ``[N, ...]`` by input.
    options : dict
        Values of the methods' options by name; those that are missing have their defaults.
    executor : callable
        Runs the float network where a pass wants to know its values; see `graph.evaluate.Executor`.
    announce : callable
        Is told what is being done, in a few words.
    """

    policy: Policy
    samples: Mapping[str, np.ndarray] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    executor: Executor = evaluate.executor
    announce: Callable[[str], None] = lambda _: None

    def value(self, option: Option) -> Any:
        """Return the value of an option."""
        return self.options.get(option.name, option.default)


@dataclass(frozen=True, eq=False)
class Training:
    """How what a method makes of a network is trained further.

    Attributes
    ----------
    form : callable
        How a function looks in training: from the function that the method left to one with the same answers, whose
        float32 constants are what is learnt. What it computes of constants alone becomes a constant again behind the
        training, but for what ``dequantize`` makes. By default as it stands.
    rate : float
        How fast is learnt, relative to a network that has lost parts.
    """

    form: Callable[[relax.Function], relax.Function] = lambda func: func
    rate: float = 1.0


@dataclass(frozen=True, eq=False)
class Method:
    """A way of compressing.

    Attributes
    ----------
    name
        The name of the stage in reports; of a method that has a precision, its value for ``--quantize``, too.
    activity
        What is being done while the passes run, such as ``pruning``.
    passes : callable
        Returns the passes, in order.
    precision : Precision, optional
        What its layers compute in. The values of the policy's ``weights``, ``activations`` and ``format`` follow.
    wants : callable, optional
        Whether what a policy says of a layer asks for the method; by default, if it says the method's precision.
    fields : tuple of PolicyField
        The policy fields that it brings. ``weights``, ``activations``, ``format`` and ``bits`` are there for all.
    options : tuple of Option
        The options that it brings.
    remark
        Of a method that has a precision: what the help of ``--quantize`` adds to its name.
    variant
        Of a method that has a precision: another value for ``--quantize``, which its passes find in `Inputs.options`.
    samples
        What of a policy needs sample inputs, such as ``8 bits``; empty if the passes do without.
    training : Training, optional
        How what it makes is trained further; None where that has nothing to mend.
    starts : tuple of str
        Options that ask for the method whatever a policy says.
    features : Features, optional
        What the CPU must have.
    """

    name: str
    activity: str
    passes: Callable[[Inputs], Sequence[tvm.transform.Pass]]
    precision: Precision | None = None
    wants: Callable[[LayerPolicy], bool] | None = None
    fields: tuple[PolicyField, ...] = ()
    options: tuple[Option, ...] = ()
    remark: str = ""
    variant: str = ""
    samples: str = ""
    training: Training | None = Training()
    starts: tuple[str, ...] = ()
    features: Features | None = None

    def asked_by(self, layer: LayerPolicy) -> bool:
        """Return whether what a policy says of a layer asks for this method."""
        return layer.precision == self.precision if self.wants is None else self.wants(layer)

    def check_samples(self, source: str) -> None:
        """Complain if the method, which a policy asks for, needs samples; call it where there are none.

        Parameters
        ----------
        source
            The policy's file.

        Raises
        ------
        InputError
            If it does.
        """
        if self.samples:
            raise InputError(
                f"{source}: asks for {self.samples}, which needs sample inputs; give --calibration samples.npz"
            )

    def check_features(self, available: frozenset[str] | set[str], target: str) -> None:
        """Check that the CPU has what the method needs.

        Parameters
        ----------
        available
            LLVM's names of the CPU's features.
        target
            What the user calls the CPU.

        Raises
        ------
        InputError
            If it has not.
        """
        if self.features is not None and not self.features.any_of & available:
            raise InputError(f"--target {target}: {self.features.message}")


def asked(
    methods: Sequence[Method], layers: Sequence[LayerPolicy], options: Mapping[str, Any] | None = None
) -> list[Method]:
    """Return the methods that a policy or options ask for, in order: the stages of a compilation.

    Parameters
    ----------
    methods
        The methods, `pipeline.METHODS`.
    layers
        What the policy says of each layer of the network.
    options
        Values of the methods' options by name.
    """
    given = {name for name, value in (options or {}).items() if value is not None}
    return [method for method in methods if any(map(method.asked_by, layers)) or given.intersection(method.starts)]


def precisions(methods: Sequence[Method]) -> tuple[Precision, ...]:
    """Return what layers can compute in; of those with the same bits the first is the usual one."""
    return (*(method.precision for method in methods if method.precision is not None), FLOAT32)


def find_precision(
    known: Sequence[Precision], weights: int, activations: int, format: str | None = None
) -> Precision | None:
    """Return the first of ``known`` with these weights, activations and (if stated) format; None if there is none."""
    for precision in known:
        if precision[:2] == (weights, activations) and format in (None, precision.format):
            return precision
    return None


def policy_fields(methods: Sequence[Method]) -> dict[str, PolicyField]:
    """Return all fields of a policy by name, but ``bits``, which is short for three of them."""
    known = precisions(methods)
    fields = [
        *(one for method in methods for one in method.fields),
        PolicyField("weights", one_of(p.weights for p in known), FLOAT32.weights, "bits per weight"),
        PolicyField("activations", one_of(p.activations for p in known), FLOAT32.activations, "bits per activation"),
        PolicyField(
            "format", one_of(p.format for p in known), None, "what the bits are; by default what is usual", _agreed
        ),
    ]
    return by_name(fields)


def by_name(entries: Sequence[Any]) -> dict[str, Any]:
    """Return what methods bring by its name, which no two of them may share."""
    found = {entry.name: entry for entry in entries}
    if len(found) < len(entries):
        raise ValueError(f"two methods bring the same name: {', '.join(entry.name for entry in entries)}")
    return found


def one_of(values: Any) -> Any:
    """Return the type of a field that takes any of some values."""
    return Literal[tuple(dict.fromkeys(values))]


def _agreed(values: Sequence[Any]) -> Any:
    return values[0] if len(set(values)) == 1 else None
