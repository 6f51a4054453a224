"""The register tile of a contraction, and the model of its inner loop that ranks tiles."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from nnfuze_tvm.devices.hardware import Hardware
from nnfuze_tvm.schedules.loops import STACK_BYTES, divisors

# Cycles to add a vector of int16 to its sums: when it is the only one, and when sums wait on the stack meanwhile.
_WIDENED_ONCE, _WIDENED = 0.5, 1.5


@dataclass(frozen=True)
class RegisterTile:
    """``pixels`` neighbouring output pixels × ``channels``, in vectors of ``lanes``.

    ``flat`` tiles run on from the end of one row of the image into the next. One load brings the data of
    ``steps_per_load`` steps.
    """

    pixels: int
    channels: int
    lanes: int
    flat: bool
    steps_per_load: int = 1


@dataclass(frozen=True)
class Work:
    """What a contraction has to do, seen by the tile model.

    Attributes
    ----------
    rows, cols, channels : int
        Rows and columns of the output, and its channels (of one group).
    steps : int
        Length of the reduction, in instructions that each take ``depth`` of its elements.
    lanes : int
        Channels per vector register of accumulators.
    depth : int
        Reduction elements per step: 4 with an int8 dot product, else 1.
    weight_bytes : int
        Bytes of one weight.
    multiplies : float
        Instructions on the multiply ports per accumulator and step.
    latency : float
        Cycles from one addition into an accumulator to the next.
    temporaries : int
        Registers that one step needs beside the accumulators and the weights.
    integer : bool
        The accumulators are int32 and not floats.
    sum_bytes : int
        Bytes of one accumulator.
    prepare : int
        Instructions per pixel and step that bring the data into order.
    pixels_per_instruction : int
        Pixels that one instruction takes: only multiples of them make a tile.
    constants : int
        Registers, per step at once, of what brings the data into order.
    steps_per_load : tuple of int
        Of how many steps one load may bring the data.
    pixels_per_load : int
        Pixels whose data stand together: one instruction loads them.
    together : int
        Output channels that read the same data; 0: all do.
    narrow : int
        Elements of the reduction that are summed in int16 before they are in int32; 0: none.
    by_rows : bool
        No tile runs on into the next row.
    """

    rows: int
    cols: int
    channels: int
    steps: int
    lanes: int
    depth: int
    weight_bytes: int
    multiplies: float
    latency: float
    temporaries: int
    integer: bool
    sum_bytes: int = 4
    prepare: int = 0
    constants: int = 0
    pixels_per_instruction: int = 1
    steps_per_load: tuple[int, ...] = (1,)
    pixels_per_load: int = 1
    together: int = 0
    narrow: int = 0
    by_rows: bool = False

    def reads(self, pixels: int, channels: int) -> int:
        """Return how many data a tile reads per step."""
        return pixels * max(1, channels // self.together) if self.together else pixels


def tiles(work: Work, hw: Hardware) -> list[RegisterTile]:
    """Return register tiles, best first, see `ranked`."""
    return [tile for _, tile in ranked(work, hw)]


def ranked(work: Work, hw: Hardware) -> list[tuple[float, RegisterTile]]:
    """Return what a channel costs by a model of the inner loop, and the register tile, best first.

    One step of the reduction loads ``vectors`` weight registers and broadcasts one input per pixel for
    ``pixels · vectors`` multiply-adds. Two loads and two multiplies start per cycle, and an accumulator can be
    added to once per ``latency``, so few accumulators leave the units idle. What is loaded also takes issue slots:
    among tiles that keep the multipliers busy the one with fewer loads wins. Weights of a channel block that do
    not stay in L1 come from L2 or beyond, once per tile. A tile's accumulators are cleared, and its results stored,
    once. Where pixels don't divide a row, either the last tile of every row overlaps the one before it, or tiles run
    on into the next row, and then only the image's last one overlaps. Where the weights outgrow the cache, all tiles
    of a channel block stand in one loop, which prefetches the next block's; LLVM keeps sums in registers across a
    prefetch only where they are on the stack.

    On ARM, whose cores start few instructions per cycle of whatever kind, a step costs what it executes.
    """
    found: list[tuple[float, int, RegisterTile]] = []
    weights_far = streams(work, hw)
    lanes = work.lanes if work.channels % work.lanes == 0 else divisors(work.channels, work.lanes)[0]
    most = min(hw.registers, work.rows * work.cols)
    for vectors, pixels, steps in product(range(1, 9), range(1, most + 1), work.steps_per_load):
        channels = vectors * lanes
        if work.channels % channels or pixels % work.pixels_per_instruction:
            continue
        if work.together and channels % work.together and work.together % channels:
            continue
        if _registers(work, pixels, vectors, steps, hw) > hw.registers:
            continue
        if weights_far and pixels * channels * work.sum_bytes > STACK_BYTES:
            continue
        tile_cycles = _tile_cycles(work, pixels, vectors, channels, steps, hw)
        for flat in (False, True):
            if flat and (work.by_rows or work.rows == 1 or (work.cols % pixels == 0 and not weights_far)):
                continue
            if not flat and (pixels > work.cols or (weights_far and work.rows > 1 and not work.by_rows)):
                continue
            count = -(-work.rows * work.cols // pixels) if flat else work.rows * -(-work.cols // pixels)
            cost = count * (tile_cycles + (4 * pixels if flat else 0)) / channels
            found.append((cost, -pixels, RegisterTile(pixels, channels, lanes, flat, steps)))
    found.sort(key=lambda item: item[:2])
    return [(cost, tile) for cost, _, tile in found]


def _tile_cycles(work: Work, pixels: int, vectors: int, channels: int, steps_per_load: int, hw: Hardware) -> float:
    """Return the cycles of one tile, from clearing its accumulators to storing its results."""
    step_bytes = channels * work.weight_bytes * work.depth
    block_bytes = work.steps * step_bytes
    # Bytes per cycle; those of L2 are more on machines whose vectors are long.
    near = max(16, hw.vector_bytes // 2)
    bandwidth = 64 if block_bytes < hw.l1_bytes else near if block_bytes < hw.l2_bytes else 6
    accumulators = pixels * vectors
    if hw.isa == "arm":
        issued = _instructions(work, pixels, vectors, steps_per_load, hw) / 2
        cycles = max(issued, work.latency, step_bytes / bandwidth)
    else:
        multiplied = accumulators * work.multiplies / 2
        loads = work.reads(pixels, channels) + vectors
        cycles = max(multiplied, loads / 2, work.latency, step_bytes / bandwidth)
        cycles += 0.05 * loads
    # Integer sums are requantized, which takes its cycles; float ones only wait for their last additions.
    finish = 5 * accumulators + 12 if work.integer else 0.2 * accumulators**2 + 4
    if work.narrow:
        parts = -(-work.steps * work.depth // work.narrow)
        finish += accumulators * (_WIDENED_ONCE if parts == 1 else _WIDENED * parts)
    return cycles * work.steps + finish


def _registers(work: Work, pixels: int, vectors: int, steps_per_load: int, hw: Hardware) -> int:
    """Return how many vector registers a tile needs."""
    accumulators = pixels * vectors
    if steps_per_load > 1:
        wide = max(1, work.lanes * work.sum_bytes // hw.vector_bytes)
        held = _held(work, steps_per_load, hw)
        if vectors_first(work, pixels, vectors, steps_per_load, hw):
            # Two loads bring the data of three steps.
            kept = 2 * held + pixels + (steps_per_load == 3)
        elif work.integer or work.latency == 1:
            kept = vectors * held + 1
        else:  # float additions wait for each other, so LLVM loads the next steps' weights early
            kept = (vectors + 1) * held + 2
        return accumulators * wide + kept + work.constants * steps_per_load + work.temporaries - 1
    # Weights that several pixels use stay in registers; of a single pixel's, each is used once. And a
    # broadcast that is used once gives its register to the float sum: LLVM then needs two per pixel.
    needed = accumulators + work.temporaries + work.constants + (vectors if pixels > 1 else 1)
    return needed + pixels if vectors == 1 and not work.integer else needed


def vectors_first(work: Work, pixels: int, vectors: int, steps_per_load: int, hw: Hardware) -> bool:
    """Tell whether a tile's multiplications should go from vector to vector and not from pixel to pixel.

    LLVM keeps what the inner loop shares: the weights of one vector (and of the next, loaded early) and the data of all
    pixels, or the data of one pixel and the weights of all vectors. Data that are brought into order would be so again
    for every vector, and pairs of rows (`row_pairs`) go from pixel to pixel.
    """
    if steps_per_load == 1 or work.prepare or work.pixels_per_instruction > 1:
        return False
    held = _held(work, steps_per_load, hw)
    return 2 * held + pixels < vectors * held + 1


def _held(work: Work, steps_per_load: int, hw: Hardware) -> int:
    """Return how many registers the weights of one vector of channels take."""
    return max(1, work.lanes * work.depth * work.weight_bytes // hw.vector_bytes) * steps_per_load


def _instructions(work: Work, pixels: int, vectors: int, steps_per_load: int, hw: Hardware) -> float:
    """Return the instructions of one step: two start per cycle, whatever they are.

    A pair of weight vectors is one load, and so are the data of ``steps_per_load`` steps (of three, it is two), of
    ``pixels_per_load`` pixels. The loop takes four more.
    """
    weights = vectors * work.lanes * work.depth * work.weight_bytes / (2 * hw.vector_bytes)
    data = work.reads(pixels, vectors * work.lanes) * (
        work.prepare + (2 if steps_per_load == 3 else 1) / (steps_per_load * work.pixels_per_load)
    )
    return pixels * vectors * work.multiplies + weights + data + 4 / steps_per_load


def streams(work: Work, hw: Hardware) -> bool:
    """Tell whether the weights don't stay in L2 from one inference to the next."""
    return work.steps * work.depth * work.channels * work.weight_bytes > hw.l2_bytes // 2
