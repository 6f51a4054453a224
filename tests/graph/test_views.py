"""One input that networks take under several names and in several forms."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax

from nnfuze_tvm.errors import InputError
from nnfuze_tvm.graph import dataflow, evaluate, ir
from nnfuze_tvm.graph.links import wire
from nnfuze_tvm.graph.views import View, views_of
from nnfuze_tvm.passes import CommonInputs, MergeTasks, ShareTrunk


def networks(**inputs: tuple[str, tuple[int, ...], str]) -> tvm.IRModule:
    """Return a module of tasks that give a root of their input's absolute value: ``task=(input, shape, dtype)``."""
    functions = {}
    for task, (name, shape, dtype) in inputs.items():
        param = relax.Var(name, relax.TensorType(shape, dtype))
        builder = relax.BlockBuilder()
        with builder.function(task, [param]):
            with builder.dataflow():
                size = relax.op.sqrt(relax.op.abs(relax.op.astype(param, "float32")))
                result = builder.emit_output([builder.emit(size)])
            builder.emit_func_output(result)
        functions[task] = builder.get()[task]
    return ir.with_task_outputs(tvm.IRModule(functions), [ir.TaskOutput(task, "y") for task in inputs])


def answers(mod: tvm.IRModule, task: str, inputs: dict[str, np.ndarray]) -> np.ndarray:
    alone = tvm.IRModule({"main": mod[task].with_attr("global_symbol", "main")})
    return np.asarray(evaluate.executor(alone)(inputs)[0])


@settings(deadline=None, max_examples=60)
@given(
    st.permutations([2, 3, 5]),
    st.sampled_from(["same", "last", "first"]),
    st.sampled_from(["uint8", "float32"]),
    st.integers(0, 2),
    st.integers(0, 2),
    st.integers(0, 9),
)
def test_forms_are_what_tasks_take(sizes, way, dtype, factors, offsets, seed):
    rng = np.random.default_rng(seed)
    shape = (1, *sizes)
    axes = {"same": (0, 1, 2, 3), "last": (0, 2, 3, 1), "first": (0, 3, 1, 2)}[way]
    own = tuple(shape[axis] for axis in axes)
    # Channels are where the layout has them; where it is the same in both, they are taken to be the first.
    axis = 3 if way == "last" else 1
    lists = [rng.uniform(0.5, 2, own[axis] if count == 2 else count).round(3) for count in (factors, offsets)]
    text = "".join(
        sign + (f"[{','.join(map(str, numbers))}]" if len(numbers) > 1 else str(numbers[0]))
        for sign, numbers in zip("*-", lists, strict=True)
        if len(numbers)
    )
    mod = networks(a=("x", shape, dtype), b=("image-1", own, "float32"))
    said = [f"frame=a.x,b.image-1{text}"]
    values = rng.integers(0, 255, shape).astype(dtype)
    wide = [numbers.astype("float32").reshape([-1] + [1] * (3 - axis) if len(numbers) > 1 else -1) for numbers in lists]
    wanted = values.transpose(axes).astype("float32")
    wanted = wanted * wide[0] if len(wide[0]) else wanted
    wanted = wanted - wide[1] if len(wide[1]) else wanted
    wiring = wire(mod, said)
    assert [*wiring.inputs] == ["frame"]
    assert str(wiring.inputs["frame"].dtype) == dtype
    np.testing.assert_array_equal(wiring.taken("b", {"frame": values})["image-1"], wanted)
    merged = MergeTasks(said)(mod)
    relax.analysis.well_formed(merged)
    expected = [answers(mod, "a", {"x": values}), answers(mod, "b", {"image-1": wanted})]
    for got, want in zip(evaluate.executor(merged)({"frame": values}), expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6)
    common = CommonInputs(said)(mod)
    for task, want in zip("ab", expected, strict=True):
        assert [param.name for param in common[task].params] == ["frame"]
        np.testing.assert_allclose(answers(common, task, {"frame": values}), want, rtol=1e-6)


def test_what_is_alike_is_computed_once():
    mod = networks(a=("x", (1, 4, 4, 3), "float32"), b=("y", (1, 3, 4, 4), "float32"), c=("z", (1, 3, 4, 4), "float32"))
    merged = ShareTrunk()(MergeTasks(["frame=a.x,b.y*2+1,c.z*2+1"])(mod))
    names = [dataflow.op_name(binding.value) for binding in dataflow.bindings(merged["main"])]
    assert [names.count(name) for name in ("permute_dims", "multiply", "add", "sqrt")] == [1, 1, 1, 2]


def test_other_inputs_keep_their_names():
    mod = networks(a=("x", (1, 4), "float32"), b=("y", (4,), "float32"), c=("frame", (1, 4), "float32"))
    wiring = wire(mod, ["frame=a.x,b.y"])
    assert [*wiring.inputs] == ["frame", "c.frame"]
    assert wiring.sources["a", "x"] == "frame"
    assert wiring.sources["b", "y"] == View("frame", (0, 1), (4,), "float32")


def test_a_name_may_look_like_a_scale():
    mod = networks(a=("x", (1, 4), "float32"), b=("in-1", (1, 4), "float32"))
    assert views_of("f=a.x,b.in-1", {("a", "x"): mod["a"].params[0].ty, ("b", "in-1"): mod["b"].params[0].ty})[1] == {
        ("a", "x"): None,
        ("b", "in-1"): None,
    }


def test_spaces_are_allowed():
    mod = networks(a=("x", (1, 3, 4, 4), "float32"), b=("y", (1, 4, 4, 3), "float32"))
    types = {("a", "x"): mod["a"].params[0].ty, ("b", "y"): mod["b"].params[0].ty}
    assert views_of("f=a.x, b.y * 0.5 + 1", types) == views_of("f=a.x,b.y*0.5+1", types)


@pytest.mark.parametrize(
    "said, words",
    [
        (["frame="], "write it as"),
        (["=a.x"], "write it as"),
        (["frame=a.x,b.z"], "there is no input 'b.z'; there are a.x, b.y, c.z, d.w"),
        (["frame=a.x,b.y*half"], r"'\*half' is no factor and offset"),
        (["frame=a.x,b.y*0"], "not 0"),
        (["frame=a.x,b.y*1e39"], "finite"),
        (["frame=a.x,b.y*1e-50"], "not 0"),
        (["frame=a.x*2,b.y"], "the first input says"),
        (["frame=a.x,a.x"], "twice"),
        (["frame=a.x,b.y*[1,2]"], "one per channel"),
        (["frame=b.y,c.z"], "not int8"),
        (["frame=c.z,a.x", "other=b.y,a.x"], "another one, too"),
        (["frame=a.x,d.w"], "don't fit"),
    ],
)
def test_what_does_not_fit_is_said(said, words):
    mod = networks(
        a=("x", (1, 3, 4, 4), "float32"),
        b=("y", (1, 4, 4, 3), "float32"),
        c=("z", (1, 4, 4, 3), "int8"),
        d=("w", (1, 5, 4, 4), "float32"),
    )
    with pytest.raises(InputError, match=words) as caught:
        wire(mod, said)
    assert "\n" not in str(caught.value)
