"""Our libraries beside peers' AArch64 packages: instructions of one inference on an emulated CPU, no board needed.

    python -m benchmarks.arm_instructions
    python -m benchmarks.arm_instructions --networks resnet18,model.onnx --cpus cortex-a72 --precision int8 --kernels

QEMU counts what one inference executes on one thread of a CPU model; the figure is the network's multiply-accumulates
per instruction. It says how much a kernel gets out of an instruction set, not how many instructions a core completes
per cycle. The same library has the same count. What is compiled, converted and counted is kept in --work-dir. Needs
a C compiler and the Debian packages qemu-user and mmdebstrap.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import networks, plots
from benchmarks.arguments import names, output_console, parser_of
from benchmarks.arm import engines
from benchmarks.arm.counting import Count
from benchmarks.arm.engines import CPUS, Measured
from benchmarks.engines.base import Unavailable
from benchmarks.engines.onnxruntime import reference
from benchmarks.workloads import Workload, workload
from nnfuze_tvm.errors import InputError, NNFuzeError
from nnfuze_tvm.report import text

OURS = "nnfuze"
PRECISIONS = ("fp32", "fp16", "int8", "w4a8")
DEFAULT_PRECISIONS = ("fp32", "int8")
DEFAULT_CPUS = ("cortex-a72", "cortex-a76", "max")

# An answer that is further off than this is wrong, and its count means nothing.
_WRONG = {"fp32": 1e-2, "fp16": 2.5e-1}


@dataclass(frozen=True)
class Result:
    """What one engine executes for one network.

    Attributes
    ----------
    network, cpu, precision, engine : str
        Which one.
    macs : int
        Multiply-accumulates of one inference, of the network as it was given.
    measured : Measured, optional
        Counts; None if the engine can't run the network.
    reason : str, optional
        Why there is no count.
    """

    network: str
    cpu: str
    precision: str
    engine: str
    macs: int
    measured: Measured | None = None
    reason: str | None = None

    @property
    def rate(self) -> float:
        """Multiply-accumulates per executed instruction."""
        assert self.measured
        return self.macs / self.measured.count.instructions


def ratios(results: Sequence[Result]) -> dict[tuple[str, str, str], float]:
    """Return the best peer's instructions over ours, per (network, CPU, precision) that both ran."""
    rates: dict[tuple[str, str, str], dict[str, float]] = {}
    for r in results:
        if r.measured:
            rates.setdefault((r.network, r.cpu, r.precision), {})[r.engine] = r.rate
    return {
        where: found[OURS] / max(rate for engine, rate in found.items() if engine != OURS)
        for where, found in rates.items()
        if OURS in found and len(found) > 1
    }


def measure(works: Sequence[Workload], args: argparse.Namespace, announce: engines.Announce) -> list[Result]:
    """Return what every engine executes for every network, CPU and precision; ours first."""
    results: list[Result] = []
    for work in works:
        announce(f"{work.name}: reference answers")
        exact, macs = reference(work), engines.macs(work)
        for precision in args.precision:
            compared = args.peers if precision in DEFAULT_PRECISIONS else []
            makers = engines.makers(work, precision, [OURS, *compared], args.work_dir)
            for cpu in args.cpus:
                for engine, make in makers.items():
                    announce(f"{work.name}, {precision}, {cpu}: {engine}")
                    measured, reason = None, None
                    try:
                        measured = make(cpu, exact)
                        if precision in _WRONG and not measured.error < _WRONG[precision]:
                            reason = f"wrong: its answers are off by {measured.error:.0%} of their range"
                            measured = None
                    except Unavailable as error:
                        reason = str(error)
                    results.append(Result(work.name, cpu, precision, engine, macs, measured, reason))
                    if args.json:
                        args.json.write_text(json.dumps(as_json(results), indent=1) + "\n", encoding="utf-8")
    return results


def as_json(results: Sequence[Result]) -> dict[str, Any]:
    """Return results and ratios as JSON objects."""
    found = [{**asdict(r), "macs_per_instruction": r.rate if r.measured else None} for r in results]
    return {
        "versions": engines.versions({r.engine for r in results}),
        "results": found,
        "ratios": [
            {"network": network, "cpu": cpu, "precision": precision, "best_peer_over_ours": ratio}
            for (network, cpu, precision), ratio in ratios(results).items()
        ],
    }


def render(results: Sequence[Result]) -> Table:
    """Return the table of all engines."""
    shown = list(dict.fromkeys(r.engine for r in results))
    found = ratios(results)
    peers = len(shown) > 1
    table = Table(title="multiply-accumulates per executed instruction, one thread", title_justify="left")
    for name in ("network", "CPU", "precision"):
        table.add_column(name, no_wrap=True)
    for name in ("MACs", *shown, *(["best peer's instructions / ours"] if peers else [])):
        table.add_column(name, justify="right")
    for where in dict.fromkeys((r.network, r.cpu, r.precision) for r in results):
        row = {r.engine: r for r in results if (r.network, r.cpu, r.precision) == where}
        cells = [f"{row[name].rate:.2f}" if name in row and row[name].measured else text.NOTHING for name in shown]
        gain = [text.ratio(found[where]) if where in found else text.NOTHING] if peers else []
        table.add_row(*where, text.count(next(iter(row.values())).macs), *cells, *gain)
    return table


def render_classes(results: Sequence[Result]) -> Table:
    """Return the table of what kinds of instructions our libraries consist of."""
    table = Table(title="nnfuze: instructions by kind", title_justify="left")
    for name in ("network", "CPU", "precision"):
        table.add_column(name, no_wrap=True)
    for name in _KINDS:
        table.add_column(name, justify="right")
    for r in results:
        if r.engine == OURS and r.measured:
            table.add_row(r.network, r.cpu, r.precision, *_kinds(r.measured.count, r.macs))
    return table


def render_kernels(result: Result) -> Table:
    """Return the table of the kernels of one of our libraries, and of what is executed around them."""
    assert result.measured
    title = f"{result.network}, {result.precision}, {result.cpu}: kernels"
    table = Table(title=title, title_justify="left")
    table.add_column("layers, or kernel", overflow="fold")
    table.add_column("rule")
    for name in ("MACs", "of all", *_KINDS, "MACs/instruction"):
        table.add_column(name, justify="right")
    all_of_it = result.measured.count.instructions
    around = result.measured.count
    for k in result.measured.kernels:
        around = around - k.count
        rate = k.macs / k.count.instructions if k.macs and k.count.instructions else None
        table.add_row(
            " + ".join(k.layers) or k.name,
            k.rule,
            text.count(k.macs) if k.macs else "",
            text.percent(k.count.instructions / all_of_it),
            *_kinds(k.count, k.macs),
            f"{rate:.2f}" if rate else "",
        )
    share = text.percent(around.instructions / all_of_it)
    table.add_row("around the kernels", "", "", share, *_kinds(around, 0), "")
    return table


_KINDS = ("instructions", "multiply", "load", "store", "other", "MACs/multiply", "loads/multiply")


def _kinds(count: Count, macs: int) -> list[str]:
    shares = [text.percent(n / count.instructions, 0) for n in (count.multiply, count.load, count.store, count.other)]
    if not count.instructions:
        return ["0", *("" for _ in _KINDS[1:])]
    return [
        text.count(count.instructions),
        *shares,
        f"{macs / count.multiply:.2f}" if macs and count.multiply else "",
        f"{count.load / count.multiply:.2f}" if count.multiply else "",
    ]


def footnotes(results: Sequence[Result]) -> list[str]:
    """Return a line for everything that is missing from the table."""
    missing: dict[tuple[str, str, str], list[str]] = {}
    for r in results:
        if r.reason:
            where = missing.setdefault((r.engine, r.precision, r.reason), [])
            where += [f"{r.network} on {r.cpu}"]
    ran = {(r.engine, r.precision) for r in results if r.measured}
    return [
        f"{engine}, {precision}: {reason}" + (f" ({', '.join(where)})" if (engine, precision) in ran else "")
        for (engine, precision, reason), where in missing.items()
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit code."""
    args = _parse(arguments)
    errors = Console(stderr=True)
    status = errors.status("starting") if errors.is_terminal else None

    def announce(what: str) -> None:
        status.update(what) if status else print(what, file=sys.stderr, flush=True)

    try:
        if args.plot:
            plots.check(args.plot)
        for name in args.networks:
            if "+" in name:
                raise InputError(f"--networks {name}: give one network at a time")
        works = [workload(name, args.work_dir) for name in args.networks]
        if status:
            status.start()
        results = measure(works, args, announce)
    except KeyboardInterrupt:
        print("error: interrupted; what is counted is kept", file=sys.stderr)
        return 2
    except (NNFuzeError, Unavailable, OSError) as error:
        print(" ".join(f"error: {error}".split()), file=sys.stderr)
        return 2
    finally:
        if status:
            status.stop()
    out = output_console()
    out.print(render(results))
    out.print(render_classes(results))
    if args.kernels:
        for result in results:
            if result.engine == OURS and result.measured:
                out.print(render_kernels(result))
    for line in footnotes(results):
        out.print(line, highlight=False, soft_wrap=True)
    used = engines.versions({r.engine for r in results})
    out.print(", ".join(f"{name} {number}" for name, number in used.items()), highlight=False, soft_wrap=True)
    if args.plot:
        draw(args.plot, results)
    return 0


def draw(path: Path, results: Sequence[Result]) -> None:
    """Draw everybody's rates, an axis per CPU and precision."""
    series: dict[str, dict[str, dict[str, float]]] = {}
    for r in results:
        if r.measured:
            axis = series.setdefault(f"{r.cpu}, {r.precision}", {})
            axis.setdefault(r.engine, {})[r.network] = r.rate
    plots.rates(path, "one thread, counted by QEMU", "MACs per instruction", series)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of("benchmarks.arm_instructions", __doc__)

    def choice(option: str, known: Sequence[str], default: Sequence[str]) -> None:
        parser.add_argument(
            option,
            type=names(known),
            default=list(default),
            metavar="A,B,…",
            help=f"of {', '.join(known)}; {','.join(default)} by default",
        )

    parser.add_argument(
        "--networks", type=names(), default=list(networks.NAMES), metavar="A,B,…", help="names or ONNX files"
    )
    choice("--cpus", tuple(CPUS), DEFAULT_CPUS)
    choice("--precision", PRECISIONS, DEFAULT_PRECISIONS)
    choice("--peers", (*engines.PEERS, "none"), tuple(engines.PEERS))
    parser.add_argument("--kernels", action="store_true", help="also list our kernels one by one")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the rates (.png, .svg, .pdf)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything to a file, too, kernels included")
    parser.add_argument(
        "--work-dir",
        type=Path,
        default=Path("build/arm-instructions"),
        metavar="DIR",
        help="default: build/arm-instructions",
    )
    parsed = parser.parse_args(arguments)
    parsed.peers = [peer for peer in parsed.peers if peer != "none"]
    return parsed


if __name__ == "__main__":
    sys.exit(main())
