"""Whole networks on emulated boards: in integers the bits of NumPy, in floats what ONNX Runtime computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import tvm
from tvm import relax

from benchmarks.arm.engines import CPUS
from benchmarks.networks import build as network
from benchmarks.networks import inputs as network_inputs
from nnfuze_tvm import load
from nnfuze_tvm.deploy import build
from nnfuze_tvm.deploy.executor import host_executor
from nnfuze_tvm.devices.boards import BOARDS
from nnfuze_tvm.devices.targets import resolve
from nnfuze_tvm.devices.toolchain import export_library
from nnfuze_tvm.graph import evaluate
from nnfuze_tvm.passes import pipeline
from nnfuze_tvm.passes.compress.half_precision import HalfPrecision
from nnfuze_tvm.passes.compress.insert_qdq import InsertQDQ
from nnfuze_tvm.passes.compress.policy import Policy
from nnfuze_tvm.passes.lower.integer.realize_integer import RealizeInteger

SPEECH = Path(__file__).parents[2] / "examples" / "speech"
PAIRS = {"pair-A": "shared", "pair-B": "independent"}
SMALL = [*PAIRS, "ds_cnn", "resnet8", "mobilenet_v1_025", "mlp_autoencoder", "transformer", "resnet18"]
# 0.3 to 4 billion multiply-adds: minutes each, most of it compiling.
LARGE = ["mobilenet_v1", "mobilenet_v2", "resnet50"]
# What is not slow: one network on every set of instructions, and those of seconds on a CPU or two. The pairs have ten
# layers of the kinds of resnet8's, and take a minute each; bundles of pairs are in `test_on_the_board`.
ALWAYS = {
    "pair-A": [],
    "pair-B": [],
    "ds_cnn": ["cortex-a53", "cortex-a76", "max"],
    "resnet8": ["max"],
    "mobilenet_v1_025": [],
    "mlp_autoencoder": ["cortex-a72"],
    "transformer": ["max"],
    "resnet18": [],
}
# Those whose weights don't amplify, layer by layer, what is rounded: MobileNet's random ones make a tenth of the range
# of rounding the values to float16, however exactly they are summed.
HALF = [*PAIRS, "ds_cnn", "resnet8", "transformer"]
Board = Callable[[str], str]
Session = Callable[[str], tvm.rpc.RPCSession]


@dataclass(frozen=True)
class Reference:
    """A network as graphs, one input, and what it answers: ONNX Runtime in float32, NumPy in integers.

    What has float layers between its integers is computed by kernels of this machine, which rounds floats as boards do.
    """

    fp32: tvm.IRModule
    fp16: tvm.IRModule
    int8: tvm.IRModule
    data: np.ndarray
    exact: list[np.ndarray]
    integer: list[np.ndarray]


@lru_cache(maxsize=1)
def reference(name: str) -> Reference:
    if name in PAIRS:
        models = [str(SPEECH / PAIRS[name] / f"{task}.onnx") for task in ("keyword", "speaker")]
        samples = np.load(SPEECH / "calibration.npz")["audio"][:32]
        mod, sessions = load(models), models
    else:
        model = network(name)
        (samples,) = network_inputs(model, 4, seed=1).values()
        mod, sessions = load([model], tasks=[name]), [model.SerializeToString()]
    fp32 = run_passes(pipeline.merge_phases(), mod)
    (parameter,) = fp32["main"].params
    calibration = {parameter.name: samples}
    fp16 = run_passes([HalfPrecision(Policy.uniform(bits=16))], fp32)
    int8 = run_passes([InsertQDQ(calibration, Policy.uniform(bits=8))], fp32)
    data = samples[:1]
    exact = []
    for model in sessions:
        session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        exact += session.run(None, {session.get_inputs()[0].name: data})
    return Reference(fp32, fp16, int8, data, exact, integers(int8, {parameter.name: data}))


def integers(int8: tvm.IRModule, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    exact = run_passes([pipeline.layout_phase(), RealizeInteger()], int8)
    return (host_executor(int8) if exact.attrs["nnfuze.float_layers"] else evaluate.executor(exact))(inputs)


def run_passes(phases: list[tvm.transform.Pass], mod: tvm.IRModule) -> tvm.IRModule:
    return tvm.transform.Sequential(list(phases))(mod)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("name", "cpu"),
    [
        pytest.param(name, cpu, marks=() if cpu in ALWAYS.get(name, ()) else pytest.mark.slow)
        for name in [*SMALL, *LARGE]
        for cpu in CPUS
    ],
)
def test_a_network_on_a_board(name: str, cpu: str, session: Session, board: Board, tmp_path: Path) -> None:
    wanted = reference(name)
    target = resolve(CPUS[cpu])
    remote = session(board(cpu))
    libraries = [("fp32.so", wanted.fp32), ("int8.so", wanted.int8)]
    if "fullfp16" in BOARDS[CPUS[cpu]].features and name in HALF:
        libraries += [("fp16.so", wanted.fp16)]
    for path, mod in libraries:
        export_library(build.build(mod, target), tmp_path / path, target)
        remote.upload(str(tmp_path / path))
        device = remote.cpu()
        machine = relax.VirtualMachine(remote.load_module(path), device)
        machine.set_input("main", tvm.runtime.tensor(wanted.data, device))
        machine.invoke_stateful("main")
        outputs = machine.get_outputs("main")
        if mod is not wanted.int8:
            tolerance = 1e-4 if mod is wanted.fp32 else 1e-2
            for output, exact in zip(outputs, wanted.exact, strict=True):
                assert np.abs(output.numpy() - exact).max() <= tolerance * np.ptp(exact)
        else:
            for output, integer in zip(outputs, wanted.integer, strict=True):
                np.testing.assert_array_equal(output.numpy(), integer)
