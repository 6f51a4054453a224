"""Our bundles beside ONNX Runtime, OpenVINO, ncnn and MNN: latency of one inference, all in turns in one process.

    python -m benchmarks.peers
    python -m benchmarks.peers --networks resnet8,resnet8+resnet8,model.onnx --precision int8 --trials 32

``a+b`` is two networks side by side: one merged bundle for us, two sessions for everybody else; ``a+a`` are two with
a common trunk. What is converted, quantized, tuned and compiled is kept in ``--work-dir``, so that the next run only
measures. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import engines, networks, plots
from benchmarks.arguments import at_least, names, output_console, parser_of
from benchmarks.engines import nnfuze, tvm
from benchmarks.engines.base import Engine, Unavailable, relative_error
from benchmarks.engines.onnxruntime import reference
from benchmarks.interleaved import Timing, interleaved
from benchmarks.workloads import Workload, workload
from nnfuze_tvm.devices import cpu
from nnfuze_tvm.errors import NNFuzeError
from nnfuze_tvm.report import text

UNTUNED, TUNED = "nnfuze", "nnfuze tuned"
PRECISIONS = ("fp32", "int8")
DEFAULT_PEERS = ("onnxruntime", "openvino", "ncnn", "mnn")

# TVM's own tuner, which costs more than a second per trial.
MS = "tvm-ms"

# An answer in float32 that is further off than this is wrong, and its latency means nothing.
_WRONG = 1e-2

# For the spinning threads of the engine that ran last, where engines have threads at all.
_PAUSE = 0.005


@dataclass(frozen=True)
class Result:
    """What one engine did with one workload.

    Attributes
    ----------
    network, precision, engine : str
        Which one.
    timing : Timing, optional
        Wall time of a call; None if it can't run the workload.
    error : float, optional
        The largest difference of an output from ONNX Runtime's in float32, relative to the range of that output.
    reason : str, optional
        Why there is no timing.
    details : dict
        How it was made.
    """

    network: str
    precision: str
    engine: str
    timing: Timing | None = None
    error: float | None = None
    reason: str | None = None
    details: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Ratio:
    """The fastest peer's latency over one of ours, per network: more than 1 means that we are faster."""

    peers: dict[str, str]
    values: dict[str, float]

    @property
    def geometric_mean(self) -> float:
        """Over all networks."""
        return math.exp(sum(math.log(v) for v in self.values.values()) / len(self.values))

    @property
    def least(self) -> float:
        """Over all networks."""
        return min(self.values.values())


def ratios(results: Sequence[Result], ours: str) -> Ratio:
    """Return by how much ``ours`` is faster than the fastest other engine, on networks that both ran."""
    peers, values = {}, {}
    for name in dict.fromkeys(r.network for r in results):
        medians = {r.engine: r.timing.median for r in results if r.network == name and r.timing}
        others = {engine: t for engine, t in medians.items() if engine not in (UNTUNED, TUNED)}
        if ours in medians and others:
            peers[name] = min(others, key=others.__getitem__)
            values[name] = others[peers[name]] / medians[ours]
    return Ratio(peers, values)


def measure(
    work: Workload,
    precision: str,
    peers: Sequence[str],
    *,
    trials: int,
    threads: int,
    rounds: int,
    announce: Callable[[str], None],
) -> list[Result]:
    """Return what every engine does with one workload; ours first, without and (if asked for) with tuning."""
    makers: dict[str, Callable[[], Engine]] = {UNTUNED: lambda: nnfuze.make(work, precision, threads)}
    if trials:
        makers[TUNED] = lambda: nnfuze.make(work, precision, threads, trials)
    for peer in (p for p in peers if p != MS):
        makers[peer] = lambda make=engines.PEERS[peer]: make(work, precision, threads)  # type: ignore[misc]
    if MS in peers:
        makers[MS] = lambda: tvm.make(work, precision, threads, trials)
    announce("reference answers")
    exact = reference(work)
    ready: dict[str, Engine] = {}
    errors: dict[str, float] = {}
    reasons: dict[str, str] = {}
    for name, make in makers.items():
        announce(name)
        try:
            engine = make()
            errors[name] = relative_error(engine.answers(work.evaluation), exact)
            if precision == "fp32" and not errors[name] < _WRONG:
                raise Unavailable(f"wrong: its answers are off by {errors[name]:.0%} of their range")
            ready[name] = engine
        except Unavailable as reason:
            reasons[name] = str(reason)
    announce("measuring")
    calls = {name: engine.bind(work.evaluation[0]) for name, engine in ready.items()}
    timings = interleaved(calls, rounds=rounds, pause=_PAUSE if threads > 1 else 0.0)
    return [
        Result(
            work.name,
            precision,
            name,
            timings.get(name),
            errors.get(name),
            reasons.get(name),
            ready[name].details if name in ready else None,
        )
        for name in makers
    ]


def groups(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Return the results by precision, several networks at once apart: what is merged has an advantage of its own."""
    found: dict[str, list[Result]] = {}
    for r in results:
        found.setdefault(f"{r.precision}, several networks at once" if "+" in r.network else r.precision, []).append(r)
    return found


def render(title: str, results: Sequence[Result]) -> Table:
    """Return the table of one group of results."""
    engines_shown = list(dict.fromkeys(r.engine for r in results))
    found = {ours: ratios(results, ours) for ours in (UNTUNED, TUNED) if ours in engines_shown}
    table = Table(title=f"{title}: latency of one inference", title_justify="left", show_footer=True)
    table.add_column("network", footer="geometric mean\nleast", no_wrap=True)
    for name in engines_shown:
        table.add_column(name, justify="right")
    for ours, ratio in found.items():
        footer = f"{text.ratio(ratio.geometric_mean)}\n{text.ratio(ratio.least)}" if ratio.values else ""
        table.add_column(f"best peer / {ours}", justify="right", footer=footer)
    for network in dict.fromkeys(r.network for r in results):
        row = {r.engine: r for r in results if r.network == network}
        gains = [text.ratio(r.values[network]) if network in r.values else text.NOTHING for r in found.values()]
        table.add_row(network, *(_cell(row[name]) if name in row else "" for name in engines_shown), *gains)
    return table


def _cell(result: Result) -> str:
    if result.timing is None:
        return text.NOTHING
    latency = text.seconds(result.timing.median)
    return latency if result.precision == "fp32" or result.error is None else f"{latency} ±{result.error:.1%}"


def footnotes(results: Sequence[Result]) -> list[str]:
    """Return a line for everything that is missing from the tables."""
    missing: dict[tuple[str, str, str], list[str]] = {}
    for r in results:
        if r.reason:
            missing.setdefault((r.engine, r.precision, r.reason), []).append(r.network)
    everything = {r.network for r in results}
    return [
        f"{engine}, {precision}: {reason}" + ("" if set(where) == everything else f" ({', '.join(where)})")
        for (engine, precision, reason), where in missing.items()
    ]


def machine(peers: Sequence[str], threads: int) -> dict[str, Any]:
    """Return where the figures come from."""
    return {
        "cpu": cpu.name(),
        "cores": sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "threads": threads,
        "versions": engines.versions(peers),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit code."""
    args = _parse(arguments)
    errors = Console(stderr=True)
    results: list[Result] = []
    where = machine(args.peers, args.threads)
    status = errors.status("starting") if errors.is_terminal else None
    try:
        if args.plot:
            plots.check(args.plot)
        works = [workload(spec, args.work_dir) for spec in args.networks]
        if status:
            status.start()
        for work in works:
            for precision in args.precision:

                def announce(what: str, prefix: str = f"{work.name}, {precision}: ") -> None:
                    status.update(prefix + what) if status else print(prefix + what, file=sys.stderr, flush=True)

                results += measure(
                    work,
                    precision,
                    args.peers,
                    trials=args.trials,
                    threads=args.threads,
                    rounds=args.rounds,
                    announce=announce,
                )
                if args.json:
                    document = {"machine": where, "trials": args.trials, **as_json(results)}
                    args.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 2
    except (NNFuzeError, Unavailable, OSError) as error:
        print(" ".join(f"error: {error}".split()), file=sys.stderr)
        return 2
    finally:
        if status:
            status.stop()
    out = output_console()
    for title, shown in groups(results).items():
        out.print(render(title, shown))
    for line in footnotes(results):
        out.print(line, highlight=False, soft_wrap=True)
    used = ", ".join(f"{name} {number}" for name, number in where["versions"].items())
    if args.plot:
        draw(args.plot, results, f"{where['cpu']}, {text.threads(args.threads)}")
    out.print(f"{where['cpu']}, {text.threads(args.threads)}; {used}", highlight=False, soft_wrap=True)
    return 0


def draw(path: Path, results: Sequence[Result], title: str) -> None:
    """Draw ratios and latencies of both precisions."""
    factors: dict[str, dict[str, dict[str, float]]] = {}
    latencies: dict[str, dict[str, dict[str, float]]] = {}
    for precision in dict.fromkeys(r.precision for r in results):
        shown = [r for r in results if r.precision == precision]
        found = {ours: ratios(shown, ours).values for ours in (UNTUNED, TUNED)}
        factors[precision] = {ours: values for ours, values in found.items() if values}
        for r in shown:
            if r.timing:
                latencies.setdefault(precision, {}).setdefault(r.engine, {})[r.network] = r.timing.median
    plots.bars(path, title, factors, latencies)


def as_json(results: Sequence[Result]) -> dict[str, Any]:
    """Return results and ratios as JSON objects; times in seconds."""
    found: dict[str, Any] = {}
    for title, shown in groups(results).items():
        for ours in (UNTUNED, TUNED):
            ratio = ratios(shown, ours)
            if ratio.values:
                found.setdefault(title, {})[ours] = {
                    "geometric_mean": ratio.geometric_mean,
                    "least": ratio.least,
                    "networks": ratio.values,
                    "best_peer": ratio.peers,
                }
    return {"results": [asdict(r) for r in results], "ratios": found}


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of("benchmarks.peers", __doc__)
    parser.add_argument(
        "--networks", type=names(), default=list(networks.NAMES), metavar="A,B,…", help="names, files, a+b"
    )
    parser.add_argument(
        "--precision", type=names(PRECISIONS), default=list(PRECISIONS), metavar="P,…", help=", ".join(PRECISIONS)
    )
    parser.add_argument(
        "--peers",
        type=names((*engines.PEERS, MS)),
        default=list(DEFAULT_PEERS),
        metavar="P,…",
        help=f"of {', '.join((*engines.PEERS, MS))}; {','.join(DEFAULT_PEERS)} by default",
    )
    parser.add_argument("--trials", type=at_least(0), default=0, help="also tune, with as many trials per kernel")
    parser.add_argument("--threads", type=at_least(1), default=1, help="threads per inference, for everybody")
    parser.add_argument("--rounds", type=at_least(1), default=30, help="the least number of samples per engine")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw ratios and latencies (.png, .svg, .pdf)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything to a file, too")
    parser.add_argument(
        "--work-dir", type=Path, default=Path("build/peers"), metavar="DIR", help="default: build/peers"
    )
    parsed = parser.parse_args(arguments)
    if MS in parsed.peers and not parsed.trials:
        parser.error(f"--peers {MS}: it only runs with as many trials as we get; give --trials")
    return parsed


if __name__ == "__main__":
    sys.exit(main())
