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
from nnfuze_tvm.cli.options import Insecure, SecretFile, check_wait
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
Host = Annotated[str, typer.Option(help="Address of this machine to listen on; by default nobody else reaches it.")]
User = Annotated[str | None, typer.Option(help="When started as root: run as this user.")]
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
def list_command(
    tracker: Tracker,
    secret_file: SecretFile = None,
    insecure: Insecure = False,
    wait: Wait = 10.0,
    as_json: AsJson = False,
) -> None:
    """Show which boards are registered with a tracker, and which of them are free."""
    from nnfuze_tvm.devices.remote import tracker as trackers

    session = trackers.connect(trackers.Place.of(tracker, secret_file, insecure), wait)
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
    secret_file: SecretFile = None,
    insecure: Insecure = False,
    wait: Wait = 10.0,
    as_json: AsJson = False,
) -> None:
    """Run kernels on a board; compare its CPU's features and the results with what they should be."""
    from nnfuze_tvm.analysis.device_check import check_device
    from nnfuze_tvm.devices.boards import BOARDS
    from nnfuze_tvm.devices.remote.tracker import Place

    if target is None and key not in BOARDS:
        raise DeviceError(
            f"device {key!r}: no board of the catalogue; say what it should be, for example --target rpi4"
        )
    with progress() as announce:
        found = check_device(Place.of(tracker, secret_file, insecure), key, target or key, wait, announce)
    if as_json:
        print(json.dumps(found.to_dict(), indent=1))
    else:
        from nnfuze_tvm.report.boards import render_check

        out().print(render_check(found), highlight=False)
    if found.problem:
        raise DeviceError(f"device {key!r} at {found.address}: {found.problem}")


@app.command("tracker")
def tracker_command(
    host: Host = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port that boards and clients connect to.")] = 9190,
    secret_file: SecretFile = None,
    insecure: Insecure = False,
    user: User = None,
) -> None:
    """Run a tracker, where boards register and clients ask for one, until Ctrl-C.

    Boards and clients must know the secret, which is made if there is none. With --insecure, whoever reaches the
    tracker reaches the boards, which run any code.
    """
    from nnfuze_tvm.devices.remote import secret, server, tracker_server, users

    with until_ended():
        known = None if insecure else secret.read_or_make(secret_file)
        with server.listen(host, port) as sock:
            users.become(user)
            where = "no secret" if insecure else f"the secret is in {secret.where(secret_file)}"
            print(f"nnfuze: tracker on {host}, port {port}, {where}; Ctrl-C ends it", file=sys.stderr, flush=True)
            _explain(host, port, insecure)
            tracker_server.serve(sock, known)


@app.command("serve")
def serve_command(
    tracker: Tracker,
    key: Key,
    host: Host = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port that clients connect to; 0: any.")] = 0,
    secret_file: SecretFile = None,
    insecure: Insecure = False,
    user: User = None,
    session_limit: Annotated[
        float, typer.Option(min=1, max=1e6, help="Seconds after which any session ends, whatever its client asked for.")
    ] = 3600.0,
) -> None:
    """Run what clients send to this machine, until Ctrl-C: the command for the board.

    It waits for a tracker that isn't there yet, and outlives kernels that crash or never end. Who knows the secret runs
    any code here; with --insecure, whoever reaches the tracker does.
    """
    from nnfuze_tvm.devices.remote import server, users
    from nnfuze_tvm.devices.remote.tracker import Place, parse_address

    def ready(port: int) -> None:
        users.become(user)
        _explain(host, port, insecure)

    with until_ended():
        known = Place.of(tracker, secret_file, insecure).secret
        server.start(parse_address(tracker), key, known, host=host, port=port, limit=session_limit, ready=ready)


def _explain(host: str, port: int, insecure: bool) -> None:
    """Say in a line what it means where others reach this machine."""
    from nnfuze_tvm.devices.remote.server import is_loopback

    if is_loopback(host):
        return
    who = "whoever reaches it can run any program" if insecure else "who doesn't know the secret gets nothing"
    print(
        f"nnfuze: other machines reach port {port}: {who}, and nothing is encrypted; to keep it on this machine, leave "
        f"out --host and tunnel: ssh -L {port}:127.0.0.1:{port} (or -R) between the two",
        file=sys.stderr,
        flush=True,
    )


@app.command("emulate")
def emulate_command(
    tracker: Tracker,
    key: Key,
    cpu: Annotated[
        str | None, typer.Option(help="A CPU model of QEMU, such as cortex-a72; by default that of the key's board.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="How many boards.")] = 1,
    host: Host = "127.0.0.1",
    secret_file: SecretFile = None,
    insecure: Insecure = False,
) -> None:
    """Run emulated 64-bit ARM boards on this machine, until Ctrl-C.

    They compute what the real ones do, bit by bit, but their speed says nothing. Needs the Debian packages qemu-user
    and mmdebstrap. The first time, an ARM system of 220 MB is downloaded into ~/.cache/nnfuze.
    """
    from nnfuze_tvm.devices.boards import BOARDS
    from nnfuze_tvm.devices.remote import emulator
    from nnfuze_tvm.devices.remote.tracker import Place

    if cpu is None and (key not in BOARDS or not (cpu := BOARDS[key].emulated)):
        raise DeviceError(f"device {key!r}: no board that can be emulated; say what CPU, for example --cpu cortex-a72")
    with until_ended(), ExitStack() as stack:
        with progress() as announce:
            place = Place.of(tracker, secret_file, insecure)
            boards = stack.enter_context(emulator.emulate(cpu, place, key, count, host=host, announce=announce))
        print(
            f"nnfuze: {count} × {cpu} registered as {key} with {tracker}; Ctrl-C ends it", file=sys.stderr, flush=True
        )
        while all(board.poll() is None for board in boards):
            time.sleep(0.5)
        raise DeviceError(f"an emulated board registered as {key} has ended")
