"""The order of the passes, in numbered phases. No other file states it."""

from __future__ import annotations

import tvm
from tvm import relax

from nnfuze_tvm.passes.layout import ToNHWC


def lowering_phases() -> list[tvm.transform.Pass]:
    """Return phases 5 to 8: from a merged (and perhaps quantized) graph to one PrimFunc per fused kernel."""
    return [
        # Phase 5: layout. Activations NHWC, weights OHWI.
        ToNHWC(),
        # Phase 8: one PrimFunc per operator, then one per fused kernel.
        relax.transform.LegalizeOps(),
        relax.transform.AnnotateTIROpPattern(),
        relax.transform.FuseOps(),
        relax.transform.FuseTIR(),
        # Reshapes that no kernel took in become views; it recognizes them before they are scheduled.
        relax.transform.RewriteDataflowReshape(),
        relax.transform.DeadCodeElimination(),
        # Which kernel arguments are constants, so that their layout is the schedule's to choose.
        relax.transform.AttachAttrLayoutFreeBuffers(),
    ]


def fused_module(mod: tvm.IRModule, target: tvm.target.Target) -> tvm.IRModule:
    """Return the module of fused, unscheduled kernels: what tuning extracts its tasks from."""
    with target:
        return tvm.transform.Sequential(lowering_phases())(mod)
