"""The order of the passes, in numbered phases. No other file states it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module

import tvm
from tvm import relax

from nnfuze_tvm.passes.compress import few_bit_weights
from nnfuze_tvm.passes.compress.method import Inputs, Method
from nnfuze_tvm.passes.lower.batching.batch_branches import BatchBranches
from nnfuze_tvm.passes.lower.bit_serial.bit_serial import BitSerial, Pays
from nnfuze_tvm.passes.lower.bound_weights import BoundWeights
from nnfuze_tvm.passes.lower.branches import KeepChoices, SkipBranches
from nnfuze_tvm.passes.lower.branches import legalizations as choices
from nnfuze_tvm.passes.lower.byte_tables import ByteTables
from nnfuze_tvm.passes.lower.few_channels import FewChannels
from nnfuze_tvm.passes.lower.fuse_layers import FuseLayers
from nnfuze_tvm.passes.lower.go_by_rows import GoByRows
from nnfuze_tvm.passes.lower.hide_kernels import HideKernels
from nnfuze_tvm.passes.lower.integer.realize_integer import RealizeInteger
from nnfuze_tvm.passes.lower.joins import legalizations as joins
from nnfuze_tvm.passes.lower.keep_crops import KeepCrops
from nnfuze_tvm.passes.lower.keep_nan import Bound, comparisons, extremes, legalizations
from nnfuze_tvm.passes.lower.keep_spreads import KeepSpreads
from nnfuze_tvm.passes.lower.late_reshapes import LateReshapes
from nnfuze_tvm.passes.lower.layout import ToNHWC
from nnfuze_tvm.passes.lower.round_to_integer import Rounding, RoundToInteger
from nnfuze_tvm.passes.lower.row_convolutions import RowConvolutions
from nnfuze_tvm.passes.lower.row_softmax import legalizations as softmax
from nnfuze_tvm.passes.lower.scans import legalizations as scans
from nnfuze_tvm.passes.lower.shuffles import Shuffles
from nnfuze_tvm.passes.lower.skip_blocks import Cycles, SkipBlocks
from nnfuze_tvm.passes.lower.skip_nan import legalizations as max_poolings
from nnfuze_tvm.passes.lower.strided_rows import StridedRows
from nnfuze_tvm.passes.lower.transposed_convolutions import TransposedConvolutions
from nnfuze_tvm.passes.lower.unsigned_bytes import UnsignedBytes
from nnfuze_tvm.passes.lower.weight_only import WeightOnly
from nnfuze_tvm.passes.lower.whole_channels import Channels, WholeChannels
from nnfuze_tvm.passes.lower.whole_columns import WholeColumns
from nnfuze_tvm.passes.lower.whole_rows import WholeRows
from nnfuze_tvm.passes.lower.winograd.winograd import Winograd
from nnfuze_tvm.passes.merge.merge_tasks import MergeTasks
from nnfuze_tvm.passes.merge.share_trunk import ShareTrunk
from nnfuze_tvm.passes.simplify.fold_batch_norm import FoldBatchNorm
from nnfuze_tvm.passes.simplify.fuse_gelu import FuseGelu

# What a phase is called as a pass, in front of its name.
_PHASE = "phase "

# Phases 3 and 4: what is removed, then what the rest computes in. Each runs if the policy of a layer asks for it.
METHODS: tuple[Method, ...] = (
    *(
        import_module(f"nnfuze_tvm.passes.compress.{name}").METHOD
        for name in (
            "prune.prune_channels",
            "low_rank",
            "butterfly",
            "block_sparse",
            "four_bits",
            "insert_qdq",
            "half_precision",
        )
    ),
    *few_bit_weights.METHODS,
)


def phase(name: str, *passes: tvm.transform.Pass) -> tvm.transform.Pass:
    """Return passes as one pass, whose name says for those who watch that it is a phase."""
    return tvm.transform.Sequential(list(passes), name=_PHASE + name)


def phase_name(name: str) -> str | None:
    """Return the name of the phase that a pass of this name is, None if it is none."""
    return name.removeprefix(_PHASE) if name.startswith(_PHASE) else None


def merge_phases(
    shared_inputs: Sequence[str] | None = None, chains: Sequence[str] = (), states: Sequence[str] = ()
) -> list[tvm.transform.Pass]:
    """Return phases 1 and 2: from one function per task to one simplified ``main``."""
    return [
        # All tasks in one function, their common trunk computed once.
        phase("merge", MergeTasks(shared_inputs, chains, states), ShareTrunk()),
        phase("simplify", FoldBatchNorm(), FuseGelu()),
    ]


def compression_phase(method: Method, inputs: Inputs) -> tvm.transform.Pass:
    """Return a phase of compression: 3 if ``method`` removes something, 4 if it changes what the rest computes in."""
    return phase(method.name, *method.passes(inputs))


@dataclass(frozen=True)
class Machine:
    """What the lowering must know of a machine.

    Attributes
    ----------
    integer_winograd : bool
        It multiplies int8 no faster than int16; see ``Winograd``.
    far_macs : float
        How slow its memory is; see ``Winograd``.
    nearest : callable, optional
        Its way from float32 to the nearest int32; see ``RoundToInteger``.
    saturating : bool
        It narrows integers with saturation in one instruction; see ``RoundToInteger``.
    bounds : tuple of callable, optional
        Its maximum and minimum of floats, which keep NaN; without them TVM's own, which don't. See ``keep_nan``.
    channels : callable
        How many output channels it should compute of a layer; see ``WholeChannels``.
    cycles : callable
        What a layer takes; see ``SkipBlocks``.
    lanes : int
        Float32 numbers in a vector; see ``FewChannels``.
    unsigned : bool
        Its dot products of bytes want unsigned data; see ``UnsignedBytes``.
    keeps_nan : bool
        LLVM's maximum and minimum, which keep NaN, are instructions that it has.
    bit_serial : callable, optional
        Where it is faster by counting bits; see ``BitSerial``.
    """

    integer_winograd: bool
    far_macs: float
    nearest: Rounding | None
    saturating: bool
    bounds: tuple[Bound, Bound] | None
    channels: Channels
    cycles: Cycles
    lanes: int
    unsigned: bool
    keeps_nan: bool = False
    bit_serial: Pays | None = None


def lowering_phases(machine: Machine) -> list[tvm.transform.Pass]:
    """Return phases 5 to 9: from a merged (and perhaps quantized) graph to one PrimFunc per fused kernel."""
    winograd = Winograd(machine.integer_winograd, machine.far_macs, machine.lanes)
    return [
        layout_phase(),
        # Phase 6: dense layers of floats read the codes of their weights, quantize/dequantize islands become integer
        # operators.
        phase("integer", WeightOnly(), RealizeInteger(), LateReshapes(), Shuffles()),
        # Phase 7: what is zero in blocks is skipped, branches of one shape are in one kernel, and bits counted, where
        # that pays. What still is a convolution of few input channels gets reductions that dot products can take, and
        # so does a product of few products.
        phase(
            "batch",
            SkipBlocks(machine.cycles, winograd.share, machine.unsigned),
            BatchBranches(),
            BitSerial(machine.bit_serial),
            RowConvolutions(machine.channels, machine.unsigned),
            WholeRows(),
        ),
        # Phase 8: fewer multiplications, where that pays.
        phase("winograd", winograd),
        kernel_phase(machine),
    ]


def layout_phase() -> tvm.transform.Pass:
    """Return phase 5: convolutions only, activations with the channels last, weights OHWI."""
    return phase("layout", TransposedConvolutions(), StridedRows(), WholeColumns(), ToNHWC())


def kernel_phase(machine: Machine) -> tvm.transform.Pass:
    """Return phase 9: from operators to one PrimFunc per operator, then one per fused kernel."""
    return phase(
        "fuse",
        ByteTables(),
        FewChannels(machine.lanes),
        WholeChannels(machine.channels),
        UnsignedBytes(machine.unsigned),
        RoundToInteger(machine.nearest, machine.saturating),
        HideKernels(),
        relax.transform.LegalizeOps(
            {
                **({} if machine.bounds is None else legalizations(*machine.bounds)),
                **extremes(machine.keeps_nan),
                **comparisons(),
                **joins(),
                **scans(),
                **choices(),
                **max_poolings(),
                **softmax(),
            }
        ),
        relax.transform.AnnotateTIROpPattern(),
        KeepCrops(),
        KeepSpreads(),
        KeepChoices(),
        FuseLayers(),
        relax.transform.FuseTIR(),
        # Reshapes that no kernel took in become views; it recognizes them before they are scheduled.
        relax.transform.RewriteDataflowReshape(),
        relax.transform.DeadCodeElimination(),
        # Which kernel arguments are constants, so that their layout is the schedule's to choose.
        relax.transform.AttachAttrLayoutFreeBuffers(),
        BoundWeights(),
        GoByRows(),
    )


def last_passes() -> list[tvm.transform.Pass]:
    """Return what is done to scheduled kernels before they are built (phase 11)."""
    return [SkipBranches()]


def fused_module(mod: tvm.IRModule, target: tvm.target.Target, machine: Machine) -> tvm.IRModule:
    """Return the module of fused, unscheduled kernels: what tuning extracts its tasks from."""
    with target:
        return tvm.transform.Sequential(lowering_phases(machine))(mod)
