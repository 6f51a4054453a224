"""The loops of a recurrent layer, for any width of vectors.

A tile is some hidden units of some sequences. Its sums stay in registers over the product with the hidden state, and
the cell's equations are computed on them in the same pass. What a step makes goes to the other half of a double buffer,
so the order of tiles does not matter, and the last tile may overlap the one before: units in both are computed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from nnfuze_tvm.graph.recurrent.cell import Math, Number
from nnfuze_tvm.graph.recurrent.form import LEVELS, Form, Sizes
from nnfuze_tvm.graph.recurrent.tile import Held, Place, Spot, Tile


def alloc(shape: Sequence[int], dtype: str) -> Any:
    """Make a buffer of the kernel's own."""
    return T.sblock_alloc_buffer([tirx.IntImm("int64", extent) for extent in shape], dtype, layout=None)


def serial(extent: int) -> Any:
    """Open a loop."""
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


class Loops:
    """Writes the body of one kernel."""

    def __init__(self, form: Form, sizes: Sizes, tile: Tile, buffers: dict[str, Any], out: Any) -> None:
        self.form, self.sizes, self.tile, self.buffers, self.out = form, sizes, tile, buffers, out
        self.math = _vectors(sizes.dtype, tile.lanes, self._kept)
        self.values: list[Any] = []
        self.used = 0
        self.tiles = -(-sizes.hidden // tile.units)
        self.states = 2 if form.kind == "lstm" else 1
        # Numbers of a state that weights multiply, and how they are held.
        self.width, self.held_type = sizes.hidden, sizes.dtype

    def write(self, packed: bool) -> None:
        """Write everything: packed weights, then direction by direction all steps of some sequences."""
        s, form = self.sizes, self.form
        # Half of the double buffer, which state, sequence, unit.
        self.state = alloc((2, self.states, s.batch, s.hidden), s.dtype)
        self.held: Any = None
        if form.scale:
            self.held = alloc((2, s.batch, self.width), self.held_type)
        if form.waits:
            self.update = alloc((s.batch, s.hidden), s.dtype)
            self.reset = alloc((s.batch, self.width), self.held_type)
        # One buffer for each gate of each row: small ones live in registers.
        gates = 2 if form.waits else form.gates
        self.sums = self._registers(gates, s.dtype)
        self.weights = self._packed() if packed else self._plain()
        with T.sblock("recurrence"):
            T.reads(*(buffer[tuple(slice(0, n) for n in buffer.shape)] for buffer in self._read()))
            T.writes(self.out[tuple(slice(0, n) for n in self.out.shape)])
            for direction in range(s.directions):
                self._direction(direction)

    def _registers(self, gates: int, dtype: str) -> list[list[Any]]:
        return [[alloc((self.tile.units,), dtype) for _ in range(gates)] for _ in range(self.tile.rows)]

    def _read(self) -> list[Any]:
        return list(self.buffers.values())

    def _direction(self, direction: int) -> None:
        rows = self.tile.rows
        with serial(self.sizes.batch // rows) as chunk:
            first = chunk * rows
            for row in range(rows):
                self._begin(direction, first + row)
            with serial(self.sizes.steps) as step:
                self._step(direction, first, step)
            for row in range(rows):
                self._end(direction, first + row)

    def _begin(self, direction: int, row: Any) -> None:
        names = ("hidden", "cell")[: self.states]
        for which, name in enumerate(names):
            with serial(self.sizes.hidden) as unit:
                value = self.buffers[name][direction, row, unit]
                T.buffer_store(self.state, value, [0, which, row, unit])
                if self.held is not None and name == "hidden":
                    T.buffer_store(self.held, self._rounded(value), [0, row, unit])

    def _end(self, direction: int, row: Any) -> None:
        s = self.sizes
        if self.form.keeps_cell:
            with serial(s.hidden) as unit:
                T.buffer_store(self.out, self.state[s.steps % 2, 1, row, unit], [s.steps, direction, row, unit])

    def _step(self, direction: int, first: Any, step: Any) -> None:
        old, new = step % 2, (step + 1) % 2
        time = self.sizes.steps - 1 - step if self.form.reverse[direction] else step
        cell = self.form.cells[direction]
        write = {"lstm": self._lstm, "rnn": self._rnn, "gru": self._gru}[self.form.kind]
        if self.form.waits:
            self._gates(direction, first, time, old)
            write = self._candidate
        with serial(self.tiles) as block:
            write(cell, Spot(direction, first, block, self._first_unit(block)), (time, old, new))

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

    def _accumulate(self, spot: Spot, gates: range, begin: Callable[[int, int, int], Any], held: Held) -> None:
        """Add up the products of some gates of a tile.

        ``begin(row, gate, vector)`` is what a sum begins with, ``held`` what is multiplied.
        """
        tile, hidden, (buffer, place) = self.tile, self.sizes.hidden, held
        weight = self.weights(spot)
        for row, gate, vector in self._each(gates):
            sums = self.sums[row][gate - gates.start]
            T.buffer_store(sums, begin(row, gate, vector), [self._place(vector)])

        def products(i: Any) -> None:
            factors = [T.bind(self._wide(buffer[(*place, spot.first + row, i)])) for row in range(tile.rows)]
            for gate in gates:
                for vector in range(tile.vectors):
                    weights = T.bind(weight(gate, vector, i)) if tile.rows > 1 else weight(gate, vector, i)
                    for row in range(tile.rows):
                        sums, own = self.sums[row][gate - gates.start], self._place(vector)
                        T.buffer_store(sums, sums[own] + factors[row] * weights, [own])

        self._unrolled(hidden, products)

    def _each(self, gates: range) -> list[tuple[int, int, int]]:
        """Return row, gate and vector of every sum of a tile."""
        rows, vectors = range(self.tile.rows), range(self.tile.vectors)
        return [(row, gate, vector) for row in rows for gate in gates for vector in vectors]

    def _unrolled(self, count: int, step: Callable[[Any], None]) -> None:
        """Write all steps of a reduction, some in each iteration."""
        unroll = self.tile.unroll
        whole = count // unroll
        with serial(whole) as block:
            for part in range(unroll):
                step(block * unroll + part)
        for i in range(whole * unroll, count):
            step(tirx.IntImm("int64", i))

    def _rounded(self, value: Any) -> Any:
        """Return what is held of a state: the nearest multiple of the scale."""
        scale = _vectors("float32", value.ty.dtype.lanes, self._kept).number(self.form.scale)
        return tirx.nearbyint(self._scaled(value)) * scale

    def _scaled(self, value: Any) -> Any:
        """Return a state in units of the scale, within the bounds of codes."""
        m = _vectors("float32", value.ty.dtype.lanes, self._kept)
        scaled = value * m.number(self.form.units_per_one)
        return m.maximum(m.number(-LEVELS), m.minimum(m.number(LEVELS), scaled))

    def _results(self, gates: int, row: int, vector: int) -> list[Any]:
        return [T.bind(self.sums[row][gate][self._place(vector)]) for gate in range(gates)]

    def _parts(self, spot: Spot) -> Iterator[tuple[int, int, Any, Any]]:
        """Give row and vector of each part of a tile, its sequence and its first unit."""
        for row in range(self.tile.rows):
            for vector in range(self.tile.vectors):
                self.used = 0
                yield row, vector, spot.first + row, spot.unit + vector * self.tile.lanes

    # The cells.

    def _kept(self, value: Number) -> Number:
        """Return a value that may be read several times until the next part of a tile.

        It goes through a buffer, which LLVM takes into a register: TVM fails to simplify bound variables in which
        functions that it lowers to bindings of their own are nested.
        """
        if isinstance(value, tirx.Var):
            return value
        if self.used == len(self.values):
            self.values.append(alloc((self.tile.lanes,), self.sizes.dtype))
        buffer, place = self.values[self.used], self._place(0)
        self.used += 1
        T.buffer_store(buffer, value, [place])
        return buffer[place]

    def _products(self, spot: Spot, times: tuple[Any, Any, Any]) -> None:
        """Add up all gates, each from its projection; a reset comes before a GRU's candidate has its own."""
        time, old, _ = times
        bias = self.buffers.get("bias")

        def begin(row: int, gate: int, vector: int) -> Any:
            if bias is not None and gate == 2:
                return bias[spot.direction, self._ramp(spot.unit + vector * self.tile.lanes)]
            return self._begun(spot, time, row, gate, vector)

        self._accumulate(spot, range(self.form.gates), begin, self._multiplied(old))

    def _begun(self, spot: Spot, time: Any, row: int, gate: int, vector: int) -> Any:
        return self._projected(spot.direction, spot.first + row, time, gate, spot.unit + vector * self.tile.lanes)

    def _multiplied(self, old: Any) -> Held:
        """Return the hidden states that weights multiply."""
        return (self.state, [old, 0]) if self.held is None else (self.held, [old])

    def _keep(self, value: Number, row: Any, start: Any, direction: int, times: tuple[Any, Any, Any]) -> None:
        time, _, new = times
        kept, place = self._kept(value), self._ramp(start)
        if self.held is not None:
            T.buffer_store(self.held, self._rounded(kept), [new, row, place])
        if self.held is None or self.form.kind == "gru":
            T.buffer_store(self.state, kept, [new, 0, row, place])
        T.buffer_store(self.out, kept, [time, direction, row, place])

    def _rnn(self, cell: Any, spot: Spot, times: Any) -> None:
        self._products(spot, times)
        for row, vector, sequence, start in self._parts(spot):
            self._keep(cell.rnn(self.math, *self._results(1, row, vector)), sequence, start, spot.direction, times)

    def _lstm(self, cell: Any, spot: Spot, times: Any) -> None:
        self._products(spot, times)
        _, old, new = times
        for row, vector, sequence, start in self._parts(spot):
            state = T.bind(self.state[old, 1, sequence, self._ramp(start)])
            peepholes = []
            if self.form.peepholes:
                weights, hidden = self.buffers["peepholes"], self.sizes.hidden
                peepholes = [weights[spot.direction, self._ramp(gate * hidden + start)] for gate in range(3)]
            hidden_state, state = cell.lstm(self.math, self._results(4, row, vector), state, peepholes)
            T.buffer_store(self.state, state, [new, 1, sequence, self._ramp(start)])
            self._keep(hidden_state, sequence, start, spot.direction, times)

    def _gru(self, cell: Any, spot: Spot, times: Any) -> None:
        self._products(spot, times)
        time, old, _ = times
        for row, vector, sequence, start in self._parts(spot):
            update, reset, candidate = self._results(3, row, vector)
            own = self._projected(spot.direction, sequence, time, 2, start)
            total = own + cell.gate(self.math, reset) * candidate
            before = self.state[old, 0, sequence, self._ramp(start)]
            value = cell.gru(self.math, cell.gate(self.math, update), total, before)
            self._keep(value, sequence, start, spot.direction, times)

    def _gates(self, direction: int, first: Any, time: Any, old: Any) -> None:
        """Compute a GRU's gates, and what the reset leaves of its state."""
        cell = self.form.cells[direction]
        with serial(self.tiles) as block:
            spot = Spot(direction, first, block, self._first_unit(block))
            begin = partial(self._begun, spot, time)
            self._accumulate(spot, range(2), begin, self._multiplied(old))
            for row, vector, sequence, start in self._parts(spot):
                update, reset = self._results(2, row, vector)
                place = [sequence, self._ramp(start)]
                left = cell.gate(self.math, reset) * self.state[old, 0, sequence, self._ramp(start)]
                T.buffer_store(self.update, cell.gate(self.math, update), place)
                T.buffer_store(self.reset, left if self.held is None else self._rounded(left), place)

    def _candidate(self, cell: Any, spot: Spot, times: Any) -> None:
        time, old, _ = times
        self._accumulate(spot, range(2, 3), partial(self._begun, spot, time), (self.reset, []))
        for row, vector, sequence, start in self._parts(spot):
            (total,) = self._results(1, row, vector)
            before = self.state[old, 0, sequence, self._ramp(start)]
            value = cell.gru(self.math, self.update[sequence, self._ramp(start)], total, before)
            self._keep(value, sequence, start, spot.direction, times)

    # The weights.

    def _plain(self) -> Callable[[Spot], Place]:
        buffer = self.buffers["weights"]

        def tile(spot: Spot) -> Place:
            return lambda gate, vector, i: buffer[
                spot.direction, i, self._ramp(gate * self.sizes.hidden + spot.unit + vector * self.tile.lanes)
            ]

        return tile

    def _packed(self) -> Callable[[Spot], Place]:
        """Copy the weights to ``[direction, tile, step of the reduction, gate and unit]``."""
        s, units = self.sizes, self.tile.units
        source = self.buffers["weights"]
        shape = (s.directions, self.tiles, s.hidden, self.form.gates * units)

        def value(d: Any, block: Any, i: Any, column: Any) -> Any:
            return source[d, i, column // units * s.hidden + self._packed_unit(block, column % units)]

        copy = self._copied(shape, value)

        def tile(spot: Spot) -> Place:
            def place(gate: int, vector: int, i: Any) -> Any:
                column = tirx.IntImm("int64", gate * units + vector * self.tile.lanes)
                return copy[spot.direction, spot.block, i, self._ramp(column)]

            return place

        return tile

    def _packed_unit(self, block: Any, unit: Any) -> Any:
        """Return the unit of the layer that is a unit of a tile."""
        hidden, units = self.sizes.hidden, self.tile.units
        start = block * units
        if hidden % units:
            start = tirx.min(start, tirx.IntImm("int64", hidden - units))
        return start + unit

    def _copied(self, shape: Sequence[int], value: Callable[..., Any]) -> Any:
        """Return the weights in another order, written by a block that is evaluated at compile time."""
        source = self.buffers["weights"]
        copy = alloc(shape, str(source.dtype))
        with T.grid(*(tirx.IntImm("int64", extent) for extent in shape)) as loops, T.sblock("weights_packed"):
            place = [
                T.axis.spatial(tirx.IntImm("int64", extent), loop, dtype="int64")
                for extent, loop in zip(shape, loops, strict=True)
            ]
            T.reads(source[tuple(slice(0, n) for n in source.shape)])
            T.writes(copy[tuple(place)])
            T.sblock_attr({"meta_schedule.layout_rewrite_preproc": True})
            T.buffer_store(copy, value(*place), place)
        self.buffers = {**self.buffers, "weights": copy}
        return copy
