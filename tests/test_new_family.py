"""A new operator family is two files: what the operator is, and how its kernels become loops."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nnfuze_tvm

OPERATORS = '''
"""Products of all pairs."""

import numpy as np
from tvm.relax import op

from nnfuze_tvm.graph.ops.operator import Example, Operator

OPERATORS = {
    "outer": Operator(
        effect="mixes",
        evaluate=lambda call, left, right: np.outer(left, right),
        examples=(Example(((24,), (32,)), op.outer),),
        kernels=("pairs",),
    )
}
'''
RULE = '''
"""Products of all pairs: rows of the result, one after the other."""

from nnfuze_tvm.schedules.blocks import blocks, iter_kinds
from nnfuze_tvm.schedules.rule import Rule


def apply(sch, hw, tunable):
    found = blocks(sch)
    if len(found) != 1 or iter_kinds(sch, found[0]) != "SS" or len(sch.get(found[0]).reads) != 2:
        return False
    sch.vectorize(sch.split(sch.get_loops(found[0])[-1], [None, hw.lanes("float32")])[-1])
    return True


RULE = Rule("pairs", apply)
'''
SCRIPT = """
import json, numpy as np, tvm
from tvm import relax
from nnfuze_tvm.analysis import metrics
from nnfuze_tvm.deploy import build
from nnfuze_tvm.devices.targets import resolve
from nnfuze_tvm.graph import ops
from nnfuze_tvm.graph.evaluate import evaluate
from tests.graph.calls import calls, examples

named = examples("products")
mod, data = calls(named)
lowered = build.lower(mod, resolve("host"))
machine = relax.VirtualMachine(build.generate(lowered, resolve("host")), tvm.cpu())
(got,) = machine["main"](*(tvm.runtime.tensor(array) for array in data.values()))
equal = np.array_equal(got.numpy(), evaluate(mod["main"], data)[0])
print(json.dumps({"rules": [kernel.rule for kernel in metrics.kernels(lowered)], "equal": equal}))
"""


def test_a_new_family_is_two_files(tmp_path: Path) -> None:
    package = tmp_path / "nnfuze_tvm"
    shutil.copytree(Path(nnfuze_tvm.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "graph" / "ops" / "products.py").write_text(OPERATORS)
    (package / "schedules" / "families" / "products.py").write_text(RULE)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(__file__).parents[1])])}

    def run(*arguments: str) -> str:
        command = [sys.executable, *arguments]
        done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert json.loads(run("-c", SCRIPT)) == {"rules": ["pairs"], "equal": True}
    listed = {record["name"]: record for record in json.loads(run("-m", "nnfuze_tvm", "ops", "--json"))}
    assert listed["outer"]["rules"] == ["pairs"]
