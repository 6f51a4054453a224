"""One tracker and one emulated board per CPU model for all tests of this folder, which only `make test-arm` runs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tvm

from nnfuze_tvm.devices.remote import emulator
from nnfuze_tvm.devices.remote import tracker as trackers
from tests.servers import embedded


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("NNFUZE_TEST_ARM") != "1":
        here = f"{Path(__file__).parent}{os.sep}"
        for item in items:
            if str(item.path).startswith(here):
                item.add_marker(pytest.mark.skip(reason="emulated boards: run `make test-arm`"))


@pytest.fixture(scope="session")
def tracker() -> Iterator[str]:
    """The address of a tracker that knows no boards yet."""
    with embedded(servers=0) as running:
        yield running.address


@pytest.fixture(scope="session")
def board(tracker: str) -> Iterator[Callable[[str], str]]:
    """A function that returns the key of an emulated board by its CPU model; it's started when first asked for."""
    with contextlib.ExitStack() as stack:
        keys: dict[str, str] = {}

        def key_of(cpu: str) -> str:
            if cpu not in keys:
                stack.enter_context(emulator.emulate(cpu, tracker, f"test-{cpu}"))
                keys[cpu] = f"test-{cpu}"
            return keys[cpu]

        yield key_of


@pytest.fixture
def session(tracker: str) -> Iterator[Callable[[str], tvm.rpc.RPCSession]]:
    """A function that opens a session on a board by its key; the test's end is the session's."""
    with contextlib.ExitStack() as stack:

        def open_session(key: str) -> tvm.rpc.RPCSession:
            remote, _ = trackers.request(trackers.connect(tracker), key, 600)
            stack.callback(trackers.end_session, remote)
            return remote

        yield open_session
