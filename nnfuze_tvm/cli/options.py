"""What several verbs take: arguments and options, one by one and in groups."""

from __future__ import annotations

import functools
import inspect
import re
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from nnfuze_tvm.cli.method_options import method_options
from nnfuze_tvm.errors import InputError
from nnfuze_tvm.jobs.announce import note_threads
from nnfuze_tvm.reading.limits import LONGEST_WAIT

Models = Annotated[
    list[str],
    typer.Argument(
        help="ONNX, TensorFlow Lite or PyTorch (.pt2) files, one per task: PATH or TASK=PATH.", show_default=False
    ),
]
Target = Annotated[
    str, typer.Option(help="host, a board such as rpi4, aarch64, x86-64-v3, x86-64-v4, or a TVM target as JSON.")
]
Optimize = Annotated[
    str,
    typer.Option(
        help="speed, or memory: weights stay as small as they are and are used where they lie.", metavar="speed|memory"
    ),
]
Calibration = Annotated[str | None, typer.Option(help="Sample inputs: an .npz file with an array [N, …] per input.")]
WorkDir = Annotated[
    str | None,
    typer.Option(
        help="Directory of the tuning job, and of what was trained: an interrupted one goes on, a finished one is "
        "used. With --trials or --finetune, nnfuze-tuning by default."
    ),
]
A_TRIAL = "each about half a second"
Threads = Annotated[int, typer.Option(help="Threads per inference.")]


def _noted(threads: int | None) -> int | None:
    note_threads(threads or 1, lambda what: print(f"nnfuze: {what}", file=sys.stderr))
    return threads


SomeThreads = Annotated[
    int | None, typer.Option(help="Threads per inference; as compiled by default.", callback=_noted)
]
DumpIR = Annotated[
    str | None,
    typer.Option("--dump-ir", help="Directory for the module after every pass, as text.", metavar="DIR"),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Trust = Annotated[
    str | None,
    typer.Option(help="Public key (Ed25519, PEM): take the bundle only if it was signed with its private key."),
]
BundlePath = Annotated[str, typer.Argument(metavar="BUNDLE", help="Directory that compile wrote.", show_default=False)]


@dataclass(frozen=True)
class Group:
    """Options that a verb gets as one dict: the fields of a request that they stand for.

    Attributes
    ----------
    options : callable
        Returns type and default of each option by name; it may take a moment.
    fields : callable
        From the options' values to the fields.
    """

    options: Callable[[], Mapping[str, tuple[Any, Any]]]
    fields: Callable[..., dict[str, Any]] = dict


def spread(verb: Callable[..., None], *, complete: bool) -> Callable[..., None]:
    """Return a verb whose groups are options, as Typer wants them.

    Parameters
    ----------
    verb : callable
        Parameters with a `Group` in their annotation get a dict.
    complete : bool
        Without, the groups' options are left out: enough to list the verb.
    """
    hints = typing.get_type_hints(verb, include_extras=True)
    members: dict[str, tuple[Group, list[str]]] = {}
    parameters = []
    for name, parameter in inspect.signature(verb).parameters.items():
        annotated = getattr(hints[name], "__metadata__", ())
        group = next((entry for entry in annotated if isinstance(entry, Group)), None)
        own = {name: (hints[name], parameter.default)} if group is None else group.options() if complete else {}
        if group is not None:
            members[name] = group, list(own)
        for option, (kind, default) in own.items():
            parameters.append(
                inspect.Parameter(option, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
            )

    @functools.wraps(verb)
    def command(**given: Any) -> None:
        for name, (group, options) in members.items():
            given[name] = group.fields(**{option: given.pop(option) for option in options})
        verb(**given)

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def _compression_options() -> dict[str, tuple[Any, Any]]:
    found = {
        option.name: (
            Annotated[option.python_type, typer.Option(help=option.help, metavar=option.metavar)],
            option.default,
        )
        for option in method_options()
    }
    file = typer.Option("--policy", help="JSON file: compression layer by layer, before the options above.")
    return {
        **found,
        "policy": (Annotated[str | None, file], None),
        "finetune": (Annotated[str | None, _FINETUNE], None),
        "epochs": (Annotated[int | None, _EPOCHS], None),
    }


def _input_fields(
    share_input: list[str] | None,
    chain: list[str] | None,
    state: list[str] | None,
    shape: list[str] | None,
    merge: str | None,
) -> dict[str, Any]:
    shapes = _parse_shapes(shape or [])
    links = {"shared_inputs": share_input or None, "chains": chain or [], "states": state or []}
    return {**links, "shapes": shapes, "merge": merge}


def _parse_shapes(texts: Sequence[str]) -> dict[str, list[int]]:
    """Return ``{"audio": [1, 1, 49, 40]}`` for ``["audio=1,1,49,40"]``."""
    shapes = {}
    for text in texts:
        name, found, dims = text.rpartition("=")
        parts = dims.replace("x", ",").split(",")
        # So many digits no size has, and Python refuses to read many more.
        shape = [int(part) for part in parts if re.fullmatch("[0-9]{1,18}", part)]
        if not found or not name or len(shape) < len(parts) or min(shape) < 1:
            raise InputError(f"--shape {text}: write it as name=1,3,224,224")
        shapes[name] = shape
    return shapes


def check_files(models: Sequence[str], inputs: Mapping[str, Any], **arrays: str | None) -> None:
    """Say what is wrong with files, tasks' names and shapes before TVM is imported, which takes seconds.

    Parameters
    ----------
    models : sequence of str
        The networks.
    inputs : dict
        The options `Inputs`.
    **arrays
        Files of samples, if there are any, by what they are.

    Raises
    ------
    NNFuzeError
        If something is.
    """
    from nnfuze_tvm.frontend import onnx_file
    from nnfuze_tvm.reading.arrays import read_arrays

    for what, path in arrays.items():
        if path:
            read_arrays(path, f"{what} data", ahead=True)
    onnx_file.checked_sources(models, None, inputs["shapes"])


def check_wait(seconds: float) -> float:
    """Return seconds to wait that are such: neither negative, nor without an end, nor no number."""
    if not 0 <= seconds <= LONGEST_WAIT:
        raise typer.BadParameter(f"{seconds:g} is not in the range 0<=x<={LONGEST_WAIT:.0f}.")
    return seconds


_FINETUNE = typer.Option(
    help="Train what was compressed to answer as before (with PyTorch): an .npz file of inputs [N, …] to learn from, "
    "perhaps labels [N] under the tasks' names."
)
_EPOCHS = typer.Option(help="How often --finetune sees each sample; 5 by default.")
SHARE_INPUT = typer.Option(
    help="An input that is one and the same in all tasks. By default: equal name, shape, dtype. Of several names, "
    "channels first or last, scaled: frame=cats.data,dogs.x*255-128."
)
_CHAIN = typer.Option(
    help="An input that is another network's output: input=task:output; its last 16 results: input=task:output[16]."
)
_STATE = typer.Option(help="An input that is the network's output of the call before, zeros at first: input=output.")
_SHAPE = typer.Option(help="Shape of an input, where the file leaves it open: name=1,3,224,224.")
_MERGE = typer.Option(
    help="Directory of nnfuze merge with these networks: they share the trunk that was learnt there.", metavar="DIR"
)
_TRACKER = typer.Option(help="RPC tracker of the boards: host:port.")
_KEY = typer.Option(help="Key of the boards at the tracker.")
SecretFile = Annotated[
    str | None,
    typer.Option(
        help="File with the secret of the tracker and its boards; by default what NNFUZE_SECRET_FILE names, or "
        "~/.config/nnfuze/secret.",
        show_default=False,
    ),
]
Insecure = Annotated[bool, typer.Option("--insecure", help="No secret: TVM's own tracker, which lets everybody in.")]
_WAIT = typer.Option(help="Seconds to wait for a tracker or a board that isn't there.", callback=check_wait)

# How the networks are compressed.
Compression = Annotated[dict[str, Any], Group(_compression_options)]
# What the networks' files leave open.
Inputs = Annotated[
    dict[str, Any],
    Group(
        lambda: {
            "share_input": (Annotated[list[str] | None, SHARE_INPUT], None),
            "chain": (Annotated[list[str] | None, _CHAIN], None),
            "state": (Annotated[list[str] | None, _STATE], None),
            "shape": (Annotated[list[str] | None, _SHAPE], None),
            "merge": (Annotated[str | None, _MERGE], None),
        },
        _input_fields,
    ),
]
# The boards to measure on.
Boards = Annotated[
    dict[str, Any],
    Group(
        lambda: {
            "tracker": (Annotated[str | None, _TRACKER], None),
            "key": (Annotated[str | None, _KEY], None),
            "secret_file": (SecretFile, None),
            "insecure": (Insecure, False),
            "wait": (Annotated[float, _WAIT], 60.0),
        }
    ),
]
