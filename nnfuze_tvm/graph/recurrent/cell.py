"""The equations of LSTM, GRU and plain recurrent cells, over whatever numbers there are: arrays, Relax, vectors.

They are those of ONNX's operators LSTM, GRU and RNN, versions 7 to 22.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Kind = Literal["lstm", "gru", "rnn"]
"""Which cell it is."""
Number = Any
"""A value with ``+``, ``-`` and ``*``: an array, a Relax expression, a vector of a kernel."""

GATES: Mapping[str, int] = {"lstm": 4, "gru": 3, "rnn": 1}
"""How many sums each cell makes: input, output, forget, cell; update, reset, hidden; one."""


@dataclass(frozen=True)
class Math:
    """What the equations need besides sums, differences and products.

    Attributes
    ----------
    number : callable
        ``float ->`` that constant.
    keep : callable
        Returns a value that may be read several times.
    exp, log, tanh, sigmoid, absolute : callable
        Functions of one value.
    maximum, minimum : callable
        Of a constant and a value; NaN where the value is.
    divide : callable
        A quotient.
    below : callable
        ``(x, bound, yes, no)``: ``yes`` where x < bound, else ``no``, also for NaN.
    """

    number: Callable[[float], Number]
    keep: Callable[[Number], Number]
    exp: Callable[[Number], Number]
    log: Callable[[Number], Number]
    tanh: Callable[[Number], Number]
    sigmoid: Callable[[Number], Number]
    absolute: Callable[[Number], Number]
    maximum: Callable[[Number, Number], Number]
    minimum: Callable[[Number, Number], Number]
    divide: Callable[[Number, Number], Number]
    below: Callable[[Number, Number, Number, Number], Number]


def arrays(dtype: np.dtype) -> Math:
    """Return the functions of arrays of a type."""

    def sigmoid(x: np.ndarray) -> np.ndarray:
        # exp of what is not positive can't overflow.
        small = np.exp(-np.abs(x))
        return np.where(x >= 0, 1 / (1 + small), small / (1 + small))

    return Math(
        number=dtype.type,
        keep=lambda x: x,
        exp=np.exp,
        log=np.log,
        tanh=np.tanh,
        sigmoid=sigmoid,
        absolute=np.abs,
        maximum=np.maximum,
        minimum=np.minimum,
        divide=np.divide,
        below=lambda x, bound, yes, no: np.where(x < bound, yes, no),
    )


def tensors(torch: Any) -> Math:
    """Return the functions of PyTorch's tensors; the module is handed in."""
    return Math(
        number=float,
        keep=lambda x: x,
        exp=torch.exp,
        log=torch.log,
        tanh=torch.tanh,
        sigmoid=torch.sigmoid,
        absolute=torch.abs,
        maximum=lambda bound, x: torch.clamp(x, min=bound),
        minimum=lambda bound, x: torch.clamp(x, max=bound),
        divide=torch.div,
        below=lambda x, bound, yes, no: torch.where(x < bound, yes, no),
    )


@dataclass(frozen=True)
class Activation:
    """One of ONNX's activation functions of recurrent layers, in lower case, with its parameters."""

    name: str
    alpha: float
    beta: float

    def __call__(self, m: Math, x: Number) -> Number:
        """Return the function of ``x``."""
        return _FUNCTIONS[self.name](m, m.keep(x), self.alpha, self.beta)


def _affine(m: Math, x: Number, alpha: float, beta: float) -> Number:
    return m.number(alpha) * x + m.number(beta)


def _softplus(m: Math, x: Number) -> Number:
    # exp of what is not positive can't overflow.
    zero, one = m.number(0.0), m.number(1.0)
    return m.maximum(zero, x) + m.log(one + m.exp(zero - m.absolute(x)))


_FUNCTIONS: Mapping[str, Callable[[Math, Number, float, float], Number]] = {
    "affine": _affine,
    "relu": lambda m, x, a, b: m.maximum(m.number(0.0), x),
    "leakyrelu": lambda m, x, a, b: m.below(x, m.number(0.0), m.number(a) * x, x),
    "thresholdedrelu": lambda m, x, a, b: m.below(x, m.number(a), m.number(0.0), x),
    "tanh": lambda m, x, a, b: m.tanh(x),
    "scaledtanh": lambda m, x, a, b: m.number(a) * m.tanh(m.number(b) * x),
    "sigmoid": lambda m, x, a, b: m.sigmoid(x),
    "hardsigmoid": lambda m, x, a, b: m.maximum(m.number(0.0), m.minimum(m.number(1.0), _affine(m, x, a, b))),
    "elu": lambda m, x, a, b: m.below(x, m.number(0.0), m.number(a) * (m.exp(x) - m.number(1.0)), x),
    "softsign": lambda m, x, a, b: m.divide(x, m.number(1.0) + m.absolute(x)),
    "softplus": lambda m, x, a, b: _softplus(m, x),
}

DEFAULTS: Mapping[str, tuple[float | None, ...]] = {
    **dict.fromkeys(_FUNCTIONS, ()),
    "affine": (None, None),
    "leakyrelu": (0.01,),
    "thresholdedrelu": (None,),
    "scaledtanh": (None, None),
    "hardsigmoid": (0.2, 0.5),
    "elu": (1.0,),
}
"""The parameters that each activation has, alpha first, and what they are by default; None where ONNX's text and ONNX
Runtime don't agree."""


def _bounded(m: Math, x: Number, bound: float) -> Number:
    return m.maximum(m.number(-bound), m.minimum(m.number(bound), x)) if bound else x


@dataclass(frozen=True)
class Cell:
    """One direction of a recurrent layer.

    Attributes
    ----------
    kind : str
        ``lstm``, ``gru`` or ``rnn``.
    activations : tuple of Activation
        As many as the cell has: of the gates, of what is new and, in an LSTM, of the cell's state.
    clip : float
        What the activations of sums read lies within it, but not an LSTM's state, as in ONNX Runtime; 0 for no bounds.
    coupled : bool
        An LSTM forgets what it does not take in.
    linear_before_reset : bool
        A GRU resets the product with the hidden state instead of the state.
    bound : float
        An LSTM's state lies within it; 0 for no bounds.
    """

    kind: Kind
    activations: tuple[Activation, ...]
    clip: float = 0.0
    coupled: bool = False
    linear_before_reset: bool = False
    bound: float = 0.0

    def _active(self, m: Math, which: int, x: Number) -> Number:
        return self.activations[which](m, _bounded(m, x, self.clip))

    def rnn(self, m: Math, total: Number) -> Number:
        """Return the new state of a plain cell."""
        return self._active(m, 0, total)

    def lstm(
        self, m: Math, sums: Sequence[Number], state: Number, peepholes: Sequence[Number] = ()
    ) -> tuple[Number, Number]:
        """Return the hidden state and the cell's.

        Parameters
        ----------
        m : Math
            The functions.
        sums : sequence
            Input, output, forget and cell gate before their activations.
        state : Number
            The cell's state before.
        peepholes : sequence
            Its weights in the input, the output and the forget gate; none, or all three.
        """
        inputs, outputs, forget, new = sums
        if peepholes:
            inputs, forget = inputs + peepholes[0] * state, forget + peepholes[2] * state
        taken = m.keep(self._active(m, 0, inputs))
        kept = m.number(1.0) - taken if self.coupled else self._active(m, 0, forget)
        cell = m.keep(_bounded(m, kept * state + taken * self._active(m, 1, new), self.bound))
        if peepholes:
            outputs = outputs + peepholes[1] * cell
        return self._active(m, 0, outputs) * self.activations[2](m, cell), cell

    def gate(self, m: Math, total: Number) -> Number:
        """Return a GRU's update or reset gate."""
        return self._active(m, 0, total)

    def gru(self, m: Math, update: Number, candidate: Number, hidden: Number) -> Number:
        """Return a GRU's new state from its update gate, the sum of its candidate, and the state before."""
        kept = m.keep(update)
        return (m.number(1.0) - kept) * self._active(m, 1, candidate) + kept * hidden
