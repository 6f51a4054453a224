"""``nnfuze``: arguments in, results printed. What the commands do is in `job` and `tools`."""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nnfuze_tvm.cli import devices as devices_cli
from nnfuze_tvm.cli.console import interruption, out, progress
from nnfuze_tvm.errors import NNFuzeError

if TYPE_CHECKING:
    import numpy as np

    from nnfuze_tvm.jobs.options import Options

# TVM takes seconds to import, so commands import what they need when they run: `--help` answers at once.

# Typer carries its own copy of click; this is where its usage errors come from.
_USAGE_ERROR: type[Exception] = typer.BadParameter.__bases__[0]

app = typer.Typer(
    name="nnfuze",
    help="Merge several trained networks into one, compress it, tune it on the device, and run it.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.add_typer(devices_cli.app, name="devices")

_COMPILE_EXAMPLES = """
Examples:

[bold]nnfuze compile keyword.onnx speaker.onnx -o out[/bold]
Merge two networks; their common trunk is computed once.

[bold]nnfuze compile keyword.onnx speaker.onnx --quantize int8 --calibration calibration.npz -o out[/bold]
The same in int8.

[bold]nnfuze compile a=net1.onnx b=net2.onnx --prune 0.75 --trials 64 --work-dir tuning -o out[/bold]
Name the tasks, drop a quarter of the channels, tune on this machine.

[bold]nnfuze compile a.onnx b.onnx --target aarch64 --tracker pi.local:9190 --key rpi4 --trials 64 -o out[/bold]
Tune on the boards that are registered as rpi4.
"""

_DEPLOY_EXAMPLES = """
Examples:

[bold]nnfuze deploy out --tracker pi.local:9190 --key rpi4[/bold]
Run random numbers through a bundle on a board, and time it there.

[bold]nnfuze deploy out --tracker pi.local:9190 --key rpi4 --inputs samples.npz --output answers.npz[/bold]
Run every sample once, and keep the outputs.
"""

_ANALYZE_EXAMPLES = """
Examples:

[bold]nnfuze analyze keyword.onnx --threads 2[/bold]
Measure on this machine.

[bold]nnfuze analyze keyword.onnx --target rpi4 --tracker pi.local:9190 --key rpi4[/bold]
Measure on a board.

[bold]nnfuze analyze keyword.onnx --target rpi4[/bold]
What a board would allow that is not at hand, by the catalogue.
"""

Models = Annotated[list[str], typer.Argument(help="ONNX files, one per task: PATH or TASK=PATH.", show_default=False)]
SomeModels = Annotated[
    list[str] | None,
    typer.Argument(help="ONNX files; without them the job in --work-dir goes on.", show_default=False),
]
Output = Annotated[str, typer.Option("--output", "-o", help="Directory of the bundle.", show_default=False)]
Target = Annotated[
    str, typer.Option(help="host, a board such as rpi4, aarch64, x86-64-v3, x86-64-v4, or a TVM target as JSON.")
]
Calibration = Annotated[str | None, typer.Option(help="Sample inputs: an .npz file with an array [N, …] per input.")]
Evaluation = Annotated[
    str | None,
    typer.Option(help="Inputs to judge the result on, in the same form; labels [N] under the tasks' names."),
]
Quantize = Annotated[str | None, typer.Option(help="int8, or fp16 where the CPU computes in it.", metavar="int8")]
Prune = Annotated[float | None, typer.Option(help="Fraction of the channels to keep, for example 0.75.")]
Criterion = Annotated[str, typer.Option(help="Which channels go first: l1, l2 or activation.")]
PolicyFile = Annotated[
    str | None, typer.Option("--policy", help="JSON file: compression layer by layer, before the options above.")
]
Method = Annotated[str, typer.Option("--calibration-method", help="Ranges from samples: minmax, percentile or mse.")]
ShareInput = Annotated[
    list[str] | None,
    typer.Option(help="An input that is one and the same in all tasks. By default: equal name, shape, dtype."),
]
Shape = Annotated[
    list[str] | None, typer.Option(help="Shape of an input, where the file leaves it open: name=1,3,224,224.")
]
Trials = Annotated[int, typer.Option(help="Tuning trials per kernel; 0: no tuning.")]
Tracker = Annotated[str | None, typer.Option(help="RPC tracker of the boards: host:port.")]
Key = Annotated[str | None, typer.Option(help="Key of the boards at the tracker.")]
Wait = Annotated[float, typer.Option(help="Seconds to wait for a tracker or a board that isn't there.")]
WorkDir = Annotated[
    str | None,
    typer.Option(
        help="Directory of the tuning job: an interrupted one goes on, a finished one is used. "
        "With --trials, nnfuze-tuning by default."
    ),
]
Threads = Annotated[int, typer.Option(help="Threads per inference.")]
SomeThreads = Annotated[int | None, typer.Option(help="Threads per inference; as compiled by default.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Path = Annotated[str, typer.Argument(metavar="BUNDLE", help="Directory that compile wrote.", show_default=False)]


@app.command("compile", epilog=_COMPILE_EXAMPLES)
def compile_command(
    models: Models,
    output: Output,
    target: Target = "host",
    calibration: Calibration = None,
    evaluation: Evaluation = None,
    quantize: Quantize = None,
    prune: Prune = None,
    criterion: Criterion = "l2",
    policy: PolicyFile = None,
    calibration_method: Method = "minmax",
    share_input: ShareInput = None,
    shape: Shape = None,
    trials: Trials = 0,
    tracker: Tracker = None,
    key: Key = None,
    wait: Wait = 60.0,
    work_dir: WorkDir = None,
    threads: Threads = 1,
    compare: Annotated[
        bool, typer.Option(help="Build and measure every stage for the report, not only the last.")
    ] = True,
    force: Annotated[bool, typer.Option("--force", help="Replace a bundle that is already there.")] = False,
    as_json: AsJson = False,
) -> None:
    """Compile networks into one bundle, with a report."""
    given = locals()
    with progress() as announce:
        options = _options(given)
        from nnfuze_tvm.jobs import job

        report = job.compile_bundle(options, output, force=force, announce=announce, progress=not as_json)
    if as_json:
        print(report.to_json(), end="")
        return
    from nnfuze_tvm.report import render_table

    out().print(render_table(report))
    out().print(f"bundle: {output}   report: {output}/report.html", highlight=False)


@app.command("tune")
def tune_command(
    models: SomeModels = None,
    work_dir: WorkDir = None,
    target: Target = "host",
    calibration: Calibration = None,
    quantize: Quantize = None,
    prune: Prune = None,
    criterion: Criterion = "l2",
    policy: PolicyFile = None,
    calibration_method: Method = "minmax",
    share_input: ShareInput = None,
    shape: Shape = None,
    trials: Annotated[int | None, typer.Option(help="Tuning trials per kernel; 64 for a new job.")] = None,
    tracker: Tracker = None,
    key: Key = None,
    wait: Wait = 60.0,
    threads: Threads = 1,
    as_json: AsJson = False,
) -> None:
    """Tune the kernels of the merged network; `compile --work-dir` uses what was found.

    Interrupted, it goes on where it stopped: nnfuze tune --work-dir DIR

    All boards under the key measure at the same time. One that goes away costs the run that was on it, which is made up
    for; one that comes (back) is used.
    """
    given = locals()
    with progress() as announce:
        from nnfuze_tvm.jobs import job

        if models:
            options = _options({**given, "trials": 64 if trials is None else trials})
        else:
            changes = {"trials": trials, "tracker": tracker, "key": key, "wait": wait}
            options = job.saved_options(work_dir, {k: v for k, v in changes.items() if v is not None})
        job.tune_networks(options, announce=announce, progress=not as_json)
    from nnfuze_tvm.jobs import tuning

    assert options.work_dir is not None
    devices = tuning.usage(tuning.read_journal(options.work_dir))
    if as_json:
        print(json.dumps({"work_dir": options.work_dir, "devices": [asdict(one) for one in devices]}, indent=1))
        return
    from nnfuze_tvm.report.table import render_devices

    out().print(render_devices(devices))
    out().print(f"tuning records: {options.work_dir}", highlight=False)


@app.command("analyze", epilog=_ANALYZE_EXAMPLES)
def analyze_command(
    models: Models,
    target: Target = "host",
    calibration: Calibration = None,
    quantize: Quantize = None,
    prune: Prune = None,
    criterion: Criterion = "l2",
    policy: PolicyFile = None,
    calibration_method: Method = "minmax",
    share_input: ShareInput = None,
    shape: Shape = None,
    tracker: Tracker = None,
    key: Key = None,
    wait: Wait = 60.0,
    work_dir: Annotated[
        str | None, typer.Option(help="Directory of a tuning job whose results the kernels are built with.")
    ] = None,
    threads: Threads = 1,
    as_json: AsJson = False,
) -> None:
    """Time every kernel beside what the machine could do at most, and say what holds it back.

    For a board without --tracker and --key: the least times that the catalogue's figures of it allow.
    """
    given = locals()
    with progress() as announce:
        options = _options(given)
        from nnfuze_tvm.jobs.analyze import analyze

        analysis = analyze(options, announce)
    if as_json:
        print(json.dumps(analysis.to_dict(), indent=1))
        return
    from nnfuze_tvm.report.roofline import render_analysis

    for part in render_analysis(analysis):
        out().print(part, highlight=False)


@app.command("run")
def run_command(
    bundle: Path,
    input: Annotated[list[str], typer.Option(help="An input: name=array.npy. Once per input.", show_default=False)],
    output: Annotated[str | None, typer.Option("--output", "-o", help="Directory for one .npy file per task.")] = None,
    as_json: AsJson = False,
    threads: SomeThreads = None,
) -> None:
    """Run a bundle once on arrays from files."""
    from nnfuze_tvm.jobs import tools

    answers = tools.load_bundle(bundle, threads).run(tools.read_inputs(input))
    arrays = tools.flat(answers)
    if output is not None:
        for path in tools.save_answers(answers, output):
            out().print(str(path), highlight=False)
    elif as_json:
        print(json.dumps({name: array.tolist() for name, array in arrays.items()}))
    else:
        _print_arrays(arrays)


@app.command("deploy", epilog=_DEPLOY_EXAMPLES)
def deploy_command(
    bundle: Path,
    tracker: Annotated[str, typer.Option(help="RPC tracker of the board: host:port.", show_default=False)],
    key: Annotated[str, typer.Option(help="Key of the board at the tracker.", show_default=False)],
    inputs: Annotated[
        str | None, typer.Option(help="An .npz file with samples [N, …] per input; random ones by default.")
    ] = None,
    repeat: Annotated[int, typer.Option(min=1, help="How many inferences to time.")] = 20,
    output: Annotated[str | None, typer.Option("--output", "-o", help="An .npz file for the outputs.")] = None,
    threads: SomeThreads = None,
    wait: Annotated[float, typer.Option(min=0, help="Seconds to wait for a tracker or a board, or its answer.")] = 60.0,
    as_json: AsJson = False,
) -> None:
    """Upload a bundle to a board, run it there, and bring back its outputs and timings."""
    with progress() as announce:
        from nnfuze_tvm.deploy import deployment
        from nnfuze_tvm.jobs import options, tools

        samples = options.read_arrays(inputs, "inputs") if inputs else None
        kept: AbstractContextManager[dict[str, Any]] = tools.array_file(output) if output else nullcontext({})
        with kept as arrays:
            found = deployment.deploy(
                bundle, tracker, key, samples, repeat=repeat, threads=threads, wait=wait, announce=announce
            )
            arrays.update(tools.flat(found.answers))
    if as_json:
        times = {"latency": found.median, "least": min(found.seconds), "seconds": found.seconds}
        where = {"key": key, "board": found.board, "threads": found.threads}
        what = {"written": output} if output else {"outputs": {name: a.tolist() for name, a in arrays.items()}}
        print(json.dumps({**where, **times, **what}))
        return
    from nnfuze_tvm.report import text

    out().print(
        f"{key} at {found.board}: latency {text.seconds(found.median)} (least {text.seconds(min(found.seconds))}, "
        f"{len(found.seconds)} inferences), {text.threads(found.threads)}",
        highlight=False,
    )
    _print_arrays(arrays)
    if output is not None:
        out().print(f"outputs: {output}", highlight=False)


@app.command("bench")
def bench_command(
    bundle: Path,
    repeats: Annotated[int, typer.Option(min=1, help="How many inferences to time.")] = 500,
    threads: SomeThreads = None,
    as_json: AsJson = False,
) -> None:
    """Measure a bundle's latency on this machine, kernel by kernel."""
    from nnfuze_tvm.jobs import tools

    result = tools.bench(tools.load_bundle(bundle, threads), repeats)
    if as_json:
        print(json.dumps(result, indent=1))
        return
    from nnfuze_tvm.report import KernelTime, render_kernels, text

    out().print(
        f"latency {text.seconds(result['latency'])} (p95 {text.seconds(result['latency_p95'])}), "
        f"{text.rate(result['throughput'])}, {text.threads(result['threads'])}, {text.size(result['bytes'])} on disk",
        highlight=False,
    )
    out().print(render_kernels([KernelTime(**kernel) for kernel in result["kernels"]]))


@app.command("inspect")
def inspect_command(
    bundle: Path,
    kernels: Annotated[bool, typer.Option("--kernels", help="List the kernels, too.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what is in a bundle; it may be made for another machine."""
    from nnfuze_tvm.jobs import tools

    found = tools.inspect(bundle)
    if as_json:
        print(json.dumps(found, indent=1))
        return
    from nnfuze_tvm.report import render_manifest

    for part in render_manifest(found, kernels=kernels):
        out().print(part, highlight=False)


def main() -> None:
    """Entry point of the command ``nnfuze``."""
    sys.exit(run())


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code: 0, or 2 with one line on stderr that says why."""
    interruption.came = False
    in_main = threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGINT, interruption.handle) if in_main else None
    try:
        message = _run(arguments)
    except KeyboardInterrupt:
        message = "interrupted"
    except Exception:
        if not interruption.came:
            raise
        message = "interrupted"
    finally:
        if in_main:
            signal.signal(signal.SIGINT, previous)
        interruption.end()
    if message is None:
        return 0
    if interruption.came:
        # It looks like something else by then: a linker that failed, an import that broke.
        message = "interrupted"
    if message:
        print(" ".join(f"error: {message}".split()), file=sys.stderr)
    return 2


def _run(arguments: Sequence[str] | None) -> str | None:
    """Run the command line; return None when it went well, else what to print ("" if there is nothing to say)."""
    try:
        code = app(arguments, prog_name="nnfuze", standalone_mode=False)
        return "" if isinstance(code, int) and code else None
    except NNFuzeError as error:
        return str(error)
    except typer.Exit as error:
        return "" if error.exit_code else None
    except typer.Abort:
        return "interrupted"
    except _USAGE_ERROR as error:
        return _usage(error)
    except BrokenPipeError:
        sys.stderr.close()
        return ""
    except MemoryError:
        return "out of memory; use smaller samples or shapes, or a machine with more"
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or error}"


def _usage(error: Any) -> str:
    context = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":
        print(error.format_message())
        return ""
    command = context.command_path if context is not None else "nnfuze"
    return f"{error.format_message().rstrip('.')}; see {command} --help"


def _options(given: dict[str, Any]) -> Options:
    from nnfuze_tvm.jobs.options import Options
    from nnfuze_tvm.jobs.tools import parse_shapes

    fields = {
        "models": given["models"],
        "shared_inputs": given["share_input"] or None,
        "shapes": parse_shapes(given["shape"] or []),
        **{name: value for name, value in given.items() if name in Options.model_fields},
    }
    return Options.parse(**fields)


def _print_arrays(arrays: Mapping[str, np.ndarray]) -> None:
    for name, array in arrays.items():
        scores = array.reshape(-1)
        best = int(scores.argmax()) if scores.size else -1
        out().print(f"{name}: {list(array.shape)} {array.dtype}, largest {scores[best]:.6g} at {best}")
