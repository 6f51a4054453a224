"""The catalogue: what it says of each board's CPU is what LLVM knows, and what code made for it may use."""

from __future__ import annotations

import pytest

from nnfuze_tvm.deploy.manifest import CPU_FLAGS, target_text
from nnfuze_tvm.devices.boards import BOARDS, CATALOGUE, find
from nnfuze_tvm.devices.targets import llvm_features, resolve

# Of LLVM's names, those that any kernel of ours or of LLVM's vectorizers may be chosen by.
CHOSEN_BY = {"neon", "dotprod", "fullfp16", "i8mm", "bf16", "sve", "sve2"}


@pytest.mark.parametrize("board", CATALOGUE, ids=lambda board: board.name)
def test_features_are_those_of_the_cpu(board):
    assert set(board.features) == llvm_features(resolve(board.name)) & CHOSEN_BY
    assert CHOSEN_BY <= CPU_FLAGS["aarch64"].keys()


@pytest.mark.parametrize("board", CATALOGUE, ids=lambda board: board.name)
def test_a_target_names_its_board_also_after_a_round_trip(board):
    target = resolve(target_text(resolve(board.name)))
    assert find(str(target.attrs["model"]), "") is board
    assert int(target.attrs["num-cores"]) == board.cores
    assert str(target.attrs["mtriple"]).split("-")[0] in ("aarch64", "armv7a")


def test_figures_make_sense():
    assert len(BOARDS) == len(CATALOGUE)
    for board in CATALOGUE:
        assert 0 < board.l1 < board.l2 and (board.l3 == 0 or board.l3 > board.l2)
        assert board.registers == (32 if board.arch == "aarch64" else 16)
        # A board that is sold runs at some clock and has some memory; a class of CPUs has neither.
        assert (board.clock is None) == (board.memory is None)
        assert board.loads >= 0.5
        if board.fp32 and board.int8:
            # A vector instruction holds 4 floats; 8, 16 or 32 products of bytes.
            most = {"i8mm": 8, "dotprod": 4, "neon": 2}
            assert board.int8 / board.fp32 <= next(n for feature, n in most.items() if feature in board.features)


def test_a_cpu_without_a_board():
    assert find("", "cortex-a55") is None
    assert find("", "cortex-a72") is BOARDS["rpi4"]
