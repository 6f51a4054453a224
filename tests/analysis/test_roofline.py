"""The machine's figures: kernels that compile for every target, and numbers that hold together."""

from __future__ import annotations

import pytest
import tvm

from nnfuze_tvm.analysis import roofline
from nnfuze_tvm.analysis.roofline import Level, Machine
from nnfuze_tvm.devices.boards import CATALOGUE
from nnfuze_tvm.devices.hardware import Hardware
from nnfuze_tvm.devices.targets import NAMED, resolve


def instructions(target: tvm.target.Target, name: str) -> list[str]:
    mod = roofline.kernels(Hardware.of(target), 1, {"L1": 1 << 14})
    source = tvm.tirx.build(tvm.IRModule({name: mod[name]}), target=target).inspect_source("asm")
    return [line.split()[0] for line in source.splitlines() if line.startswith("\t") and line[1:2] != "."]


# The Cortex-A7's fused multiply-add is slow, so LLVM multiplies and adds apart.
@pytest.mark.parametrize("name", sorted(NAMED.keys() - {"armv7"}))
def test_multiply_adds_stay_in_registers(name):
    """Between the first and the last multiply-add there is nothing else, but for the loop's counter."""
    target = resolve(name)
    found = instructions(target, "fp32")
    fused = [i for i, op in enumerate(found) if op.startswith(("vfmadd", "fmla"))]
    assert len(fused) >= 12
    inside = found[fused[0] : fused[-1] + 1]
    assert {op for op in inside if not op.startswith(("vfmadd", "fmla"))} <= {"subs"}


@pytest.mark.parametrize(
    ("name", "dot"), [("x86-64-v3", "vpmaddubsw"), ("x86-64-v4", "vpmaddubsw"), ("aarch64+dotprod", "sdot")]
)
def test_integers_take_the_kernels_instruction(name, dot):
    target = resolve(name)
    found = instructions(target, "int8")
    uses = [i for i, op in enumerate(found) if op == dot]
    assert len(uses) >= 8
    stores = [op for op in found[uses[0] : uses[-1]] if op.startswith(("vmovdqu", "vmovups", "str", "stp"))]
    assert not stores, "accumulators stay in registers"


@pytest.mark.parametrize("threads", [1, 2])
def test_this_machine(threads):
    machine = roofline.measure(resolve("host"), threads, source="here")
    assert (machine.threads, machine.source) == (threads, "here")
    rates = [machine.fp32, machine.int8, machine.dram, *(level.bandwidth for level in machine.caches)]
    # A billion per second is what an old phone does; a million times that, nothing.
    assert all(1e8 < rate < 1e15 for rate in rates)
    assert [level.name for level in machine.caches[:2]] == ["L1", "L2"]
    sizes = [level.bytes for level in machine.caches]
    assert sizes == sorted(sizes)


@pytest.mark.parametrize("board", CATALOGUE, ids=lambda board: board.name)
def test_a_board_of_the_catalogue(board):
    """What is behind is larger and slower, and a core computes faster than its memory feeds it."""
    machine = roofline.of_board(resolve(board.name))
    if board.clock is None:
        assert machine is None
        return
    assert board.title in machine.source
    assert [level.name for level in machine.caches] == ["L1", "L2", "L3"][: 3 if board.l3 else 2]
    sizes = [level.bytes for level in machine.caches]
    assert sizes == sorted(sizes)
    rates = [machine.int8, machine.fp32, *(level.bandwidth for level in machine.caches), machine.dram]
    assert rates[0] > rates[1] and rates[2:] == sorted(rates[2:], reverse=True)
    both = roofline.of_board(resolve(board.name), 2)
    assert (both.fp32, both.threads) == (2 * machine.fp32, 2)


def test_a_machine_that_is_no_board():
    assert roofline.of_board(resolve("x86-64-v3")) is None


def test_json_gives_the_same_machine():
    machine = Machine(1e11, 2e11, (Level("L1", 32768, 2e11), Level("L2", 524288, 1e11)), 2e10, 32, 1, "a catalogue")
    assert Machine.from_json(machine.to_json()) == machine
