"""How many threads kernels run on, also in processes that were forked."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import tvm

# So often a worker looks for work before it sleeps: some milliseconds, longer than it waits within an inference.
# TVM's own 300,000 keep a core busy between inferences, and on a machine that is busy a process takes minutes to end.
os.environ.setdefault("TVM_THREAD_POOL_SPIN_COUNT", "4000")

# TVM keeps one pool of worker threads, and its size, per calling thread.
_state = threading.local()
# The thread that calls kernels for one whose pool is lost.
_helper: ThreadPoolExecutor | None = None


def configured() -> int | None:
    """Return the number of threads that this thread's kernels run on, if it was set."""
    return getattr(_state, "threads", None)


def use_threads(count: int) -> None:
    """Let kernels that this thread calls run on ``count`` threads (at most the CPUs there are)."""
    share_all_cores = -3
    with _affinity_kept() as cpus:
        if min(count, len(cpus)) == 1:
            # `runtime.config_threadpool` would make a pool first, and its workers spin for a while before they sleep.
            _set_max_concurrency(1)
        else:
            # With the CPUs named, always: TVM makes as many workers as it was told of first and uses no more later;
            # told of none, it takes half of this machine's for hyper-threads and runs parallel loops on those alone.
            configure = tvm.get_global_func("runtime.config_threadpool")
            configure(share_all_cores, min(count, len(cpus)), [str(cpu) for cpu in cpus])
            _state.has_pool = True
    _state.threads = count


def lost() -> bool:
    """Tell whether the process was forked and this thread's pool left behind: kernels would wait for it forever."""
    return getattr(_state, "is_lost", False)


def elsewhere(call: Callable[[], Any]) -> Any:
    """Return what a call returns in another thread, which has a pool of its own."""
    global _helper
    if _helper is None:
        _helper = ThreadPoolExecutor(1, thread_name_prefix="nnfuze")
    return _helper.submit(call).result()


def _forked() -> None:
    global _helper
    _helper = None
    if getattr(_state, "has_pool", False):
        _state.is_lost, _state.threads = True, None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


def _set_max_concurrency(count: int) -> None:
    """Call ``tvm::runtime::threading::SetMaxConcurrency``, which no global function does without making a pool."""
    ctypes.CDLL(None)["_ZN3tvm7runtime9threading17SetMaxConcurrencyEi"](ctypes.c_int(count))


@contextmanager
def _affinity_kept() -> Iterator[list[int]]:
    # TVM pins the thread that makes a pool to one core, where everything started from it later would crowd too.
    if not hasattr(os, "sched_getaffinity"):
        yield list(range(os.cpu_count() or 1))
        return
    cpus = os.sched_getaffinity(0)
    try:
        yield sorted(cpus)
    finally:
        os.sched_setaffinity(0, cpus)
