"""What the tests of the schedule rules share: fused kernels of a Relax module, scheduled, built and run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import tvm
from tvm import relax, s_tir, tirx
from tvm.target import Target

from nnfuze_tvm import schedules
from nnfuze_tvm.deploy import build
from nnfuze_tvm.devices.targets import resolve
from nnfuze_tvm.passes import pipeline
from nnfuze_tvm.schedules.families import fallback
from tests import bounds

HOST = resolve("host")


@dataclass(frozen=True)
class Scheduled:
    """What ``schedule_and_run`` returns: the outputs in order, and the rule that took each kernel."""

    outputs: list[np.ndarray]
    rules: dict[str, str]


def single_function(
    params: Mapping[str, tuple[tuple[int, ...], str]],
    body: Callable[[relax.BlockBuilder, list[relax.Var]], relax.Expr],
) -> tvm.IRModule:
    """Return a Relax module with one function ``main``, whose parameters are given as name → (shape, dtype)."""
    builder = relax.BlockBuilder()
    variables = [relax.Var(name, relax.TensorType(shape, dtype)) for name, (shape, dtype) in params.items()]
    with builder.function("main", variables):
        with builder.dataflow():
            value = body(builder, variables)
            if isinstance(value.ty, tvm.ir.TupleType):
                value = relax.Tuple([builder.emit(relax.TupleGetItem(value, i)) for i in range(len(value.ty.fields))])
            result = builder.emit_output(value)
        builder.emit_func_output(result)
    return builder.get()


def fuse(mod: tvm.IRModule, target: Target) -> tvm.IRModule:
    """Bring a Relax module to fused NHWC PrimFuncs, each of one operator's own form, without any schedule."""
    machine = build.machine(target)
    return tvm.transform.Sequential([pipeline.layout_phase(), pipeline.kernel_phase(machine)])(mod)


def fused_kernels(mod: tvm.IRModule, target: Target = HOST) -> dict[str, tvm.IRModule]:
    """Return each fused PrimFunc of a Relax module by its name, as a module whose only function is ``main``."""
    return {
        gv.name_hint: tvm.IRModule({"main": func.with_attr("global_symbol", "main")})
        for gv, func in fuse(mod, target).functions.items()
        if isinstance(func, tirx.PrimFunc)
    }


def schedule(
    mod: tvm.IRModule, target: Target, tunable: bool = False, seed: int = 1
) -> tuple[tvm.IRModule, dict[str, str]]:
    """Fuse a Relax module and schedule each kernel; return it with the rules' names by kernel."""
    fused = fuse(mod, target)
    rules = {}
    for gv, func in list(fused.functions.items()):
        if not isinstance(func, tirx.PrimFunc):
            continue
        sch = s_tir.Schedule(tvm.IRModule({"main": func.with_attr("global_symbol", "main")}), seed=seed)
        rules[gv.name_hint] = schedules.apply(sch, target, tunable)
        fused[gv] = schedules.apply_rewrites(fallback.with_block(sch)).without_attr("global_symbol")
        assert not bounds.outside(fused[gv], target)
    return tvm.transform.Sequential(build.packing_passes())(fused), rules


def run(mod: tvm.IRModule, target: Target, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """Build a Relax module for ``target`` as it is, run ``main`` once, return the outputs in order."""
    params = [param.name for param in mod["main"].params]
    machine = relax.VirtualMachine(tvm.compile(mod, target=target), tvm.cpu())
    result = machine["main"](*(tvm.runtime.tensor(np.ascontiguousarray(inputs[name])) for name in params))
    fields = [result] if isinstance(result, tvm.runtime.Tensor) else list(result)
    return [field.numpy() for field in fields]


def schedule_and_run(
    mod: tvm.IRModule,
    target: Target,
    inputs: Mapping[str, np.ndarray],
    tunable: bool = False,
    seed: int = 1,
) -> Scheduled:
    """Fuse, schedule and build a Relax module, and run its ``main`` once.

    Parameters
    ----------
    mod : tvm.IRModule
        One Relax function, ``main``, with static shapes; operators in NCHW or NHWC.
    target : tvm.target.Target
        A CPU that this machine can run.
    inputs : Mapping[str, np.ndarray]
        One array per parameter of ``main``, by its name.
    tunable, seed
        Sample the knobs of the rules, from this seed (positive).
    """
    scheduled, rules = schedule(mod, target, tunable, seed)
    return Scheduled(run(scheduled, target, inputs), rules)


def assembly_of(sch: s_tir.Schedule, target: Target) -> str:
    """Return the assembly of a scheduled kernel whose weights are packed already."""
    whole = tvm.IRModule({"main": schedules.apply_rewrites(sch.mod["main"])})
    built = tvm.s_tir.transform.RemoveWeightLayoutRewriteBlock(skip_tensor_rewrite=True)(whole)
    return tvm.compile(built, target=target).mod.inspect_source("asm")


def assembly(mod: tvm.IRModule, target: Target) -> str:
    """Return the assembly of the only kernel of a Relax module, scheduled for ``target``."""
    (kernel,) = fused_kernels(mod, target).values()
    sch = s_tir.Schedule(kernel)
    schedules.apply(sch, target)
    return assembly_of(sch, target)
