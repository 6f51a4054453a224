"""Runs a bundle with nothing but TVM's runtime and NumPy: ``python run.py BUNDLE INPUT=ARRAY.npy ...``.

Prints one line per output, its task and then its values with all their digits, and how long one inference took.
Arrays with one axis more than the inputs have are several inferences, one after the other; each begins with the states
that the one before left. What has one value only has it in all of them.
"""

import hashlib
import json
import math
import mmap
import os
import sys
import time

os.environ["TVM_USE_RUNTIME_LIB"] = "1"  # the compiler, 240 MB, stays out of it and may be deleted

import numpy as np
import tvm
from tvm.runtime.vm import VirtualMachine

bundle, *words = sys.argv[1:]
files = dict(word.split("=", 1) for word in words)
with open(f"{bundle}/manifest.json") as file:
    manifest = json.load(file)


def checked(name):
    """Return a file of the bundle, if it is what the manifest says."""
    with open(f"{bundle}/{name}", "rb") as file:
        found = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # nobody writes: the memory is the file's
    if hashlib.sha256(found).hexdigest() != manifest["files"][name]["sha256"]:
        sys.exit(f"error: {bundle}/{name}: damaged, its checksum doesn't match; copy the bundle again")
    return found


with open(os.memfd_create("lib.so"), "wb") as copy:  # what was checked is what is loaded
    copy.write(checked("lib.so"))
    copy.flush()
    library = tvm.get_global_func("ffi.Module.load_from_file.so")(f"/proc/self/fd/{copy.fileno()}", "so")
machine = VirtualMachine(library, tvm.cpu())
if weights := manifest["weights"]["kept"] + manifest["weights"]["spread"]:
    memory, end, tensors = checked("weights.bin"), 0, []
    for shape, dtype in weights:  # one behind the other, each from the next multiple of 64 bytes on
        array = np.frombuffer(memory, dtype, math.prod(shape), -(-end // 64) * 64)
        end = -(-end // 64) * 64 + array.nbytes
        tensors.append(tvm.runtime.from_dlpack(array.reshape(shape)))
    machine["nnfuze_weights"](*tensors)
network = machine["main"]
if manifest["threads"] == 1:
    os.environ["TVM_NUM_THREADS"] = "1"  # else TVM makes a pool for all cores, whose workers spin
else:
    os.environ.setdefault("TVM_THREAD_POOL_SPIN_COUNT", "4000")  # else they do so for a tenth of a second
    fastest_cores = 1
    tvm.get_global_func("runtime.config_threadpool")(fastest_cores, manifest["threads"])
arrays = [np.load(files[given["name"]]) for given in manifest["inputs"]]
calls = [a if a.ndim > len(i["shape"]) else [a] for a, i in zip(arrays, manifest["inputs"], strict=True)]
count = max(map(len, calls), default=1)
calls = [list(values) * (count if len(values) == 1 else 1) for values in calls]
states = [tvm.runtime.tensor(np.zeros(state["shape"], state["dtype"])) for state in manifest["states"]]

try:
    network(*(tvm.runtime.tensor(values[0]) for values in calls), *states)  # the first call makes threads and buffers
except (RuntimeError, ValueError) as error:  # the network checks shapes and types
    sys.exit(f"error: {bundle}: {str(error).splitlines()[0]}")
for values in zip(*calls, strict=True):
    inputs = [tvm.runtime.tensor(np.ascontiguousarray(value)) for value in values]
    started = time.perf_counter()
    answers = network(*inputs, *states)
    took = time.perf_counter() - started
    answers, states = answers[: len(answers) - len(states)], answers[len(answers) - len(states) :]
    for taken, answer in zip(manifest["outputs"], answers, strict=True):
        print(taken["task"], *(format(value, ".9g") for value in answer.numpy().ravel().tolist()))
print(f"{took * 1e3:.3f} ms", file=sys.stderr)
