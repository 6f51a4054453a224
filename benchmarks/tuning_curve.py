"""How fast the kernels of a network get with the number of trials: our tuner beside TVM's own MetaSchedule.

    python -m benchmarks.tuning_curve
    python -m benchmarks.tuning_curve --network resnet8 --kernels 4 --trials 32 --stock-trials 256 --plot curve.png

Both tune the same fused kernels, and both measure a candidate over RPC on this machine: one thread, three repeats of
at least 15 ms. The trials of one follow those of the other, so at the end the fastest candidates of both are measured
once more, in turns. What is measured is kept in ``--work-dir``: interrupted, it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import tvm
from rich.console import Console
from rich.table import Table
from tvm.s_tir import meta_schedule as ms
from tvm.s_tir.transform import RemoveWeightLayoutRewriteBlock

from benchmarks import plots
from benchmarks.arguments import at_least, output_console, parser_of
from benchmarks.engines import versions
from benchmarks.engines.base import quiet
from benchmarks.engines.nnfuze import source_digest
from benchmarks.interleaved import interleaved
from benchmarks.workloads import workload
from nnfuze_tvm.deploy import build
from nnfuze_tvm.deploy.threads import use_threads
from nnfuze_tvm.devices import cpu, targets
from nnfuze_tvm.devices.remote.tracker import LOCAL_KEY, EmbeddedTracker, Place, connect, parse_address, request
from nnfuze_tvm.errors import NNFuzeError
from nnfuze_tvm.jobs.graphs import make_graphs
from nnfuze_tvm.jobs.request import NetworkRequest
from nnfuze_tvm.jobs.tuning import read_journal, tune_kernels
from nnfuze_tvm.jobs.tuning.kernels import TunableKernel, extract
from nnfuze_tvm.report import text
from nnfuze_tvm.schedules.schedule_kernels import ScheduleKernels

OURS, STOCK = "nnfuze", "MetaSchedule"

# As long as our own job measures a candidate.
_EVALUATOR = ms.runner.EvaluatorConfig(number=1, repeat=3, min_repeat_ms=15)
_BATCH = 32

# What MetaSchedule notes for a candidate that did not run.
_FAILED = 1e9

# Per kernel: seconds of each trial in order, infinite for a failed one.
History = dict[str, list[float]]


def best_sums(history: History, weights: dict[str, int], trials: int) -> list[tuple[int, float]]:
    """Return ``(n, seconds)``: what the kernels take together with the best of ``n`` trials each.

    It starts with the first ``n`` at which every kernel has a trial that ran.
    """
    points = []
    for n in range(1, trials + 1):
        total = sum(weight * min(history[id_][:n], default=math.inf) for id_, weight in weights.items())
        if math.isfinite(total):
            points.append((n, total))
    return points


def trials_to_reach(points: Sequence[tuple[int, float]], seconds: float) -> int | None:
    """Return the least number of trials per kernel that is at least as fast, None if there is none."""
    return next((n for n, value in points if value <= seconds), None)


def our_history(fused: tvm.IRModule, target: tvm.target.Target, trials: int, folder: Path) -> History:
    """Tune all kernels with our tuner and return every trial's time, by kernel."""
    with metered(folder, lambda: len(read_journal(folder))):
        tune_kernels(fused, target, trials=trials, work_dir=folder)
    history: History = {}
    for trial in read_journal(folder):
        history.setdefault(trial.kernel, []).append(math.inf if trial.time is None else trial.time)
    return history


def _session(place: Place, config: ms.runner.RPCConfig) -> tvm.rpc.RPCSession:
    """What MetaSchedule opens sessions with: its own way knows no secret."""
    return request(connect(place), config.tracker_key, config.session_timeout_sec)[0]


def stock_history(
    kernel: TunableKernel, target: tvm.target.Target, trials: int, folder: Path, place: Place
) -> list[float]:
    """Tune one kernel with MetaSchedule, as it comes, and return every trial's time."""
    folder.mkdir(parents=True, exist_ok=True)

    host, port = parse_address(place.address)
    runner = ms.runner.RPCRunner(
        ms.runner.RPCConfig(tracker_host=host, tracker_port=port, tracker_key=LOCAL_KEY, session_timeout_sec=30),
        _EVALUATOR,
        f_create_session=partial(_session, place),
    )
    while (left := trials - len(stock_times(folder))) > 0:
        before = len(stock_times(folder))
        # A round at a time: what is measured is on the disk after each, and the next one starts from it.
        with metered(folder, lambda: len(stock_times(folder))), quiet():
            tasks, weights = ms.relax_integration.extracted_tasks_to_tune_contexts(
                [ms.ExtractedTask(kernel.name, kernel.mod, target, [kernel.mod], kernel.weight)],
                str(folder),
                num_threads=len(os.sched_getaffinity(0)),
                seed=before + 1,
            )
            ms.tune.tune_tasks(
                tasks=tasks,
                task_weights=weights,
                work_dir=str(folder),
                max_trials_global=left,
                num_trials_per_iter=_BATCH,
                runner=runner,
            )
        if len(stock_times(folder)) == before:  # its space holds no more
            break
    return stock_times(folder)[:trials]


def stock_times(folder: Path) -> list[float]:
    """Return the time of every trial in MetaSchedule's database of one kernel, in order."""
    path = folder / "database_tuning_record.json"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    times = [median(float(seconds) for seconds in json.loads(line)[1][1]) for line in lines]
    return [math.inf if seconds >= _FAILED else seconds for seconds in times]


def in_turns(kernel: TunableKernel, target: tvm.target.Target, folders: dict[str, Path]) -> dict[str, float]:
    """Return the seconds of each tuner's fastest candidate of one kernel, measured in turns on one thread."""
    calls = {}
    for name, folder in folders.items():
        database = ms.database.JSONDatabase(work_dir=str(folder))
        scheduled = tvm.transform.Sequential([ScheduleKernels(target, database)])(kernel.mod)
        packed = RemoveWeightLayoutRewriteBlock(skip_tensor_rewrite=True)(scheduled)
        module = tvm.compile(packed, target=target)
        random = np.random.default_rng(0)
        operands = [
            tvm.runtime.tensor(random.standard_normal([int(dim) for dim in info.shape]).astype(str(info.dtype)))
            for info in ms.arg_info.ArgInfo.from_prim_func(packed["main"])
        ]
        calls[name] = partial(module["main"], *operands)
    use_threads(1)
    return {name: timing.median for name, timing in interleaved(calls, rounds=200).items()}


@contextmanager
def metered(folder: Path, count: Any) -> Iterator[None]:
    """Add the wall time of the block and the trials made in it to ``meter.json``."""
    started, before = time.monotonic(), count()
    try:
        yield
    finally:
        lasted, new = time.monotonic() - started, count() - before
        if new > 0:
            spent, made = meter(folder)
            figures = {"seconds": spent + lasted, "trials": made + new}
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "meter.json").write_text(json.dumps(figures), encoding="utf-8")


def meter(folder: Path) -> tuple[float, int]:
    """Return wall seconds and trials so far."""
    try:
        figures = json.loads((folder / "meter.json").read_text(encoding="utf-8"))
    except OSError:
        return 0.0, 0
    return figures["seconds"], figures["trials"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit code."""
    args = _parse(arguments)
    try:
        if args.plot:
            plots.check(args.plot)
        document = compare(args.network, args.kernels, args.trials, args.stock_trials, args.work_dir)
    except KeyboardInterrupt:
        print("error: interrupted; run it again to go on", file=sys.stderr)
        return 2
    except (NNFuzeError, OSError) as error:
        print(" ".join(f"error: {error}".split()), file=sys.stderr)
        return 2
    out = output_console()
    out.print(render(document))
    out.print(render_best(document))
    out.print(summary(document), highlight=False, soft_wrap=True)
    if args.json:
        args.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if args.plot:
        title = f"{args.network}, {len(document['kernels'])} kernels, {document['machine']['cpu']}"
        plots.curves(args.plot, title, {name: found["curve"] for name, found in document["tuners"].items()})
    return 0


def compare(network: str, count: int, trials: int, stock_trials: int, work_dir: Path) -> dict[str, Any]:
    """Return the curves of both tuners over the ``count`` most expensive kernels of a network.

    A kernel's cost is what it takes tuned, times its uses; those that our rules leave no choice for are left out.
    """
    console = Console(stderr=True)
    work = workload(network, work_dir)
    folder = work.directory / f"curve-{source_digest()}"
    target = targets.resolve("host")
    models = [f"{path.stem}={path}" for path in work.models]
    fused = build.fuse(make_graphs(NetworkRequest.parse(models, {})).last, target)
    ours = our_history(fused, target, trials, folder / "ours")
    kernels = [kernel for kernel in extract(fused, target) if math.isfinite(min(ours.get(kernel.id, [math.inf])))]
    kernels.sort(key=lambda kernel: -kernel.weight * min(ours[kernel.id]))
    kernels = kernels[:count]
    stock: History = {}
    cores = tvm.target.Target({**{k: v for k, v in target.export().items() if k != "tag"}, "num-cores": 1})
    # What the server's kernels may use; our own job says so for every session.
    os.environ["TVM_NUM_THREADS"] = "1"
    with EmbeddedTracker() as tracker:
        for n, kernel in enumerate(kernels, 1):
            console.print(f"{STOCK}: kernel {n} of {len(kernels)}, {kernel.name}", highlight=False)
            stock[kernel.id] = stock_history(kernel, cores, stock_trials, folder / "stock" / kernel.id, tracker.place)
    best = {
        kernel.id: in_turns(kernel, target, {OURS: folder / "ours", STOCK: folder / "stock" / kernel.id})
        for kernel in kernels
    }
    weights = {kernel.id: kernel.weight for kernel in kernels}
    spent = [meter(folder / "stock" / kernel.id) for kernel in kernels]
    meters = {OURS: meter(folder / "ours"), STOCK: (sum(s for s, _ in spent), sum(n for _, n in spent))}
    tuners = {}
    for name, history, limit in ((OURS, ours, trials), (STOCK, stock, stock_trials)):
        seconds, made = meters[name]
        tuners[name] = {
            "trials": limit,
            "curve": best_sums(history, weights, limit),
            "seconds_per_trial": seconds / made if made else None,
            "best": {id_: best[id_][name] for id_ in weights},
            "kernels": {id_: [None if math.isinf(s) else s for s in history[id_]] for id_ in weights},
        }
    return {
        "network": network,
        "machine": {"cpu": cpu.name(), "versions": versions([])},
        "kernels": [{"id": k.id, "name": k.name, "calls": k.weight} for k in kernels],
        "tuners": tuners,
    }


def render(document: dict[str, Any]) -> Table:
    """Return a row per power of two of trials."""
    tuners = document["tuners"]
    table = Table(title=f"{document['network']}: {len(document['kernels'])} kernels together", title_justify="left")
    table.add_column("trials per kernel", justify="right")
    for name in tuners:
        table.add_column(name, justify="right")
    limit = max(found["trials"] for found in tuners.values())
    for n in sorted({*(1 << k for k in range(limit.bit_length())), *(found["trials"] for found in tuners.values())}):
        points = [dict(found["curve"]).get(n) for found in tuners.values()]
        table.add_row(str(n), *(text.seconds(value) for value in points))
    return table


def render_best(document: dict[str, Any]) -> Table:
    """Return a row per kernel: each tuner's fastest candidate, measured in turns."""
    tuners, kernels = document["tuners"], document["kernels"]
    table = Table(title="the fastest candidates, in turns", title_justify="left")
    table.add_column("kernel", overflow="fold")
    for name in ("calls", *tuners, f"{STOCK} / {OURS}"):
        table.add_column(name, justify="right")
    totals = dict.fromkeys(tuners, 0.0)
    for kernel in kernels:
        seconds = {name: found["best"][kernel["id"]] for name, found in tuners.items()}
        for name in tuners:
            totals[name] += kernel["calls"] * seconds[name]
        table.add_row(kernel["name"], str(kernel["calls"]), *_compared(seconds))
    table.add_row("all calls", str(sum(kernel["calls"] for kernel in kernels)), *_compared(totals))
    return table


def _compared(seconds: dict[str, float]) -> list[str]:
    return [*map(text.seconds, seconds.values()), f"{seconds[STOCK] / seconds[OURS]:.2f}×"]


def summary(document: dict[str, Any]) -> str:
    """Return what a trial costs, and when one tuner reaches the other's result."""
    ours, stock = (document["tuners"][name] for name in (OURS, STOCK))
    costs = ", ".join(
        f"{name} {found['seconds_per_trial']:.2f} s per trial"
        for name, found in document["tuners"].items()
        if found["seconds_per_trial"] is not None
    )
    if not ours["curve"]:
        return costs
    n, best = ours["curve"][-1]
    reached = trials_to_reach(stock["curve"], best)
    behind = f"after {reached} trials" if reached else f"not within {stock['trials']} trials"
    return f"{costs}; {STOCK} is as fast as {OURS} after {n} trials: {behind}"


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of("benchmarks.tuning_curve", __doc__)
    parser.add_argument("--network", default="resnet18", help="a name, a file or a+b; resnet18 by default")
    parser.add_argument("--kernels", type=at_least(1), default=4, help="how many, the most expensive ones; 4")
    parser.add_argument("--trials", type=at_least(1), default=32, help="ours, per kernel; 32")
    parser.add_argument("--stock-trials", type=at_least(1), default=256, help="MetaSchedule's, per kernel; 256")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything to a file, too")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the curves (.png, .svg, .pdf)")
    default = Path("build/tuning-curve")
    parser.add_argument("--work-dir", type=Path, default=default, metavar="DIR", help=f"what is kept; {default}")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
