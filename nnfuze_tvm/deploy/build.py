"""From a graph to an executable for one target."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import tvm
from tvm import relax
from tvm.ir import GenericConst
from tvm.s_tir import meta_schedule as ms
from tvm.target import Target
from tvm.tirx.compilation_pipeline import get_tir_pipeline, register_tir_pipeline

from nnfuze_tvm.deploy import apart
from nnfuze_tvm.deploy.keep_tensors import KeepTensors
from nnfuze_tvm.deploy.manifest import INTERFACE
from nnfuze_tvm.deploy.memory.arena import ByteOffsets, allocating_passes
from nnfuze_tvm.deploy.memory.lower_peak import LowerPeak
from nnfuze_tvm.deploy.memory.plan import PER_THREAD, PlanMemory
from nnfuze_tvm.devices.hardware import Hardware
from nnfuze_tvm.graph import dataflow
from nnfuze_tvm.graph.ir import small_weights, static_shape
from nnfuze_tvm.passes import pipeline
from nnfuze_tvm.schedules.contraction import cycles, to_compute
from nnfuze_tvm.schedules.families import bit_serial
from nnfuze_tvm.schedules.fold_kernels import FoldKernels
from nnfuze_tvm.schedules.fuse_bands import FuseBands
from nnfuze_tvm.schedules.intrinsics import bounds, bytes_are_fast, rounding, wants_unsigned
from nnfuze_tvm.schedules.schedule_kernels import ScheduleKernels

# The name that TVM knows what makes machine code of a network by.
_CODE = "nnfuze"


def fuse(mod: tvm.IRModule, target: Target) -> tvm.IRModule:
    """Return the module of fused, unscheduled kernels (phases 5 to 9): what tuning extracts its tasks from."""
    return pipeline.fused_module(mod, target, machine(target))


def machine(target: Target) -> pipeline.Machine:
    """Return what the passes must know of a target."""
    hw = Hardware.of(target)
    triple = str(target.attrs.get("mtriple", ""))
    aarch64 = triple.startswith("aarch64")
    arm = aarch64 or triple.startswith("arm")
    channels, lanes = partial(to_compute, hw=hw), hw.lanes("float32")
    costs = partial(cycles, hw=hw)
    if str(target.kind) != "llvm":
        return pipeline.Machine(
            not bytes_are_fast(hw.features), hw.far_macs, None, False, None, channels, costs, lanes, False
        )
    return pipeline.Machine(
        integer_winograd=not bytes_are_fast(hw.features),
        far_macs=hw.far_macs,
        nearest=rounding.fcvtns if aarch64 else rounding.lrint,
        saturating=aarch64 or triple.startswith("x86"),
        bounds=bounds.of_machine(arm, "fullfp16" in hw.features),
        channels=channels,
        cycles=costs,
        lanes=lanes,
        unsigned=wants_unsigned(hw.features),
        keeps_nan=arm,
        bit_serial=partial(bit_serial.pays, hw=hw),
    )


def lower(mod: tvm.IRModule, target: Target, database: ms.Database | None = None) -> tvm.IRModule:
    """Return the module with every kernel fused, scheduled and its weights packed (phases 5 to 10).

    Parameters
    ----------
    mod : tvm.IRModule
        A graph in float or QDQ form.
    target : tvm.target.Target
        The CPU.
    database : tvm.s_tir.meta_schedule.Database, optional
        Tuning records; kernels without one get their rule's default knobs.
    """
    return schedule(fuse(mod, target), target, database)


def schedule(fused: tvm.IRModule, target: Target, database: ms.Database | None = None) -> tvm.IRModule:
    """Return a module of fused kernels, scheduled, their weights packed, in bands where that pays (phase 10)."""
    return _scheduled(fused, target, database, band_passes(target, small_weights(fused)))


def _scheduled(
    fused: tvm.IRModule, target: Target, database: ms.Database | None, more: Sequence[tvm.transform.Pass]
) -> tvm.IRModule:
    passes = [ScheduleKernels(target, database), *packing_passes(), *more]
    with target:
        return pipeline.phase("schedule", *passes)(fused)


def band_passes(target: Target, small: bool = False) -> list[tvm.transform.Pass]:
    """Return what makes one kernel of several scheduled ones; where weights are ``small``, for memory only."""
    return [LowerPeak(target)] if small else [LowerPeak(target), FuseBands(target)]


def packing_passes() -> list[tvm.transform.Pass]:
    """Return what follows in phase 10: what scheduled kernels say of the layout of constants is carried out."""
    return [
        relax.transform.SplitLayoutRewritePreproc(),
        FoldKernels(),
        relax.transform.DeadCodeElimination(),
    ]


def generate(lowered: tvm.IRModule, target: Target, interface: str = "") -> relax.VMExecutable:
    """Return the executable of a lowered module (phase 11).

    Its kernels don't check their arguments: ``main`` alone calls them, and that makes a quarter of a small library.

    Parameters
    ----------
    lowered : tvm.IRModule
        The network, lowered or `finished`, with its weights or without them (`apart.take_apart`).
    target : tvm.target.Target
        The CPU.
    interface : str
        What the executable's function `INTERFACE` returns: see `manifest.interface`.
    """
    if interface:
        builder = relax.BlockBuilder(lowered)
        with builder.function(INTERFACE, []):
            builder.emit_func_output(tvm.ir.StringImm(interface))
        lowered = builder.get()
    with target, tvm.transform.PassContext(config={"tirx.disable_assert": True}):
        return relax.build(
            lowered if PER_THREAD in (lowered["main"].attrs or {}) else finished(lowered, target),
            target=target,
            relax_pipeline=tvm.transform.Sequential(_calling()),
            tir_pipeline=_CODE,
            exec_mode="compiled",
        )


def finished(lowered: tvm.IRModule, target: Target) -> tvm.IRModule:
    """Return a lowered module as it is built: kernels ask whether they are needed, and its memory is planned.

    Its kernels take what those of the library take.
    """
    lowered = dataflow.with_main(lowered, _allocating(lowered["main"]))
    views = relax.transform.RewriteDataflowReshape()
    return tvm.transform.Sequential([*pipeline.last_passes(), views, PlanMemory(target)])(lowered)


def _calling() -> list[tvm.transform.Pass]:
    """Return TVM's way from calls of kernels to code that calls them, but for what it does about memory."""
    transform = relax.transform
    return [
        *allocating_passes(),
        transform.LowerAllocTensor(),
        transform.LowerRuntimeBuiltin(),
        transform.ComputePrimValue(),
        transform.VMShapeLower(),
        transform.AttachGlobalSymbol(),
        KeepTensors(),
        apart.LoadFirst(),
    ]


def _to_code() -> tuple[object, ...]:
    """Return TVM's own passes from kernels to machine code, with weights that are put in place, and with offsets."""
    lower, *rest = get_tir_pipeline("default")
    return (tvm.transform.Sequential([apart.PutWeights(), lower, ByteOffsets()]), *rest)


register_tir_pipeline(_CODE, _to_code)


def _allocating(main: relax.Function) -> relax.Function:
    """Return a function that allocates its constants without elements, which TVM can't read from libraries."""
    emitter = dataflow.Emitter()
    outputs = dataflow.output_fields(main)
    read = [
        leaf for value in (*(b.value for b in dataflow.bindings(main)), *outputs) for leaf in dataflow.operands(value)
    ]
    values: dict[dataflow.Value, dataflow.Value] = {}
    for leaf in read:
        if isinstance(leaf, GenericConst) and 0 in static_shape(leaf) and leaf not in values:
            shape, dtype = relax.ShapeExpr(static_shape(leaf)), str(leaf.ty.dtype.dtype)
            values[leaf] = emitter.emit(relax.op.builtin.alloc_tensor(shape, dtype, 0), "empty")
    if not values:
        return main
    emitter.copy(dataflow.bindings(main), values)
    return emitter.finish(main.params, [dataflow.substitute(output, values) for output in outputs], main.attrs)


def build(mod: tvm.IRModule, target: Target, database: ms.Database | None = None) -> relax.VMExecutable:
    """Return the executable of a graph for one target (phases 5 to 11)."""
    return generate(lower(mod, target, database), target)


def build_quickly(mod: tvm.IRModule, target: Target) -> relax.VMExecutable:
    """Return the executable of a graph that won't run for long: without bands, which take time to find."""
    return generate(_scheduled(fuse(mod, target), target, None, ()), target)


@relax.register_pipeline("nnfuze")
def nnfuze_pipeline(database: ms.Database | None = None) -> tvm.transform.Pass:
    """Return phases 5 to 10, followed by TVM's own lowering, as a pass for ``relax.build``.

    Registered with TVM as ``nnfuze``: ``relax.build(mod, target, relax_pipeline="nnfuze")``.

    Parameters
    ----------
    database : tvm.s_tir.meta_schedule.Database, optional
        Tuning records; by default the current one, if any.
    """

    @tvm.transform.module_pass(opt_level=0, name="nnfuze")
    def lower_all(mod: tvm.IRModule, _: tvm.transform.PassContext) -> tvm.IRModule:
        records = database if database is not None else ms.Database.current()
        lowered = lower(mod, Target.current(allow_none=False), records)
        return tvm.transform.Sequential([*pipeline.last_passes(), relax.get_pipeline("default_build")])(lowered)

    return lower_all
