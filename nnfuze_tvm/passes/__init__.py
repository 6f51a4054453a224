"""Graph-level passes, one file each; ``pipeline`` states their order."""

from nnfuze_tvm.passes.batch_branches import BatchBranches
from nnfuze_tvm.passes.fold_batch_norm import FoldBatchNorm
from nnfuze_tvm.passes.half_precision import HalfPrecision
from nnfuze_tvm.passes.insert_qdq import InsertQDQ
from nnfuze_tvm.passes.layout import ToNHWC
from nnfuze_tvm.passes.merge_tasks import MergeTasks
from nnfuze_tvm.passes.prune_channels import PruneChannels
from nnfuze_tvm.passes.realize_integer import RealizeInteger
from nnfuze_tvm.passes.share_trunk import ShareTrunk

__all__ = [
    "BatchBranches",
    "FoldBatchNorm",
    "HalfPrecision",
    "InsertQDQ",
    "MergeTasks",
    "PruneChannels",
    "RealizeInteger",
    "ShareTrunk",
    "ToNHWC",
]
