"""The embedded tracker, its end, and what a user is told when there is no tracker or no device."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import tvm
from tvm.script import tirx as T

from nnfuze_tvm.devices import targets, toolchain
from nnfuze_tvm.devices.remote import tracker
from nnfuze_tvm.errors import DeviceError


@pytest.fixture(scope="module")
def running() -> Iterator[tracker.EmbeddedTracker]:
    with tracker.EmbeddedTracker(servers=2, key="pair") as embedded:
        yield embedded


def test_devices_register_and_run(running: tracker.EmbeddedTracker) -> None:
    session = tracker.connect(running.place)
    assert len(tracker.devices(session)["pair"]) == 2
    remote, device = tracker.request(session, "pair", 10)
    assert device in tracker.devices(session)["pair"]
    data = np.arange(6, dtype=np.float32)
    np.testing.assert_array_equal(tvm.runtime.tensor(data, remote.cpu(0)).numpy(), data)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_devices_stay_on_the_cores_of_the_job() -> None:
    allowed = os.sched_getaffinity(0)
    if len(allowed) < 2:
        pytest.skip("needs two cores")
    known = set(psutil.Process().children(recursive=True))
    os.sched_setaffinity(0, {max(allowed)})
    try:
        with tracker.EmbeddedTracker(key="bound") as embedded:
            remote, _ = tracker.request(tracker.connect(embedded.place), "bound", 10)
            remote.get_function("runtime.config_threadpool")(1, 1)
            started = set(psutil.Process().children(recursive=True)) - known
            # Of every thread: a process has the affinity of its first one.
            cores = {tuple(psutil.Process(t.id).cpu_affinity()) for child in started for t in child.threads()}
    finally:
        os.sched_setaffinity(0, allowed)
    assert cores == {(max(allowed),)}


def test_a_crashing_kernel_does_not_cost_the_device(running: tracker.EmbeddedTracker, tmp_path: Path) -> None:
    @T.prim_func(s_tir=True)
    def main(a: T.Buffer((1,), "float32")) -> None:
        for i in range(1):
            with T.sblock("a"):
                T.evaluate(T.call_extern("int32", "abort"))
                a[i] = 0.0

    target = targets.resolve("host")
    built = tvm.compile(tvm.IRModule({"main": main}), target=target)
    path = toolchain.export_library(built, tmp_path / "crash.so", target)
    session = tracker.connect(running.place)
    for _ in range(3):
        remote, _ = tracker.request(session, "pair", 10)
        remote.upload(str(path))
        module = remote.load_module("crash.so")
        with pytest.raises(Exception):  # noqa: B017
            module["main"](tvm.runtime.tensor(np.zeros(1, np.float32), remote.cpu(0)))
        del remote, module
    assert len(tracker.wait_for_device(session, "pair", 5, count=2)) == 2


def test_no_device_under_the_key(running: tracker.EmbeddedTracker) -> None:
    session = tracker.connect(running.place)
    with pytest.raises(DeviceError, match=r"no device under key 'rpi' after 0.3 s; registered keys: pair"):
        tracker.wait_for_device(session, "rpi", 0.3)


def test_everything_ends_with_the_context() -> None:
    before = set(psutil.Process().children(recursive=True))
    with pytest.raises(ZeroDivisionError), tracker.EmbeddedTracker() as embedded:
        children = set(psutil.Process().children(recursive=True)) - before
        assert len(children) >= 3
        address = embedded.address
        raise ZeroDivisionError
    assert not psutil.wait_procs(list(children), timeout=60)[1]
    with pytest.raises(DeviceError):
        tracker.connect(address, 0.1)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_everything_ends_when_the_process_is_killed(how: signal.Signals) -> None:
    code = (
        "import sys, time; from nnfuze_tvm.devices.remote import tracker\n"
        "with tracker.EmbeddedTracker() as t:\n  print(t.address, flush=True); time.sleep(60)"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=env, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("127.0.0.1:")
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) >= 3
        process.send_signal(how)
        process.wait(60)
    assert not psutil.wait_procs(children, timeout=60)[1]


@pytest.mark.parametrize("address", ["nonsense", "host:", "host:99999", ":9190"])
def test_malformed_addresses(address: str) -> None:
    with pytest.raises(DeviceError, match="write it as host:port"):
        tracker.connect(address)


def test_nothing_listens() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    start = time.monotonic()
    with pytest.raises(DeviceError, match=r"no answer within 0.3 s .*refused"):
        tracker.connect(f"127.0.0.1:{port}", 0.3)
    assert time.monotonic() - start < 3


def test_something_else_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            peer, _ = server.accept()
            peer.sendall(b"HTTP/1.1 400 Bad Request\r\n")
            peer.close()

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(DeviceError, match="it is something else"):
            tracker.connect(f"127.0.0.1:{server.getsockname()[1]}", 2)
        thread.join()


def test_something_silent_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        with pytest.raises(DeviceError, match=r"no answer within 0.6 s"):
            tracker.connect(f"127.0.0.1:{server.getsockname()[1]}", 0.6)
