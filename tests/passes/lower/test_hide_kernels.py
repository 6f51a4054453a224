"""HideKernels: no PrimFunc has a name that the linker sees."""

from __future__ import annotations

import tvm
from tvm import relax, te

from nnfuze_tvm.passes import HideKernels


def test_kernels_become_private():
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((4,), "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            result = builder.emit_output(builder.emit_te(lambda t: te.compute(t.shape, lambda i: t[i] * 2.0), x))
        builder.emit_func_output(result)
    mod = builder.get()
    (name,) = (var for var, func in mod.functions_items() if isinstance(func, tvm.tirx.PrimFunc))
    mod.update_func(name, mod[name].with_attr("global_symbol", name.name_hint))
    hidden = HideKernels()(mod)
    assert "global_symbol" not in hidden[name].attrs
    assert "global_symbol" in mod[name].attrs and "global_symbol" in hidden["main"].attrs
