"""How many threads a network's kernels get, and that their number changes no bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tvm import relax
from tvm.target import Target

from nnfuze_tvm.deploy import build
from nnfuze_tvm.deploy.runner import Input, Output, Runner
from nnfuze_tvm.devices.targets import resolve
from nnfuze_tvm.devices.toolchain import linker_for

SHAPE = (1, 28, 28, 64)


@pytest.fixture(scope="module")
def library() -> relax.VMExecutable:
    """One convolution, large enough that its rule shares it among cores."""
    config = {**resolve("host").export(), "num-cores": 2}
    weights = np.random.default_rng(0).standard_normal((64, 3, 3, 64)).astype("float32") / 24
    builder = relax.BlockBuilder()
    data = relax.Var("x", relax.TensorType(SHAPE, "float32"))
    with builder.function("main", [data]):
        with builder.dataflow():
            layer = relax.op.nn.conv2d(
                data, relax.const(weights), padding=1, data_layout="NHWC", kernel_layout="OHWI", out_dtype="float32"
            )
            result = builder.emit_output(relax.Tuple([builder.emit(layer)]))
        builder.emit_func_output(result)
    return build.build(builder.get(), Target(config))


def runner(library: relax.VMExecutable, threads: int) -> Runner:
    return Runner(library, [Input("x", SHAPE, "float32")], [Output("task", "y", SHAPE, "float32")], threads=threads)


def cpu_seconds() -> dict[str, float]:
    """Seconds that each thread of this process has computed."""
    found = {}
    for task in Path("/proc/self/task").iterdir():
        found[task.name] = int((task / "schedstat").read_text().split()[0]) / 1e9
    return found


def threads_of(call: Callable[[], object]) -> int:
    """How many threads take a share of a call."""
    call()
    # Workers that an earlier call left spin before they sleep; other libraries' threads wake up now and then.
    while True:
        before = cpu_seconds()
        time.sleep(0.2)
        after = cpu_seconds()
        own = str(threading.get_native_id())
        if all(seconds - before.get(task, 0.0) < 0.02 for task, seconds in after.items() if task != own):
            break
    before = cpu_seconds()
    started = time.process_time()
    while time.process_time() - started < 0.5:
        call()
    spent = [seconds - before.get(task, 0.0) for task, seconds in cpu_seconds().items()]
    return sum(seconds > 0.2 * max(spent) for seconds in spent)


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="needs Linux's count of a thread's seconds")
@pytest.mark.parametrize("threads", [1, 2])
def test_a_parallel_kernel_gets_its_threads(library: relax.VMExecutable, threads: int) -> None:
    if len(os.sched_getaffinity(0)) < threads:
        pytest.skip("needs two CPUs")
    network = runner(library, threads)
    x = np.random.default_rng(1).standard_normal(SHAPE).astype("float32")
    assert threads_of(lambda: network.run({"x": x})) == threads


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's list of a process's threads")
def test_a_network_for_one_thread_starts_no_other(library: relax.VMExecutable, tmp_path: Path) -> None:
    library.export_library(str(tmp_path / "lib.so"), fcompile=linker_for(resolve("host")))
    program = f"""
import os, numpy, tvm
from nnfuze_tvm.deploy.runner import Input, Output, Runner
inputs, outputs = [Input("x", {SHAPE}, "float32")], [Output("task", "y", {SHAPE}, "float32")]
x = numpy.ones({SHAPE}, "float32")
found = [len(os.listdir("/proc/self/task"))]
library = tvm.runtime.load_module({str(tmp_path / "lib.so")!r})
for threads in (1, 2):
    Runner(library, inputs, outputs, threads=threads).run(dict(x=x))
    found.append(len(os.listdir("/proc/self/task")))
print(*found)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    before, one, two = map(int, done.stdout.split())
    assert one == before
    # The workers are there when they are asked for, also after a call without them.
    assert two == before + len(os.sched_getaffinity(0)) - 1


def test_workers_sleep_between_inferences(library: relax.VMExecutable, tmp_path: Path) -> None:
    library.export_library(str(tmp_path / "lib.so"), fcompile=linker_for(resolve("host")))
    program = f"""
import time, numpy, tvm
from nnfuze_tvm.deploy.runner import Input, Output, Runner
inputs, outputs = [Input("x", {SHAPE}, "float32")], [Output("task", "y", {SHAPE}, "float32")]
network = Runner(tvm.runtime.load_module({str(tmp_path / "lib.so")!r}), inputs, outputs, threads=2)
network.run(dict(x=numpy.ones({SHAPE}, "float32")))
before = time.process_time()
time.sleep(1)
print(time.process_time() - before)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    # TVM's own would compute nothing for 0.1 s or more.
    assert float(done.stdout) < 0.05


def test_every_number_of_threads_gives_the_same_bits(library: relax.VMExecutable) -> None:
    x = np.random.default_rng(1).standard_normal(SHAPE).astype("float32")
    one, two, three = (runner(library, threads).run({"x": x})["task"] for threads in (1, 2, 3))
    np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(one, three)


def test_outputs_are_the_callers_own() -> None:
    """Whatever the network gives: what it computed, an input, a view of it, a constant, one result twice."""
    builder = relax.BlockBuilder()
    data = relax.Var("x", relax.TensorType((2, 3), "float32"))
    constant = np.arange(6, dtype="float32")
    with builder.function("main", [data]):
        with builder.dataflow():
            added = builder.emit(data + relax.const(constant.reshape(2, 3)))
            view = builder.emit(relax.op.reshape(data, (6,)))
            same = builder.emit(relax.op.reshape(added, (6,)))
            result = builder.emit_output(relax.Tuple([added, data, view, relax.const(constant), same, added]))
        builder.emit_func_output(result)
    shapes = [(2, 3), (2, 3), (6,), (6,), (6,), (2, 3)]
    outputs = [Output("task", f"y{n}", shape, "float32") for n, shape in enumerate(shapes)]
    network = Runner(build.build(builder.get(), resolve("host")), [Input("x", (2, 3), "float32")], outputs)
    answers = []
    for call in range(5):
        x = np.full((2, 3), call, "float32")
        total = x + constant.reshape(2, 3)
        expected = [total, x, x.reshape(6), constant, total.reshape(6), total]
        answer = list(network.run({"x": x})["task"].values())
        answers.append((answer, [array.copy() for array in expected]))
        for array, right in zip(answer, expected, strict=True):
            np.testing.assert_array_equal(array, right)
    for answer, expected in answers:
        for n, (array, right) in enumerate(zip(answer, expected, strict=True)):
            np.testing.assert_array_equal(array, right)
            array.fill(-1 - n)
    for answer, _ in answers:
        for n, array in enumerate(answer):
            assert (array == -1 - n).all()
    x = np.full((2, 3), 9, "float32")
    np.testing.assert_array_equal(network.run({"x": x})["task"]["y3"], constant)


def in_a_fork(check: Callable[[], bool]) -> bool:
    """Tell whether a check holds in a forked process, within a while."""
    child = os.fork()
    if not child:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(30)
        held = False
        try:
            held = check()
        finally:
            os._exit(0 if held else 1)
    return os.waitpid(child, 0)[1] == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked_processes_get_threads_of_their_own(library: relax.VMExecutable) -> None:
    """The pool is one per thread, so the test takes a thread and leaves the others as they are."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two CPUs")
    x = np.random.default_rng(1).standard_normal(SHAPE).astype("float32")
    found = []

    def work() -> None:
        two, one = runner(library, 2), runner(library, 1)
        want = two.run({"x": x})["task"]

        def right() -> bool:
            return all(np.array_equal(network.run({"x": x})["task"], want) for network in (two, one, two))

        found.append(in_a_fork(lambda: right() and in_a_fork(right)))
        found.append(right())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [True, True]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_network_that_another_thread_was_running_when_forked(library: relax.VMExecutable) -> None:
    network = runner(library, 1)
    with network._lock:
        assert in_a_fork(lambda: network.run({"x": np.zeros(SHAPE, "float32")})["task"].shape == SHAPE)
