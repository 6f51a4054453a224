"""The loops of a recurrent layer whose states are multiplied as 8-bit codes: exact sums in int32, gates in float32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from nnfuze_tvm.graph.recurrent.form import Form, Sizes
from nnfuze_tvm.graph.recurrent.loops import Loops
from nnfuze_tvm.graph.recurrent.tile import Held, Place, Spot, Tile

ROUND = 12582912.0
"""Adding it rounds a float32 to an integer, which then stands in its low bits."""


@dataclass(frozen=True)
class Dots:
    """How a machine multiplies codes of states by int8 weights, and adds to the sums of one vector of units.

    Attributes
    ----------
    lanes : int
        Units of a vector.
    depth : int
        Products per sum and step.
    steps : int
        Steps that one load of codes is for.
    state : str
        The type that codes are held in.
    shift : int
        What is added to a code before it is held.
    paired : bool
        The weights of one step are the first two of all lanes, then the next two, and not all of the first lane.
    add : callable
        ``(sums, codes of all steps, weights of one step, step) ->`` the sums.
    instructions : float
        Multiplications that it takes.
    """

    lanes: int
    depth: int
    steps: int
    state: str
    shift: int
    paired: bool
    add: Callable[[Any, Any, Any, int], Any]
    instructions: float = 1

    def place(self, position: Any) -> tuple[Any, Any]:
        """Return the lane and the product of a weight by its position among those of one step."""
        if not self.paired:
            return position // self.depth, position % self.depth
        half = 2 * self.lanes
        return position % half // 2, position // half * 2 + position % 2


def _one(sums: Any, code: Any, weights: Any, _: int) -> Any:
    lanes = sums.ty.dtype.lanes
    wide = tirx.Cast("int32", code)
    return sums + (wide if lanes == 1 else tirx.Broadcast(wide, lanes)) * weights.astype(
        "int32" if lanes == 1 else f"int32x{lanes}"
    )


ONE_BY_ONE = Dots(1, 1, 1, "int16", 0, False, _one)
"""What every machine can: one product per sum at once, with any number of lanes."""


class IntegerLoops(Loops):
    """Writes the body of one kernel in integers."""

    def __init__(self, form: Form, sizes: Sizes, tile: Tile, buffers: dict[str, Any], out: Any, dots: Dots) -> None:
        super().__init__(form, sizes, tile, buffers, out)
        self.dots, self.held_type = dots, dots.state
        self.together = dots.depth * dots.steps
        self.width = -(-sizes.hidden // self.together) * self.together

    def write(self, packed: bool) -> None:
        """Write everything, as `Loops` does."""
        assert packed or self.dots.depth == 1, "weights that are not packed are multiplied one by one"
        self.counts = self._registers(2 if self.form.waits else self.form.gates, "int32")
        super().write(packed)

    def _rounded(self, value: Any) -> Any:
        """Return the code of a state as it is held: the low bits of a number as large as it takes to round.

        Bounds stand between the multiplication and the addition, so that no machine contracts them.
        """
        lanes = value.ty.dtype.lanes
        integers, held = (kind if lanes == 1 else f"{kind}x{lanes}" for kind in ("int32", self.held_type))
        base = tirx.const(ROUND + self.dots.shift, "float32")
        near = self._scaled(value) + (base if lanes == 1 else tirx.Broadcast(base, lanes))
        return tirx.Cast(held, tirx.reinterpret(integers, near))

    def _accumulate(self, spot: Spot, gates: range, begin: Callable[[int, int, int], Any], held: Held) -> None:
        tile, dots, (buffer, place) = self.tile, self.dots, held
        weight = self.weights(spot)
        for row, gate, vector in self._each(gates):
            T.buffer_store(self.counts[row][gate - gates.start], self._none(spot, gate, vector), [self._place(vector)])

        def products(load: Any) -> None:
            start = load * self.together
            where = start if self.together == 1 else tirx.Ramp(start, tirx.IntImm("int64", 1), self.together)
            codes = [T.bind(buffer[(*place, spot.first + row, where)]) for row in range(tile.rows)]
            for step in range(dots.steps):
                for gate in gates:
                    for vector in range(tile.vectors):
                        weights = weight(gate, vector, load * dots.steps + step)
                        weights = T.bind(weights) if tile.rows > 1 else weights
                        for row in range(tile.rows):
                            sums, own = self.counts[row][gate - gates.start], self._place(vector)
                            T.buffer_store(sums, dots.add(sums[own], codes[row], weights, step), [own])

        self._unrolled(self.width // self.together, products)
        kind = "float32" if tile.lanes == 1 else f"float32x{tile.lanes}"
        for row, gate, vector in self._each(gates):
            own = self._place(vector)
            count = tirx.Cast(kind, self.counts[row][gate - gates.start][own])
            total = count * self._scale(spot, gate, vector) + begin(row, gate, vector)
            T.buffer_store(self.sums[row][gate - gates.start], total, [own])

    def _scale(self, spot: Spot, gate: int, vector: int) -> Any:
        """Return what one unit of a sum stands for."""
        return self.buffers["scales"][self._column(spot, gate, vector)]

    def _none(self, spot: Spot, gate: int, vector: int) -> Any:
        """Return what an integer sum begins with: less what the codes' shift will add."""
        if not self.dots.shift:
            return self._wide(tirx.const(0, "int32"))
        totals = self.buffers["totals"][self._column(spot, gate, vector)]
        return totals * self._wide(tirx.const(-self.dots.shift, "int32"))

    def _column(self, spot: Spot, gate: int, vector: int) -> tuple[Any, Any]:
        start = gate * self.sizes.hidden + spot.unit + vector * self.tile.lanes
        return spot.direction, self._ramp(start)

    def _packed(self) -> Callable[[Spot], Place]:
        """Copy the weights to ``[direction, tile, step of the reduction, gate and vector and what one step takes]``."""
        s, dots, tile = self.sizes, self.dots, self.tile
        each, source = tile.lanes * dots.depth, self.buffers["weights"]
        own = tile.vectors * each
        shape = (s.directions, self.tiles, self.width // dots.depth, self.form.gates * own)

        def value(d: Any, block: Any, i: Any, column: Any) -> Any:
            lane, product = dots.place(column % each)
            unit = self._packed_unit(block, column % own // each * tile.lanes + lane)
            row = i * dots.depth + product
            weight = source[d, row, column // own * s.hidden + unit]
            if self.width == s.hidden:
                return weight
            return tirx.if_then_else(row < s.hidden, weight, tirx.const(0, str(source.dtype)))

        copy = self._copied(shape, value)

        def of_tile(spot: Spot) -> Place:
            def place(gate: int, vector: int, i: Any) -> Any:
                column = tirx.IntImm("int64", gate * own + vector * each)
                where = column if each == 1 else tirx.Ramp(column, tirx.IntImm("int64", 1), each)
                return copy[spot.direction, spot.block, i, where]

            return place

        return of_tile
