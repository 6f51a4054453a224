"""Runs a bundle with nothing but TVM's runtime and NumPy: ``python run.py BUNDLE INPUT=ARRAY.npy ...``.

Prints one line per output, its task and then its values with all their digits, and how long one inference took.
Arrays with one axis more than the inputs have are several inferences, one after the other; each begins with the states
that the one before left. What has one value only has it in all of them.
"""

import hashlib
import json
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

with open(f"{bundle}/lib.so", "rb") as file:
    code = file.read()
if hashlib.sha256(code).hexdigest() != manifest["files"]["lib.so"]["sha256"]:
    sys.exit(f"error: {bundle}/lib.so: damaged, its checksum doesn't match; copy the bundle again")
with open(os.memfd_create("lib.so"), "wb") as copy:  # what was checked is what is loaded
    copy.write(code)
    copy.flush()
    del code
    library = tvm.get_global_func("ffi.Module.load_from_file.so")(f"/proc/self/fd/{copy.fileno()}", "so")
network = VirtualMachine(library, tvm.cpu())["main"]
if manifest["threads"] == 1:
    os.environ["TVM_NUM_THREADS"] = "1"  # else TVM makes a pool for all cores, whose workers spin
else:
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
