"""The pass that gives every kernel of a module its schedule."""

from __future__ import annotations

import logging

import tvm
from tvm import relax, s_tir, tirx
from tvm.ir.transform import PassContext, module_pass
from tvm.s_tir import meta_schedule as ms
from tvm.target import Target

from nnfuze_tvm import schedules
from nnfuze_tvm.devices.hardware import Hardware
from nnfuze_tvm.schedules.blocks import statements
from nnfuze_tvm.schedules.families import fallback
from nnfuze_tvm.schedules.knobs import take_knobs
from nnfuze_tvm.schedules.unchecked import Schedule

logger = logging.getLogger(__name__)


@module_pass(opt_level=0, name="ScheduleKernels")
class ScheduleKernels:
    """Schedule every PrimFunc: by the tuning database where it has a record, else by the rules' default knobs.

    Parameters
    ----------
    target : tvm.target.Target
        The CPU.
    database : tvm.s_tir.meta_schedule.Database, optional
        Tuning records.
    """

    def __init__(self, target: Target, database: ms.Database | None = None) -> None:
        self.target = target
        self.database = database

    def transform_module(self, mod: tvm.IRModule, _: PassContext) -> tvm.IRModule:
        """Return the module with scheduled kernels.

        Attribute ``nnfuze.rule`` of a kernel is the rule's name (``database``: a tuning record that none of the
        rules made), ``nnfuze.knobs`` maps the knobs' names to their values.
        """
        if self.database is not None:
            _originals = [statements(record.workload.mod) for record in self.database.get_all_tuning_records()]
            with self.target, self.database:
                mod = relax.transform.MetaScheduleApplyDatabase()(mod)
        # The module that was given stays as it is: reports count the operations of its kernels.
        mod = mod.clone()
        for gvar, func in mod.functions_items():
            if not isinstance(func, tirx.PrimFunc):
                continue
            if "tirx.is_scheduled" not in func.attrs:
                mod.update_func(gvar, schedule_kernel(gvar.name_hint, func, self.target))
            elif "nnfuze.rule" not in func.attrs:
                mod.update_func(gvar, _with_knobs(schedules.apply_rewrites(func), "database"))
        return mod


def schedule_kernel(name: str, func: tirx.PrimFunc, target: Target) -> tirx.PrimFunc:
    """Return the kernel ``func`` scheduled by the first rule that takes it.

    A rule that meets a kernel it was not made for must not cost the user the whole compilation: the kernel
    then gets the fallback's schedule, and the log says so.
    """
    mod = tvm.IRModule({"main": func.with_attr("global_symbol", "main")})
    _original = statements(mod)
    sch = Schedule(mod, error_render_level="fast")
    try:
        rule = schedules.apply(sch, target)
    except (s_tir.ScheduleError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[-1]
        logger.warning("%s: no schedule of its own (%s); the fallback takes it", name, reason)
        sch = Schedule(mod, error_render_level="fast")
        fallback.apply(sch, Hardware.of(target), False)
        rule = "fallback"
    rewritten = schedules.apply_rewrites(fallback.with_block(sch))
    scheduled = _with_knobs(rewritten, rule).with_attr("tirx.is_scheduled", True)
    if "global_symbol" in func.attrs:
        return scheduled.with_attr("global_symbol", func.attrs["global_symbol"])
    return scheduled.without_attr("global_symbol")


def _with_knobs(func: tirx.PrimFunc, rule: str) -> tirx.PrimFunc:
    """Return a scheduled kernel with what its rule recorded as attributes; ``rule`` is for one without a record."""
    func, knobs = take_knobs(func)
    named = str(knobs.pop("rule", rule))
    return func.with_attr({"nnfuze.rule": named, "nnfuze.knobs": knobs})
