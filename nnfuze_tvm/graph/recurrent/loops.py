"""The loops of a recurrent layer, for any width of vectors.

A tile is some hidden units of some sequences. Its sums stay in registers over the product with the hidden state, and
the cell's equations are computed on them in the same pass. What a step makes goes to the other half of a double buffer,
so the order of tiles does not matter, and the last tile may overlap the one before: units in both are computed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from nnfuze_tvm.graph.recurrent.cell import Math, Number
from nnfuze_tvm.graph.recurrent.form import Form, Sizes


@dataclass(frozen=True)
class Tile:
    """What is computed at once.

    Attributes
    ----------
    lanes : int
        Hidden units in one vector.
    vectors : int
        Vectors of each gate.
    rows : int
        Sequences; a divisor of the batch.
    unroll : int
        Products per sum in one iteration.
    """

    lanes: int = 1
    vectors: int = 1
    rows: int = 1
    unroll: int = 1

    @property
    def units(self) -> int:
        """Hidden units."""
        return self.lanes * self.vectors


def _alloc(shape: Sequence[int], dtype: str) -> Any:
    return T.sblock_alloc_buffer([tirx.IntImm("int64", extent) for extent in shape], dtype, layout=None)


def _serial(extent: int) -> Any:
    return T.serial(tirx.IntImm("int64", 0), tirx.IntImm("int64", extent))


def _vectors(dtype: str, lanes: int, keep: Callable[[Number], Number]) -> Math:
    """Return the functions of vectors of a kernel."""

    def number(value: float) -> tirx.PrimExpr:
        scalar = tirx.const(value, dtype)
        return scalar if lanes == 1 else tirx.Broadcast(scalar, lanes)

    return Math(
        number=number,
        keep=keep,
        exp=tirx.exp,
        log=tirx.log,
        tanh=tirx.tanh,
        sigmoid=tirx.sigmoid,
        absolute=lambda x: tirx.max(number(0.0) - x, x),
        # With the constant as its first operand the maximum of it and NaN is NaN.
        maximum=tirx.max,
        minimum=tirx.min,
        divide=lambda x, y: x / y,
        below=lambda x, bound, yes, no: tirx.Select(x < bound, yes, no),
    )


Place = Callable[[int, int, Any], Any]
"""``(gate, vector, step of the reduction) ->`` the vector of weights there."""


class Loops:
    """Writes the body of one kernel."""

    def __init__(self, form: Form, sizes: Sizes, tile: Tile, buffers: dict[str, Any], out: Any) -> None:
        self.form, self.sizes, self.tile, self.buffers, self.out = form, sizes, tile, buffers, out
        self.math = _vectors(sizes.dtype, tile.lanes, self._kept)
        self.values: list[Any] = []
        self.used = 0
        self.tiles = -(-sizes.hidden // tile.units)
        self.states = 2 if form.kind == "lstm" else 1

    def write(self, packed: bool) -> None:
        """Write everything: packed weights, then direction by direction all steps of some sequences."""
        s, form = self.sizes, self.form
        # Half of the double buffer, which state, sequence, unit.
        self.state = _alloc((2, self.states, s.batch, s.hidden), s.dtype)
        if form.waits:
            self.update, self.reset = (_alloc((s.batch, s.hidden), s.dtype) for _ in range(2))
        # One buffer for each gate of each row: small ones live in registers.
        gates = 2 if form.waits else form.gates
        self.sums = [[_alloc((self.tile.units,), s.dtype) for _ in range(gates)] for _ in range(self.tile.rows)]
        self.weights = self._packed() if packed else self._plain()
        with T.sblock("recurrence"):
            T.reads(*(buffer[tuple(slice(0, n) for n in buffer.shape)] for buffer in self._read()))
            T.writes(self.out[tuple(slice(0, n) for n in self.out.shape)])
            for direction in range(s.directions):
                self._direction(direction)

    def _read(self) -> list[Any]:
        return list(self.buffers.values())

    def _direction(self, direction: int) -> None:
        s, rows = self.sizes, self.tile.rows
        with _serial(s.batch // rows) as chunk:
            first = chunk * rows
            for row in range(rows):
                self._begin(direction, first + row)
            with _serial(s.steps) as step:
                self._step(direction, first, step)
            if self.form.keeps_cell:
                for row in range(rows):
                    with _serial(s.hidden) as unit:
                        last = self.state[s.steps % 2, 1, first + row, unit]
                        T.buffer_store(self.out, last, [s.steps, direction, first + row, unit])

    def _begin(self, direction: int, row: Any) -> None:
        names = ("hidden", "cell")[: self.states]
        for which, name in enumerate(names):
            with _serial(self.sizes.hidden) as unit:
                T.buffer_store(self.state, self.buffers[name][direction, row, unit], [0, which, row, unit])

    def _step(self, direction: int, first: Any, step: Any) -> None:
        old, new = step % 2, (step + 1) % 2
        time = self.sizes.steps - 1 - step if self.form.reverse[direction] else step
        cell = self.form.cells[direction]
        write = {"lstm": self._lstm, "rnn": self._rnn, "gru": self._gru}[self.form.kind]
        if self.form.waits:
            self._gates(direction, first, time, old)
            write = self._candidate
        with _serial(self.tiles) as block:
            unit = self._first_unit(block)
            write(cell, direction, first, (time, old, new), block, unit)

    def _first_unit(self, block: Any) -> Any:
        hidden, units = self.sizes.hidden, self.tile.units
        start = block * units
        return start if hidden % units == 0 else T.bind(tirx.min(start, tirx.IntImm("int64", hidden - units)))

    # The sums.

    def _ramp(self, start: Any) -> Any:
        lanes = self.tile.lanes
        return start if lanes == 1 else tirx.Ramp(start, tirx.IntImm("int64", 1), lanes)

    def _wide(self, value: Any) -> Any:
        return value if self.tile.lanes == 1 else tirx.Broadcast(value, self.tile.lanes)

    def _place(self, vector: int) -> Any:
        return self._ramp(tirx.IntImm("int64", vector * self.tile.lanes))

    def _projected(self, direction: int, row: Any, time: Any, gate: int, start: Any) -> Any:
        s = self.sizes
        column = (direction * self.form.gates + gate) * s.hidden + start
        return self.buffers["projection"][time * s.batch + row, self._ramp(column)]

    def _accumulate(
        self,
        gates: int,
        begin: Callable[[int, int, int], Any],
        factor: Callable[[int, Any], Any],
        weight: Place,
    ) -> None:
        """Add up the products of all gates of a tile.

        ``begin(row, gate, vector)`` is what a sum begins with, ``factor(row, i)`` the i-th number that it multiplies.
        """
        tile, hidden = self.tile, self.sizes.hidden
        each = [
            (row, gate, vector) for row in range(tile.rows) for gate in range(gates) for vector in range(tile.vectors)
        ]
        for row, gate, vector in each:
            T.buffer_store(self.sums[row][gate], begin(row, gate, vector), [self._place(vector)])

        def products(i: Any) -> None:
            factors = [T.bind(self._wide(factor(row, i))) for row in range(tile.rows)]
            for gate in range(gates):
                for vector in range(tile.vectors):
                    weights = T.bind(weight(gate, vector, i)) if tile.rows > 1 else weight(gate, vector, i)
                    for row in range(tile.rows):
                        sums, place = self.sums[row][gate], self._place(vector)
                        T.buffer_store(sums, sums[place] + factors[row] * weights, [place])

        whole = hidden // tile.unroll
        with _serial(whole) as step:
            for part in range(tile.unroll):
                products(step * tile.unroll + part)
        for i in range(whole * tile.unroll, hidden):
            products(tirx.IntImm("int64", i))

    def _results(self, gates: int, row: int, vector: int) -> list[Any]:
        return [T.bind(self.sums[row][gate][self._place(vector)]) for gate in range(gates)]

    def _parts(self, first: Any, unit: Any) -> Iterator[tuple[int, int, Any, Any]]:
        """Give row and vector of each part of a tile, its sequence and its first unit."""
        for row in range(self.tile.rows):
            for vector in range(self.tile.vectors):
                self.used = 0
                yield row, vector, first + row, unit + vector * self.tile.lanes

    # The cells.

    def _kept(self, value: Number) -> Number:
        """Return a value that may be read several times until the next part of a tile.

        It goes through a buffer, which LLVM takes into a register: TVM fails to simplify bound variables in which
        functions that it lowers to bindings of their own are nested.
        """
        if isinstance(value, tirx.Var):
            return value
        if self.used == len(self.values):
            self.values.append(_alloc((self.tile.lanes,), self.sizes.dtype))
        buffer, place = self.values[self.used], self._place(0)
        self.used += 1
        T.buffer_store(buffer, value, [place])
        return buffer[place]

    def _products(self, direction: int, first: Any, times: tuple[Any, Any, Any], block: Any, unit: Any) -> None:
        """Add up all gates, each from its projection; a reset comes before a GRU's candidate has its own."""
        time, old, _ = times
        gates, bias = self.form.gates, self.buffers.get("bias")

        def begin(row: int, gate: int, vector: int) -> Any:
            start = unit + vector * self.tile.lanes
            if bias is not None and gate == 2:
                return bias[direction, self._ramp(start)]
            return self._projected(direction, first + row, time, gate, start)

        weight = self.weights(direction, block, unit)
        self._accumulate(gates, begin, lambda row, i: self.state[old, 0, first + row, i], weight)

    def _keep(self, value: Number, row: Any, start: Any, direction: int, times: tuple[Any, Any, Any]) -> None:
        time, _, new = times
        kept = self._kept(value)
        T.buffer_store(self.state, kept, [new, 0, row, self._ramp(start)])
        T.buffer_store(self.out, kept, [time, direction, row, self._ramp(start)])

    def _rnn(self, cell: Any, direction: int, first: Any, times: Any, block: Any, unit: Any) -> None:
        self._products(direction, first, times, block, unit)
        for row, vector, sequence, start in self._parts(first, unit):
            self._keep(cell.rnn(self.math, *self._results(1, row, vector)), sequence, start, direction, times)

    def _lstm(self, cell: Any, direction: int, first: Any, times: Any, block: Any, unit: Any) -> None:
        self._products(direction, first, times, block, unit)
        _, old, new = times
        for row, vector, sequence, start in self._parts(first, unit):
            state = T.bind(self.state[old, 1, sequence, self._ramp(start)])
            peepholes = []
            if self.form.peepholes:
                weights, hidden = self.buffers["peepholes"], self.sizes.hidden
                peepholes = [weights[direction, self._ramp(gate * hidden + start)] for gate in range(3)]
            hidden_state, state = cell.lstm(self.math, self._results(4, row, vector), state, peepholes)
            T.buffer_store(self.state, state, [new, 1, sequence, self._ramp(start)])
            self._keep(hidden_state, sequence, start, direction, times)

    def _gru(self, cell: Any, direction: int, first: Any, times: Any, block: Any, unit: Any) -> None:
        self._products(direction, first, times, block, unit)
        time, old, _ = times
        for row, vector, sequence, start in self._parts(first, unit):
            update, reset, candidate = self._results(3, row, vector)
            own = self._projected(direction, sequence, time, 2, start)
            total = own + cell.gate(self.math, reset) * candidate
            before = self.state[old, 0, sequence, self._ramp(start)]
            value = cell.gru(self.math, cell.gate(self.math, update), total, before)
            self._keep(value, sequence, start, direction, times)

    def _gates(self, direction: int, first: Any, time: Any, old: Any) -> None:
        """Compute a GRU's gates, and what the reset leaves of its state."""
        cell = self.form.cells[direction]
        with _serial(self.tiles) as block:
            unit = self._first_unit(block)
            self._accumulate(
                2,
                lambda row, gate, vector: self._projected(
                    direction, first + row, time, gate, unit + vector * self.tile.lanes
                ),
                lambda row, i: self.state[old, 0, first + row, i],
                self.weights(direction, block, unit),
            )
            for row, vector, sequence, start in self._parts(first, unit):
                update, reset = self._results(2, row, vector)
                place = [sequence, self._ramp(start)]
                left = cell.gate(self.math, reset) * self.state[old, 0, sequence, self._ramp(start)]
                T.buffer_store(self.update, cell.gate(self.math, update), place)
                T.buffer_store(self.reset, left, place)

    def _candidate(self, cell: Any, direction: int, first: Any, times: Any, block: Any, unit: Any) -> None:
        time, old, _ = times
        self._accumulate(
            1,
            lambda row, _, vector: self._projected(direction, first + row, time, 2, unit + vector * self.tile.lanes),
            lambda row, i: self.reset[first + row, i],
            self.weights(direction, block, unit, 2),
        )
        for row, vector, sequence, start in self._parts(first, unit):
            (total,) = self._results(1, row, vector)
            before = self.state[old, 0, sequence, self._ramp(start)]
            value = cell.gru(self.math, self.update[sequence, self._ramp(start)], total, before)
            self._keep(value, sequence, start, direction, times)

    # The weights.

    def _plain(self) -> Callable[..., Place]:
        buffer = self.buffers["weights"]

        def tile(direction: int, _: Any, unit: Any, first_gate: int = 0) -> Place:
            return lambda gate, vector, i: buffer[
                direction, i, self._ramp((first_gate + gate) * self.sizes.hidden + unit + vector * self.tile.lanes)
            ]

        return tile

    def _packed(self) -> Callable[..., Place]:
        """Copy the weights to ``[direction, tile, step of the reduction, gate and unit]``."""
        s, units = self.sizes, self.tile.units
        source = self.buffers["weights"]
        shape = (s.directions, self.tiles, s.hidden, self.form.gates * units)
        copy = _alloc(shape, s.dtype)
        with T.grid(*(tirx.IntImm("int64", extent) for extent in shape)) as loops, T.sblock("weights_packed"):
            d, block, i, column = (
                T.axis.spatial(tirx.IntImm("int64", extent), loop, dtype="int64")
                for extent, loop in zip(shape, loops, strict=True)
            )
            start = block * units
            if s.hidden % units:
                start = tirx.min(start, tirx.IntImm("int64", s.hidden - units))
            value = source[d, i, column // units * s.hidden + start + column % units]
            T.reads(value)
            T.writes(copy[d, block, i, column])
            T.sblock_attr({"meta_schedule.layout_rewrite_preproc": True})
            T.buffer_store(copy, value, [d, block, i, column])
        self.buffers = {**self.buffers, "weights": copy}

        def tile(direction: int, block: Any, _: Any, first_gate: int = 0) -> Place:
            def place(gate: int, vector: int, i: Any) -> Any:
                column = tirx.IntImm("int64", (first_gate + gate) * units + vector * self.tile.lanes)
                return copy[direction, block, i, self._ramp(column)]

            return place

        return tile
