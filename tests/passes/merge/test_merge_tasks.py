"""MergeTasks: which inputs become one, and in which order the outputs come."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.script import ir as I
from tvm.script import relax as R

from nnfuze_tvm.errors import InputError
from nnfuze_tvm.graph import ir
from nnfuze_tvm.passes.merge.merge_tasks import MergeTasks
from tests.helpers import evaluate_module


def two_tasks(outputs=("b:y", "a:y", "a:z")):
    @I.ir_module
    class Module:
        @R.function
        def a(x: R.Tensor((2, 4), "float32"), mask: R.Tensor((2, 4), "float32")):
            with R.dataflow():
                y = R.multiply(x, mask)
                z = R.add(y, x)
                R.output(y, z)
            return (y, z)

        @R.function
        def b(mask: R.Tensor((2, 3), "float32"), x: R.Tensor((2, 4), "float32")):
            with R.dataflow():
                y = R.nn.relu(x)
                lv = R.concat((y, mask), axis=1)
                R.output(lv)
            return (lv,)

    return Module.with_attr(ir.OUTPUTS_ATTR, list(outputs))


def params(mod):
    return [param.name for param in mod["main"].params]


def test_golden():
    @I.ir_module
    class Expected:
        @R.function
        def main(
            b_mask: R.Tensor((2, 3), "float32"),
            x: R.Tensor((2, 4), "float32"),
            a_mask: R.Tensor((2, 4), "float32"),
        ):
            with R.dataflow():
                y = R.nn.relu(x)
                lv = R.concat((y, b_mask), axis=1)
                y_1 = R.multiply(x, a_mask)
                z = R.add(y_1, x)
                R.output(lv, y_1, z)
            return (lv, y_1, z)

    merged = MergeTasks()(two_tasks())
    tvm.ir.assert_structural_equal(merged["main"], Expected["main"])
    assert params(merged) == ["b.mask", "x", "a.mask"]
    assert [(out.task, out.name) for out in ir.task_outputs(merged)] == [("b", "y"), ("a", "y"), ("a", "z")]
    assert [var.name_hint for var in merged.functions] == ["main"]
    relax.analysis.well_formed(merged)


def test_values_do_not_change():
    mod = two_tasks()
    rng = np.random.default_rng(0)
    x, wide, narrow = (rng.standard_normal(s).astype("float32") for s in ((2, 4), (2, 4), (2, 3)))
    merged = evaluate_module(MergeTasks()(mod), {"x": x, "a.mask": wide, "b.mask": narrow})
    apart = evaluate_module(mod, {"x": x, "mask": narrow}, "b") + evaluate_module(mod, {"x": x, "mask": wide}, "a")
    for left, right in zip(merged, apart, strict=True):
        np.testing.assert_array_equal(left, right)


def test_nothing_shared():
    assert params(MergeTasks(shared_inputs=[])(two_tasks())) == ["b.mask", "b.x", "a.x", "a.mask"]


def test_attribute_of_the_module_decides():
    mod = two_tasks().with_attr(ir.SHARED_INPUTS_ATTR, [])
    assert params(MergeTasks()(mod)) == ["b.mask", "b.x", "a.x", "a.mask"]
    assert params(MergeTasks(["x"])(mod)) == ["b.mask", "x", "a.mask"]


def test_one_task():
    @I.ir_module
    class Module:
        @R.function
        def only(x: R.Tensor((2,), "float32")):
            with R.dataflow():
                y = R.nn.relu(x)
                R.output(y)
            return (y,)

    merged = MergeTasks()(Module.with_attr(ir.OUTPUTS_ATTR, ["only:y"]))
    assert params(merged) == ["x"] and len(merged.functions) == 1


def test_task_named_main_and_output_that_is_an_input():
    @I.ir_module
    class Module:
        @R.function
        def main(x: R.Tensor((2,), "float32")):
            return (x,)

        @R.function
        def other(x: R.Tensor((2,), "float32")):
            with R.dataflow():
                y = R.nn.relu(x)
                R.output(y)
            return (y,)

    merged = MergeTasks()(Module.with_attr(ir.OUTPUTS_ATTR, ["main:x", "other:y"]))
    relax.analysis.well_formed(merged)
    value = np.array([-1, 1], "float32")
    for left, right in zip(evaluate_module(merged, {"x": value}), (value, np.maximum(value, 0)), strict=True):
        np.testing.assert_array_equal(left, right)


def test_kernels_and_attributes_stay():
    @I.ir_module
    class Module:
        @R.function
        def a(x: R.Tensor((2,), "float32")):
            with R.dataflow():
                y = R.nn.relu(x)
                R.output(y)
            return (y,)

    builder = relax.BlockBuilder()
    builder.add_func(tvm.te.create_prim_func([tvm.te.placeholder((1,), name="x")]).with_attr("global_symbol", "k"), "k")
    mod = builder.get()
    mod[tvm.ir.GlobalVar("a")] = Module["a"]
    merged = MergeTasks()(mod.with_attrs({ir.OUTPUTS_ATTR: ["a:y"], "other": 3}))
    assert sorted(var.name_hint for var in merged.functions) == ["k", "main"]
    assert merged.attrs["other"] == 3


def test_shared_input_must_agree():
    with pytest.raises(InputError, match="shared input 'mask' differs"):
        MergeTasks(["mask"])(two_tasks())
    with pytest.raises(InputError, match="shared input 'video': no task has it"):
        MergeTasks(["video"])(two_tasks())
