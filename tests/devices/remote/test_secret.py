"""The file with the secret, the proof of knowing it, and who is told what when it isn't known."""

from __future__ import annotations

import os
import socket
import stat
import threading
from pathlib import Path

import pytest

from nnfuze_tvm.devices.remote import secret, wire
from nnfuze_tvm.errors import DeviceError


def test_a_new_file_is_its_owners(tmp_path: Path) -> None:
    path = tmp_path / "some" / "secret"
    made = secret.read_or_make(path)
    assert len(made) == 64 and secret.read_or_make(path) == secret.read(path) == made
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602])
def test_files_that_others_can_use(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "secret"
    secret.read_or_make(path)
    path.chmod(mode)
    with pytest.raises(DeviceError, match="others can use it; chmod 600"):
        secret.read(path)


def test_files_that_hold_none(tmp_path: Path) -> None:
    (short := tmp_path / "short").write_text("password")
    (long := tmp_path / "long").write_text("x" * 5000)
    os.mkfifo(fifo := tmp_path / "fifo")
    for path in (short, long, fifo):
        path.chmod(0o600)
        with pytest.raises(DeviceError, match="random characters are a secret"):
            secret.read(path)
    with pytest.raises(DeviceError, match="can't be read"):
        secret.read(tmp_path)
    with pytest.raises(DeviceError, match="there is none"):
        secret.read(tmp_path / "none")
    with pytest.raises(DeviceError, match="can't be made"):
        secret.read_or_make(short / "below")


def test_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert secret.where("given") == Path("given")
    assert secret.where() == Path(os.environ[secret.VARIABLE])
    monkeypatch.delenv(secret.VARIABLE)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert secret.where() == tmp_path / "nnfuze" / "secret"


def both(client: wire.Steps[None], server: wire.Steps[None]) -> tuple[Exception | None, Exception | None, list[bytes]]:
    """Let two sides talk; return how each ended, and what the client was sent."""
    near, far = socket.socketpair()
    sent: list[bytes] = []
    ends: dict[str, Exception | None] = {}

    def recorded(steps: wire.Steps[None]) -> wire.Steps[None]:
        wanted = next(steps)
        while True:
            if isinstance(wanted, bytes):
                sent.append(wanted)
            received = yield wanted
            try:
                wanted = steps.send(received)
            except StopIteration:
                return

    def run(name: str, sock: socket.socket, steps: wire.Steps[None]) -> None:
        with sock:
            try:
                ends[name] = wire.converse(sock, steps, 5)
            except Exception as err:
                ends[name] = err

    thread = threading.Thread(target=run, args=("server", far, recorded(server)))
    thread.start()
    run("client", near, client)
    thread.join()
    return ends["client"], ends["server"], sent


def test_who_knows_the_secret_is_let_in() -> None:
    known = secret.fresh()
    client, server, _ = both(wire.prove(known, wire.TRACKER), wire.demand(known, wire.TRACKER))
    assert client is None and server is None


def test_who_does_not_is_shown_nothing_that_depends_on_it() -> None:
    known = secret.fresh()
    client, server, sent = both(wire.prove(secret.fresh(), wire.TRACKER), wire.demand(known, wire.TRACKER))
    assert isinstance(client, wire.RefusedError) and isinstance(server, wire.RefusedError)
    # A magic word and a random number.
    assert [len(part) for part in sent] == [36]


def test_a_proof_is_for_one_purpose() -> None:
    known = secret.fresh()
    client, server, _ = both(wire.prove(known, wire.TRACKER), wire.demand(known, wire.SESSION))
    assert isinstance(client, wire.RefusedError) and isinstance(server, wire.RefusedError)


def test_an_impostor_is_found_out() -> None:
    def impostor() -> wire.Steps[None]:
        """Gives back what it gets."""
        yield (yield 36)
        yield (yield 32)

    client, _, _ = both(wire.prove(secret.fresh(), wire.SESSION), impostor())
    assert isinstance(client, wire.RefusedError) and "doesn't know the secret" in str(client)


def test_a_side_that_is_slow_is_given_up() -> None:
    near, far = socket.socketpair()
    with near, far, pytest.raises(OSError, match="timed out"):
        wire.converse(near, wire.prove(secret.fresh(), wire.TRACKER), 0.1)
