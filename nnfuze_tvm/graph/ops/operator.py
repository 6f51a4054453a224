"""What is said of an operator: the contract that every family's file fills in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import tvm
from tvm.ir import Call

from nnfuze_tvm.graph.batching import Batch
from nnfuze_tvm.graph.channels import Coupling, Filters, Labels, Removal
from nnfuze_tvm.graph.dataflow import Value
from nnfuze_tvm.graph.integers.context import IntegerForm
from nnfuze_tvm.graph.onnx_form import Form

Evaluate = Callable[..., Any]
"""``(call, *operands) -> array``, or a tuple of arrays; see `evaluate` for what operands are."""

Train = Callable[..., Any]
"""``(torch, call, *operands) -> tensor``, or a tuple of them: what `Evaluate` is, with PyTorch, which is handed in."""

Rows = Callable[[Call, np.ndarray, np.ndarray], np.ndarray]
"""``(call, data, places)`` → ``[groups, places, inputs of a group × kernel]``: what a layer's weights are multiplied by
at some places of its result, which are counted over all axes but the channels'; in the order of `channels.Filters`."""

Effect = Literal["layer", "moves", "joins", "maps", "averages", "mixes"]
"""What an operator does to values: multiplies them by weights; puts the same numbers in another place; puts those of
several tensors side by side; computes element by element; averages; or anything else."""

Affine = Callable[[np.ndarray, bool], tuple[np.ndarray | None, np.ndarray | None] | None]
"""``(constant per channel, is it the left operand)`` → scale and shift of the other operand, each None for none."""

Proportional = Callable[[Call], Sequence[int]]
"""``call`` → the operands of which the result is a positively homogeneous function, see `Operator.proportional`."""

Degrees = Callable[[Call], Sequence[float | None]]
"""``call`` → per operand, the power of it that the result grows with near zero, see `Operator.degrees`."""


@dataclass(frozen=True)
class Layer:
    """Where a call with weights has its channels.

    Attributes
    ----------
    data, result : int
        The axis of the channels in the first operand and in the result.
    filters : Filters
        How the second operand, the weights, is laid out.
    """

    data: int
    result: int
    filters: Filters


@dataclass(frozen=True)
class Example:
    """A small call to try an operator with.

    Attributes
    ----------
    shapes : tuple
        Shapes of its operands.
    call : callable
        Makes the call from the operands.
    constants : int
        How many of the operands, the last ones, are constants.
    low, high : float
        The range of the operands' values.
    """

    shapes: tuple[tuple[int, ...], ...]
    call: Callable[..., Value]
    constants: int = 0
    low: float = -1.0
    high: float = 1.0


@dataclass(frozen=True)
class Recurs:
    """How a layer that has states of its own is held in 8 bits; what it reads and makes stays what it is.

    Attributes
    ----------
    states : callable
        Of a call: the states at the beginning, and the largest absolute value of those that it makes, if that is known;
        else they are what it makes.
    in_8_bits : callable
        ``(call, limit, stored, emit)``: the call with states of 8 bits, the largest being ``limit``, and dequantized
        weights: if possible those codes and scales that a file has for them, if it has any.
    already : callable
        Whether a call is such a one.
    """

    states: Callable[[Call], tuple[Value, float]]
    in_8_bits: Callable[[Call, float, tuple[np.ndarray, np.ndarray] | None, Callable[[Value], Value]], Call]
    already: Callable[[Call], bool]


def _first(call: Call) -> Sequence[Value]:
    return call.args[:1]


@dataclass(frozen=True, kw_only=True)
class Operator:
    """One Relax operator.

    Attributes
    ----------
    effect : str
        What it does to values, see `Effect`.
    evaluate : callable, optional
        Computes it with NumPy, see `Evaluate`; without it TVM's own kernel is compiled.
    train : callable, optional
        Computes it with PyTorch, see `Train`; its gradients are PyTorch's. No operand is changed in place.
    examples : tuple of Example
        Calls that its test makes.
    family : str
        The family it belongs to: the name of the file that describes it; set by the registry.

    export : str or callable, optional
        What it is in ONNX: the operator that has the same operands, or a form, see `onnx_form.Form`. Families state it
        beside their ``OPERATORS``, in ``ONNX``; set by the registry.

    layer : callable, optional
        Of an operator with weights: where a call has its channels; None for a call that no pass can treat as a layer,
        because its weights are no matrix or its layout is packed.
    rows : callable, optional
        Of such a layer: what its weights multiply, see `Rows`.
    macs : callable, optional
        Multiply-accumulates of a call, any layout, any groups.

    couple : callable, optional
        What it does to the labels of its operands' channels (`channels`); None where it does not understand the call.
        Without it, everything that it touches stays whole.
    cut : callable, optional
        Writes a call whose operands became smaller; without it the call is the same with the new operands.

    quantizes : bool
        A layer that may be computed in 8 bits.
    recurs : Recurs, optional
        A layer whose products of its own states may be; see `Recurs`.
    integer : callable, optional
        Its integer form, see `integers.context`.
    moves : callable, optional
        Whether a call only puts the numbers of its first operand in other places, where not all of them do.
    nonnegative : callable, optional
        ``(call, is its first operand never negative)`` → whether its result never is.
    bounds : bool
        It only bounds values, so it is part of the way from sums to 8 bits.
    degrees : callable, optional
        Per operand, the power of it that the result grows with near zero: 1 where it grows in proportion, 1/2 for a
        root, 0 for a logarithm, negative for a denominator. What is less than 1 is steeper than any number there: it
        wants values near zero more exactly than 8 bits have them. None for an operand that it follows with a slope of
        its own. Without it, layers and whatever moves, joins, averages or bounds values grow in proportion, and
        nothing else follows its operands so.

    proportional : callable, optional
        The operands, constants among them, out of which a positive factor per channel can be drawn: where all of these
        are so many times as large, so is the result. Without it, that is the first operand of whatever moves, joins or
        averages values, and nothing of anything else.
    limits : callable, optional
        Of an operator that only bounds values between two numbers: the numbers.
    gains : callable, optional
        ``call`` → an axis of the result, and the constant operands along it that the result is proportional to.

    half : bool
        It is computed in float16 where what it reads is: one operation per value, or none, that is linear piece by
        piece; or a layer.

    batch : callable, optional
        How calls of several branches become one, see `batching`.
    operands : callable
        The operands whose order of axes a call follows.
    transposed : callable, optional
        ``(call, operands, axes)``: the call on operands whose transposition by ``axes`` it was made for; its result is
        in their order, too. None where it can't be.

    retypes : bool
        Its result is the same numbers in another type.
    affine : callable, optional
        What it does with a constant per channel, see `Affine`.
    exact : bool
        Every machine rounds it the same way: one operation of IEEE 754 per value, or none.
    of_one : bool
        Its results are parts of one, at most one in size; of a small one only its difference from others counts.
    folds : bool
        Calls of constants are computed on the spot: that is quick and rounds as NumPy does.
    opaque : bool
        Two equal calls may be two values.

    kernels : tuple of str
        The schedule rules that take it when it is the anchor of a kernel.
    """

    effect: Effect
    evaluate: Evaluate | None = None
    train: Train | None = None
    examples: tuple[Example, ...] = ()
    family: str = ""
    export: str | Form | None = None
    layer: Callable[[Call], Layer | None] | None = None
    rows: Rows | None = None
    macs: Callable[[Call], int] | None = None
    couple: Callable[[Coupling, tvm.ir.Var, Call], Labels | tuple | None] | None = None
    cut: Callable[[Removal, tvm.ir.Var, Call, list[Value]], Value] | None = None
    quantizes: bool = False
    recurs: Recurs | None = None
    integer: IntegerForm | None = None
    moves: Callable[[Call], bool] | None = None
    nonnegative: Callable[[Call, bool], bool] | None = None
    bounds: bool = False
    degrees: Degrees | None = None
    proportional: Proportional | None = None
    limits: Callable[[Call], tuple[float, float]] | None = None
    gains: Callable[[Call], tuple[int, Sequence[int]]] | None = None
    half: bool = False
    batch: Batch | None = None
    operands: Callable[[Call], Sequence[Value]] = _first
    transposed: Callable[[Call, list[Value], tuple[int, ...]], Value | None] | None = None
    retypes: bool = False
    affine: Affine | None = None
    exact: bool = False
    of_one: bool = False
    folds: bool = False
    opaque: bool = False
    kernels: tuple[str, ...] = ()


def grows(*degrees: float | None) -> Degrees:
    """Return the `Operator.degrees` of an operator all of whose calls have the same."""
    return lambda _: degrees


def proportional_to(*operands: int) -> Proportional:
    """Return the `Operator.proportional` of an operator all of whose calls have the same."""
    return lambda _: operands


def always(_call: Call, _operand: bool) -> bool:
    """Return True: the result of every call is never negative."""
    return True


def as_its_operand(_call: Call, operand: bool) -> bool:
    """Return whether the operand is never negative: then the result isn't, either."""
    return operand
