"""What a CPU says about itself, here and through a board's server."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import platform
from collections.abc import Iterator

import pytest
from tvm import rpc
from tvm.rpc.server import Server

from nnfuze_tvm.devices import cpu
from nnfuze_tvm.devices.remote import tracker
from tests.servers import embedded


@pytest.fixture(scope="module")
def remote() -> Iterator[rpc.RPCSession]:
    with embedded() as devices:
        session = tracker.connect(devices.address)
        yield tracker.request(session, tracker.LOCAL_KEY)[0]
        session.close()


def test_a_board_says_the_same(remote: rpc.RPCSession) -> None:
    assert cpu.of(remote) == cpu.this()


def test_this_cpu() -> None:
    here = cpu.this()
    assert here.machine == platform.machine()
    assert here.flags & {"asimd", "sse2"}


def own_server(channel: multiprocessing.connection.Connection) -> None:
    server = Server("127.0.0.1", 9290, 9390, is_proxy=False, silent=True)
    channel.send(server.port)
    channel.recv()


def test_the_server_of_tvm_does_not_say() -> None:
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=own_server, args=(theirs,))
    process.start()
    try:
        session = rpc.connect("127.0.0.1", ours.recv())
        assert cpu.of(session) is None
        del session
    finally:
        ours.close()
        process.join()
