"""A small schedule space and two kernels, and a job on them that can be run as a program.

As a program: ``python -m tests.jobs.tuning.standin WORK_DIR TRIALS [TRACKER KEY]``.
"""

from __future__ import annotations

import sys
from typing import Any

import tvm
from tvm import relax, s_tir
from tvm.target import Target

from nnfuze_tvm.devices import targets
from nnfuze_tvm.devices.remote.tracker import Place
from nnfuze_tvm.jobs import tuning

FACTORS = (8, 4, 16, 2, 1)


def kernels(input_name: str = "x") -> tvm.IRModule:
    """Return a fused module with two kernels, one of them called twice."""
    x = relax.Var(input_name, relax.TensorType((48, 64), "float32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x]):
        with builder.dataflow():
            a = builder.emit(relax.op.nn.softmax(x))
            b = builder.emit(relax.op.nn.softmax(a))
            c = builder.emit(relax.op.exp(relax.op.add(x, relax.const(1.0, "float32"))))
            out = builder.emit_output(relax.Tuple([b, c]))
        builder.emit_func_output(out)
    return fused(builder.get())


def fused(mod: tvm.IRModule) -> tvm.IRModule:
    """Return a graph as fused kernels, by TVM's passes alone."""
    phases = [
        relax.transform.LegalizeOps(),
        relax.transform.AnnotateTIROpPattern(),
        relax.transform.FuseOps(),
        relax.transform.FuseTIR(),
    ]
    return tvm.transform.Sequential(phases)(mod)


def choose(sch: s_tir.Schedule, candidates: tuple, tunable: bool) -> Any:
    """Return a sampled candidate, or the first; importing the real rules takes time that the tests don't have."""
    if not tunable:
        return candidates[0]
    count = len(candidates)
    return candidates[int(sch.get(sch.sample_categorical(list(range(count)), [1.0 / count] * count)))]


def space(sch: s_tir.Schedule, target: Target, tunable: bool = False) -> str:
    """Split the last block's last loop; the second knob exists for some values of the first only."""
    root = sch.get_sblock("root", func_name="main")
    block = sch.get_child_blocks(root)[-1]
    *_, loop = sch.get_loops(block)
    factor = choose(sch, FACTORS, tunable)
    if factor == 16:
        raise ValueError("sixteen is\nnot for us")
    _, inner = sch.split(loop, [None, factor])
    if factor > 2 and choose(sch, (True, False), tunable):
        sch.vectorize(inner)
    return "standin"


# What the space holds: 8 and 4 vectorized or not, 2, 1; and 16, which fails.
CANDIDATES = {(0, 0), (0, 1), (1, 0), (1, 1), (2,), (3,), (4,)}


def run(work_dir: str, trials: int, tracker: str | None = None, key: str | None = None) -> int:
    """Tune both kernels with the stand-in space; return the number of records."""
    from tests.jobs.tuning.standin import space as importable

    database = tuning.tune_kernels(
        kernels(),
        targets.resolve("host"),
        trials=trials,
        work_dir=work_dir,
        tracker=None if tracker is None else Place.of(tracker),
        key=key,
        progress=False,
        space=importable,
    )
    return len(database)


if __name__ == "__main__":
    run(sys.argv[1], int(sys.argv[2]), *sys.argv[3:5])
