"""What leaves a part of its data out, or writes a part at a time, is no elementwise operator."""

from __future__ import annotations

import tvm
from tvm import tirx
from tvm.ir.transform import PassContext, module_pass

from nnfuze_tvm.passes.lower import joins
from nnfuze_tvm.passes.lower.whole_channels import FIRST_CHANNELS

# TVM's operator patterns, least first: elementwise, broadcast, injective, and at the end what is fused with nothing.
_BROADCAST, _INJECTIVE, _OPAQUE = 1, 2, 8


@module_pass(opt_level=0, name="KeepCrops")
class KeepCrops:
    """Keep TVM from fusing a crop that begins at zero into the convolution in front of it, or anything behind a join.

    ``AnnotateTIROpPattern`` looks at indices only and finds such a crop to be elementwise. A convolution with one
    inside has no tile that fits both, but for its first channels (`WholeChannels`). What several blocks write (`joins`)
    can't be inlined.
    """

    def transform_module(self, mod: tvm.IRModule, _: PassContext) -> tvm.IRModule:
        """Return the module with the patterns of crops corrected."""
        for gvar, func in mod.functions_items():
            if isinstance(func, tirx.PrimFunc) and joins.ATTRIBUTE in func.attrs:
                mod.update_func(gvar, func.with_attr("op_pattern", _OPAQUE))
            elif isinstance(func, tirx.PrimFunc) and _is_crop(func):
                mod.update_func(gvar, func.with_attr("op_pattern", _INJECTIVE))
        return mod


def _is_crop(func: tirx.PrimFunc) -> bool:
    if int(func.attrs.get("op_pattern", _INJECTIVE)) > _BROADCAST or FIRST_CHANNELS in func.attrs:
        return False
    *operands, result = ([int(extent) for extent in param.ty.shape] for param in func.params)
    return any(
        len(shape) == len(result) and any(own > new for own, new in zip(shape, result, strict=True))
        for shape in operands
    )
