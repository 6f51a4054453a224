"""``nnfuze devices``: the boards there are, a tracker and servers for them, and emulated ones."""

from __future__ import annotations

import json
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict
from typing import Annotated

import typer

from nnfuze_tvm.cli.console import out, progress, until_ended
from nnfuze_tvm.cli.options import check_wait
from nnfuze_tvm.errors import DeviceError

# A board that only serves has TVM and Typer, nothing else: commands import what they need when they run.

POSITION = 7
_EXAMPLES = """
Examples:

[bold]nnfuze devices[/bold]
The boards that --target takes.

[bold]nnfuze devices tracker[/bold]
On a machine that all boards reach: where they register.

[bold]nnfuze devices serve --tracker 192.168.1.10:9190 --key rpi4[/bold]
On the board: run what is sent to it.

[bold]nnfuze devices emulate --tracker 127.0.0.1:9190 --key rpi4[/bold]
Instead of a board: an emulated one, on this machine.

[bold]nnfuze devices check rpi4 --tracker 192.168.1.10:9190[/bold]
Is the board what its key says, and does it compute correctly?
"""

app = typer.Typer(
    help="The boards there are; a tracker and servers for them; emulated ones.",
    epilog=_EXAMPLES,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Tracker = Annotated[str, typer.Option(help="The tracker: host:port.", show_default=False)]
Key = Annotated[str, typer.Option(help="What clients ask the tracker for: what kind of board.", show_default=False)]
Wait = Annotated[
    float, typer.Option(help="Seconds to wait for a tracker or a board that isn't there.", callback=check_wait)
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.callback(invoke_without_command=True)
def catalogue_command(context: typer.Context, as_json: AsJson = False) -> None:
    """The boards that --target takes; commands for a tracker, for servers on boards, and for emulated boards."""
    if context.invoked_subcommand is not None:
        return
    from nnfuze_tvm.devices.boards import CATALOGUE

    if as_json:
        print(json.dumps([{**asdict(board), "triple": board.triple} for board in CATALOGUE], indent=1))
        return
    from nnfuze_tvm.report.boards import render_catalogue

    for part in render_catalogue():
        out().print(part, highlight=False)


@app.command("list")
def list_command(tracker: Tracker, wait: Wait = 10.0, as_json: AsJson = False) -> None:
    """Show which boards are registered with a tracker, and which of them are free."""
    from nnfuze_tvm.devices.remote import tracker as trackers

    session = trackers.connect(tracker, wait)
    found = trackers.boards(session)
    session.close()
    if as_json:
        print(json.dumps({key: {**asdict(boards), "in_use": boards.in_use} for key, boards in found.items()}, indent=1))
        return
    from nnfuze_tvm.report.boards import render_boards

    if found:
        out().print(render_boards(found), highlight=False)
    else:
        out().print(f"tracker {tracker}: no boards; start one with nnfuze devices serve", highlight=False)


@app.command("check")
def check_command(
    key: Annotated[str, typer.Argument(help="Key of the board at the tracker.", show_default=False)],
    tracker: Tracker,
    target: Annotated[str | None, typer.Option(help="What the board should be; by default what the key says.")] = None,
    wait: Wait = 10.0,
    as_json: AsJson = False,
) -> None:
    """Run kernels on a board; compare its CPU's features and the results with what they should be."""
    from nnfuze_tvm.analysis.device_check import check_device
    from nnfuze_tvm.devices.boards import BOARDS

    if target is None and key not in BOARDS:
        raise DeviceError(
            f"device {key!r}: no board of the catalogue; say what it should be, for example --target rpi4"
        )
    with progress() as announce:
        found = check_device(tracker, key, target or key, wait, announce)
    if as_json:
        print(json.dumps(found.to_dict(), indent=1))
    else:
        from nnfuze_tvm.report.boards import render_check

        out().print(render_check(found), highlight=False)
    if found.problem:
        raise DeviceError(f"device {key!r} at {found.address}: {found.problem}")


@app.command("tracker")
def tracker_command(
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port that boards and clients connect to.")] = 9190,
) -> None:
    """Run a tracker, where boards register and clients ask for one, until Ctrl-C.

    Whoever reaches it reaches the boards, which run any code: use it in networks that you trust.
    """
    from nnfuze_tvm.devices.remote import tracker as trackers

    with until_ended():
        print(f"nnfuze: tracker on port {port}; Ctrl-C ends it", file=sys.stderr, flush=True)
        trackers.track(port)


@app.command("serve")
def serve_command(tracker: Tracker, key: Key) -> None:
    """Run what clients send to this machine, until Ctrl-C: the command for the board.

    It waits for a tracker that isn't there yet, and outlives kernels that crash or never end. Whoever reaches the
    tracker runs any code here: use it in networks that you trust.
    """
    from nnfuze_tvm.devices.remote import server
    from nnfuze_tvm.devices.remote.tracker import parse_address

    with until_ended():
        server.start(parse_address(tracker), key)


@app.command("emulate")
def emulate_command(
    tracker: Tracker,
    key: Key,
    cpu: Annotated[
        str | None, typer.Option(help="A CPU model of QEMU, such as cortex-a72; by default that of the key's board.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="How many boards.")] = 1,
) -> None:
    """Run emulated 64-bit ARM boards on this machine, until Ctrl-C.

    They compute what the real ones do, bit by bit, but their speed says nothing. Needs the Debian packages qemu-user
    and mmdebstrap. The first time, an ARM system of 220 MB is downloaded into ~/.cache/nnfuze.
    """
    from nnfuze_tvm.devices.boards import BOARDS
    from nnfuze_tvm.devices.remote import emulator

    if cpu is None and (key not in BOARDS or not (cpu := BOARDS[key].emulated)):
        raise DeviceError(f"device {key!r}: no board that can be emulated; say what CPU, for example --cpu cortex-a72")
    with until_ended(), ExitStack() as stack:
        with progress() as announce:
            boards = stack.enter_context(emulator.emulate(cpu, tracker, key, count, announce=announce))
        print(
            f"nnfuze: {count} × {cpu} registered as {key} with {tracker}; Ctrl-C ends it", file=sys.stderr, flush=True
        )
        while all(board.poll() is None for board in boards):
            time.sleep(0.5)
        raise DeviceError(f"an emulated board registered as {key} has ended")
