"""What a recurrent layer computes after its input's product: the cells of its directions, and the sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nnfuze_tvm.graph.recurrent.cell import GATES, Activation, Cell, Kind

LEVELS = 127
"""The largest code of a state in 8 bits."""


@dataclass(frozen=True)
class Form:
    """The layer without its sizes.

    Its operands are, with T steps, D directions, B sequences and H hidden units:

    - ``projection [T·B, D·G·H]``: what the G gates of each direction add up of the input and of biases;
    - ``weights [D, H, G·H]``: what the hidden state is multiplied by;
    - ``hidden [D, B, H]``: the hidden state at the beginning;
    - LSTM: ``cell [D, B, H]``, its state at the beginning, and with peepholes ``[D, 3·H]``, those of input, output and
      forget gate;
    - GRU that is linear before the reset: ``bias [D, H]``, which is added to what is reset;
    - in integers: ``scales [D, G·H]``, what one unit of each sum stands for (where states are dynamic, one unit of its
      weights), and ``totals [D, G·H]``, the int32 sums of the weights of each, for states that are held with an offset.

    The result is ``[T, D, B, H]``, the hidden states; with `keeps_cell` it has a further row, the last states of the
    cells. A reversed direction goes from the last step to the first.

    Attributes
    ----------
    cells : tuple of Cell
        One per direction, of one kind.
    reverse : tuple of bool
        Which directions are reversed.
    peepholes : bool
        An LSTM's gates see its state.
    keeps_cell : bool
        The result has an LSTM's last state, too.
    scale : float
        Where it is not 0, what is multiplied by weights, the hidden state or what is left of it by a reset, is rounded
        before to a multiple of it of at most 127 (`codes`).
    codes_in : str
        The type of the weights where they are codes, int8 of at most 127 or int16: sums are exact in int32, and become
        float32 by one multiplication. Without a scale, states are dynamic: in each step the hidden states of all
        sequences become codes of 0 to 255 by their own range, as DynamicQuantizeLinear says.
    """

    cells: tuple[Cell, ...]
    reverse: tuple[bool, ...]
    peepholes: bool = False
    keeps_cell: bool = False
    scale: float = 0.0
    codes_in: str = ""

    @property
    def kind(self) -> Kind:
        """Which cell it is."""
        return self.cells[0].kind

    @property
    def gates(self) -> int:
        """Sums per hidden unit."""
        return GATES[self.kind]

    @property
    def integer(self) -> bool:
        """Whether sums are those of integers."""
        return bool(self.codes_in)

    @property
    def dynamic(self) -> bool:
        """Whether states become codes by their range in each step."""
        return self.integer and not self.scale

    @property
    def waits(self) -> bool:
        """Whether a GRU's gates come first: what its candidate's weights multiply depends on them."""
        return self.kind == "gru" and not self.cells[0].linear_before_reset

    @property
    def has_bias(self) -> bool:
        """Whether a GRU adds a bias to what it resets."""
        return self.kind == "gru" and not self.waits

    @property
    def operands(self) -> tuple[str, ...]:
        """The names of its operands."""
        own: Mapping[str, tuple[str, ...]] = {
            "lstm": ("cell", "peepholes") if self.peepholes else ("cell",),
            "gru": ("bias",) if self.has_bias else (),
            "rnn": (),
        }
        return ("projection", "weights", "hidden", *own[self.kind], *(("scales", "totals") if self.integer else ()))

    @property
    def units_per_one(self) -> float:
        """How many times `scale` goes into 1, in float32: what states are multiplied by to become codes."""
        return float(np.float32(1) / np.float32(self.scale))

    def codes(self, states: np.ndarray) -> np.ndarray:
        """Return the whole numbers of at most 127 that are multiplied by weights, in float32."""
        return np.rint(np.clip(states * np.float32(self.units_per_one), -LEVELS, LEVELS))

    def attributes(self) -> dict[str, Any]:
        """Return the form as attributes of a call or a kernel."""
        first = self.cells[0]
        functions = [function for cell in self.cells for function in cell.activations]
        return {
            "kind": first.kind,
            "reverse": [int(each) for each in self.reverse],
            "activations": [function.name for function in functions],
            "alphas": [function.alpha for function in functions],
            "betas": [function.beta for function in functions],
            "clip": first.clip,
            "coupled": int(first.coupled),
            "linear_before_reset": int(first.linear_before_reset),
            "bound": first.bound,
            "peepholes": int(self.peepholes),
            "keeps_cell": int(self.keeps_cell),
            "scale": self.scale,
            "codes_in": self.codes_in,
        }

    @staticmethod
    def of(attributes: Any) -> Form:
        """Return the form that attributes state."""
        texts = (map(str, attributes["activations"]), map(float, attributes["alphas"]), map(float, attributes["betas"]))
        functions = [Activation(*each) for each in zip(*texts, strict=True)]
        reverse = tuple(bool(each) for each in attributes["reverse"])
        count = len(functions) // len(reverse)
        flags = (bool(attributes[name]) for name in ("coupled", "linear_before_reset"))
        bounds = (float(attributes["clip"]), *flags, float(attributes["bound"]))
        cells = tuple(
            Cell(str(attributes["kind"]), tuple(functions[n : n + count]), *bounds)  # type: ignore[arg-type]
            for n in range(0, len(functions), count)
        )
        facts = (bool(attributes["peepholes"]), bool(attributes["keeps_cell"]))
        return Form(cells, reverse, *facts, float(attributes["scale"]), str(attributes["codes_in"]))


@dataclass(frozen=True)
class Sizes:
    """Steps, directions, sequences and hidden units, and the type of all numbers."""

    steps: int
    directions: int
    batch: int
    hidden: int
    dtype: str

    @staticmethod
    def of(projection: Sequence[int], hidden: Sequence[int], dtype: str) -> Sizes:
        """Return the sizes by the shapes of two operands."""
        return Sizes(projection[0] // hidden[1], hidden[0], hidden[1], hidden[2], dtype)

    def result(self, form: Form) -> tuple[int, int, int, int]:
        """Return the shape of the result."""
        return (self.steps + form.keeps_cell, self.directions, self.batch, self.hidden)


def operand_shapes(form: Form, sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the operands by their names, in order."""
    s, units = sizes, sizes.hidden
    known = {
        "projection": (s.steps * s.batch, s.directions * form.gates * units),
        "weights": (s.directions, units, form.gates * units),
        "hidden": (s.directions, s.batch, units),
        "cell": (s.directions, s.batch, units),
        "peepholes": (s.directions, 3 * units),
        "bias": (s.directions, units),
        "scales": (s.directions, form.gates * units),
        "totals": (s.directions, form.gates * units),
    }
    return {name: known[name] for name in form.operands}


def operand_types(form: Form, sizes: Sizes) -> dict[str, str]:
    """Return the types of the operands by their names, in order."""
    integers = {"weights": form.codes_in, "totals": "int32"} if form.integer else {}
    return {name: integers.get(name, sizes.dtype) for name in form.operands}
