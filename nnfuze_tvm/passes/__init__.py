"""Graph-level passes, one file each; ``pipeline`` states their order."""

from nnfuze_tvm.passes.compress.block_sparse import BlockSparse
from nnfuze_tvm.passes.compress.butterfly import Butterfly
from nnfuze_tvm.passes.compress.equalize.equalize import Equalize
from nnfuze_tvm.passes.compress.few_bit_weights import FewBitWeights
from nnfuze_tvm.passes.compress.four_bits import FourBits
from nnfuze_tvm.passes.compress.half_precision import HalfPrecision
from nnfuze_tvm.passes.compress.insert_qdq import InsertQDQ
from nnfuze_tvm.passes.compress.low_rank import LowRank
from nnfuze_tvm.passes.compress.prune.prune_channels import PruneChannels
from nnfuze_tvm.passes.compress.within_budget import QuantizeWithin
from nnfuze_tvm.passes.lower.batching.batch_branches import BatchBranches
from nnfuze_tvm.passes.lower.bit_serial.bit_serial import BitSerial
from nnfuze_tvm.passes.lower.bound_weights import BoundWeights
from nnfuze_tvm.passes.lower.branches import KeepChoices, SkipBranches
from nnfuze_tvm.passes.lower.byte_tables import ByteTables
from nnfuze_tvm.passes.lower.few_channels import FewChannels
from nnfuze_tvm.passes.lower.fuse_layers import FuseLayers
from nnfuze_tvm.passes.lower.go_by_rows import GoByRows
from nnfuze_tvm.passes.lower.hide_kernels import HideKernels
from nnfuze_tvm.passes.lower.integer.realize_integer import RealizeInteger
from nnfuze_tvm.passes.lower.keep_crops import KeepCrops
from nnfuze_tvm.passes.lower.keep_spreads import KeepSpreads
from nnfuze_tvm.passes.lower.late_reshapes import LateReshapes
from nnfuze_tvm.passes.lower.layout import ToNHWC
from nnfuze_tvm.passes.lower.round_to_integer import RoundToInteger
from nnfuze_tvm.passes.lower.row_convolutions import RowConvolutions
from nnfuze_tvm.passes.lower.shuffles import Shuffles
from nnfuze_tvm.passes.lower.skip_blocks import SkipBlocks
from nnfuze_tvm.passes.lower.strided_rows import StridedRows
from nnfuze_tvm.passes.lower.transposed_convolutions import TransposedConvolutions
from nnfuze_tvm.passes.lower.unsigned_bytes import UnsignedBytes
from nnfuze_tvm.passes.lower.weight_only import WeightOnly
from nnfuze_tvm.passes.lower.whole_channels import WholeChannels
from nnfuze_tvm.passes.lower.whole_columns import WholeColumns
from nnfuze_tvm.passes.lower.whole_rows import WholeRows
from nnfuze_tvm.passes.lower.winograd.winograd import Winograd
from nnfuze_tvm.passes.merge.common_inputs import CommonInputs
from nnfuze_tvm.passes.merge.merge_tasks import MergeTasks
from nnfuze_tvm.passes.merge.share_codebooks import ShareCodebooks
from nnfuze_tvm.passes.merge.share_trunk import ShareTrunk
from nnfuze_tvm.passes.merge.zip_features import ZipFeatures
from nnfuze_tvm.passes.merge.zip_units import ZipUnits
from nnfuze_tvm.passes.simplify.fold_batch_norm import FoldBatchNorm
from nnfuze_tvm.passes.simplify.fuse_gelu import FuseGelu

__all__ = [
    "BatchBranches",
    "BitSerial",
    "BlockSparse",
    "BoundWeights",
    "Butterfly",
    "ByteTables",
    "CommonInputs",
    "Equalize",
    "FewBitWeights",
    "FewChannels",
    "FoldBatchNorm",
    "FourBits",
    "FuseGelu",
    "FuseLayers",
    "GoByRows",
    "HalfPrecision",
    "HideKernels",
    "InsertQDQ",
    "KeepChoices",
    "KeepCrops",
    "KeepSpreads",
    "LateReshapes",
    "LowRank",
    "MergeTasks",
    "PruneChannels",
    "QuantizeWithin",
    "RealizeInteger",
    "RoundToInteger",
    "RowConvolutions",
    "ShareCodebooks",
    "ShareTrunk",
    "Shuffles",
    "SkipBlocks",
    "SkipBranches",
    "StridedRows",
    "ToNHWC",
    "TransposedConvolutions",
    "UnsignedBytes",
    "WeightOnly",
    "WholeChannels",
    "WholeColumns",
    "WholeRows",
    "Winograd",
    "ZipFeatures",
    "ZipUnits",
]
