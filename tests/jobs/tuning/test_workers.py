"""Compiling and measuring single candidates, in this process or in one worker."""

from __future__ import annotations

from collections.abc import Iterator
from multiprocessing.connection import wait
from pathlib import Path

import pytest
import tvm
from tvm import relax, te, tirx
from tvm.s_tir import Schedule

from nnfuze_tvm import schedules
from nnfuze_tvm.deploy import build
from nnfuze_tvm.devices import targets, toolchain
from nnfuze_tvm.devices.processes import Nursery
from nnfuze_tvm.jobs.board_queue import RUNNING
from nnfuze_tvm.jobs.pool import Pool
from nnfuze_tvm.jobs.tuning import workers
from nnfuze_tvm.jobs.tuning.kernels import extract
from tests.jobs.tuning import standin
from tests.servers import embedded


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery(preload=("tvm.rpc.server", workers.__name__)) as nursery:
        yield nursery


def kernel() -> tvm.IRModule:
    return extract(standin.kernels(), targets.resolve("host"))[0].mod


def test_decisions_are_followed_and_reported() -> None:
    target = targets.resolve("host")
    for wanted in [(0, 1), (3,), (3, 1), (), (1,), (9, 9)]:
        sch = workers.SteeredSchedule(kernel(), wanted)
        standin.space(sch, target, tunable=True)
        assert tuple(sch.decisions) in standin.CANDIDATES
        if wanted in standin.CANDIDATES:
            assert tuple(sch.decisions) == wanted
        # The trace alone makes the same program.
        replayed = Schedule(kernel())
        sch.trace.apply_to_schedule(replayed, remove_postproc=False)
        tvm.ir.assert_structural_equal(replayed.mod, sch.mod)


def test_candidates_start_from_the_same_kernel(nursery: Nursery, tmp_path: Path) -> None:
    # A kernel of two loop nests, with a note in its outermost block before the nests are touched.
    x = relax.Var("x", relax.TensorType((1, 4, 4, 512), "float32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x]):
        with builder.dataflow():
            out = builder.emit_output(relax.op.mean(x, [1, 2], keepdims=True))
        builder.emit_func_output(out)
    target = targets.resolve("host")
    (pooling,) = extract(build.fuse(builder.get(), target), target)
    pool = Pool(nursery, 1, 60, workers.compile_loop, {pooling.id: pooling.mod}, target, schedules.apply)
    for wanted in [(0,), (1,), (0,)]:
        pool.submit(wanted, (pooling.id, wanted, frozenset(), str(tmp_path)))
        answers: list = []
        while pool.working:
            answers += pool.answers(wait(pool.channels, timeout=0.2))
        ((_, _, candidate),) = answers
        assert (candidate.error, candidate.rule, candidate.decisions) == (None, "pooling", wanted)


def test_kernels_keep_their_identity_under_other_names() -> None:
    target = targets.resolve("host")
    first = extract(standin.kernels(), target)
    assert len({one.id for one in first}) == 2
    again = extract(standin.kernels(input_name="renamed"), target)
    assert {one.id for one in again} != {one.id for one in first}
    again = extract(standin.kernels(input_name="renamed"), target, [one.workload for one in first])
    assert {one.id for one in again} == {one.id for one in first}


def slow_library(folder: Path) -> str:
    """Return a library whose function sleeps for five seconds."""
    target = targets.resolve("host")
    nap = te.extern(
        [(1,)],
        [],
        lambda _, outs: tirx.Evaluate(tirx.call_extern("int32", "sleep", 5)),
        dtype="float32",
    )
    func = te.create_prim_func([nap]).with_attr("global_symbol", "main")
    path = folder / "slow.so"
    toolchain.export_library(tvm.compile(tvm.IRModule({"main": func}), target=target), path, target)
    return str(path)


def test_a_run_that_takes_too_long_is_ended_and_the_device_is_free_again(nursery: Nursery, tmp_path: Path) -> None:
    with embedded(nursery=nursery) as tracker:
        pool = Pool(nursery, 1, 10, workers.measure_loop, tracker.place, tracker.key, 1.0, 1, from_note=True)
        library = slow_library(tmp_path)
        for _ in range(2):
            pool.submit("slow", ([(library, [((1,), "float32")])], None))
            answers: list = []
            while pool.working:
                answers += pool.answers(wait(pool.channels, timeout=0.2))
            ((tag, (device, note), measured),) = answers
            assert tag == "slow" and device.startswith("127.") and note == RUNNING
            assert measured.seconds is None and not measured.lost
            assert measured.error.startswith("RPCSessionTimeoutError: the session took longer than the 1 s")
