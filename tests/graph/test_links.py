"""Chains and states: what may be said, and what is refused in one line."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax

from nnfuze_tvm.errors import InputError
from nnfuze_tvm.graph import evaluate, ir
from nnfuze_tvm.graph.links import wire
from nnfuze_tvm.graph.wiring import Window, stream
from nnfuze_tvm.passes.merge.merge_tasks import MergeTasks

Shape = tuple[int, ...]


def networks(**tasks: tuple[Mapping[str, Shape | tuple[Shape, str]], Mapping[str, str]]) -> tvm.IRModule:
    """Return a module whose tasks double some of their inputs: ``task=({input: shape}, {output: input})``."""
    functions, outputs = {}, []
    for task, (inputs, results) in tasks.items():
        shapes = {name: (s, "float32") if not s or isinstance(s[0], int) else s for name, s in inputs.items()}
        params = {name: relax.Var(name, relax.TensorType(*ty)) for name, ty in shapes.items()}
        builder = relax.BlockBuilder()
        with builder.function(task, list(params.values())):
            with builder.dataflow():
                values = [builder.emit(relax.op.add(params[of], params[of])) for of in results.values()]
                result = builder.emit_output(values)
            builder.emit_func_output(result)
        functions[task] = builder.get()[task]
        outputs += [ir.TaskOutput(task, name) for name in results]
    return ir.with_task_outputs(tvm.IRModule(functions), outputs)


def front(shape: Shape = (1, 8), dtype: str = "float32") -> tuple[dict[str, tuple[Shape, str]], dict[str, str]]:
    return {"audio": (shape, dtype)}, {"mel": "audio"}


def step_of(mod: tvm.IRModule, **links: list[str]):
    merged = MergeTasks(**links)(mod)
    relax.analysis.well_formed(merged)
    wiring = wire(mod, **links)
    runs = {}
    for task in wiring.tasks:
        func = mod[task]
        # Alone, a function is called main.
        runs[task] = evaluate.executor(tvm.IRModule({"main": func.with_attr("global_symbol", "main")}))
    return wiring, evaluate.executor(merged), runs, merged


@settings(deadline=None, max_examples=40)
@given(
    leading=st.lists(st.integers(1, 3), max_size=2),
    trailing=st.lists(st.integers(1, 3), max_size=2),
    rows=st.integers(1, 3),
    length=st.integers(4, 9),
    squeeze=st.booleans(),
)
def test_windows(leading: list[int], trailing: list[int], rows: int, length: int, squeeze: bool) -> None:
    """The consumer sees the newest rows last, zeros before there are as many; merged or one after the other."""
    small, large = (*leading, rows, *trailing), (*leading, length, *trailing)
    taken = tuple(d for d in large if d != 1) if squeeze else large
    mod = networks(front=front(small), head=({"x": taken}, {"y": "x"}))
    count = -(-length // rows)
    wiring, run, runs, merged = step_of(mod, chains=[f"x=front:mel[{count}]"])
    assert ir.states(merged) == ["front.mel.last"]
    history = np.zeros(large, "float32")
    rng = np.random.default_rng(0)
    calls = [{"audio": rng.integers(-9, 9, small).astype("float32")} for _ in range(4)]
    stepper = wiring.stepper(runs)
    for (_, (got,)), call in zip(stream(wiring.zeros(), run, calls), calls, strict=True):
        history = np.concatenate([history, 2 * call["audio"]], len(leading))
        history = history[(slice(None),) * len(leading) + (slice(rows, None),)]
        np.testing.assert_array_equal(got, 2 * history.reshape(taken))
        np.testing.assert_array_equal(stepper(call)[0], got)


def test_one_window_for_all_who_read_it() -> None:
    mod = networks(
        front=front((1, 1, 4)),
        a=({"feat": (1, 6, 4)}, {"y": "feat"}),
        b=({"feat": (1, 6, 4), "bias": (1,)}, {"y": "feat", "z": "bias"}),
        c=({"feat": (1, 4, 3)}, {"y": "feat"}),
    )
    wiring = wire(mod, chains=["a.feat=front:0[6]", "b:feat=front:mel[6]", "c.feat=front:mel[3]"])
    assert [state.name for state in wiring.states] == ["front.mel.last", "front.mel.last_1"]
    assert wiring.sources["a", "feat"] == wiring.sources["b", "feat"]
    other = wiring.sources["c", "feat"]
    assert isinstance(other, Window) and other.view == (4, 1) and other.axis == 1
    assert list(wiring.inputs) == ["audio", "bias"]
    assert [(result.task, result.place) for result in wiring.outputs] == [("a", 0), ("b", 0), ("b", 1), ("c", 0)]


def test_order_and_outputs() -> None:
    """A task may come before what it reads; what is read leaves no more, and states come last."""
    mod = networks(
        last=({"x": (4,), "h": (2,)}, {"y": "x", "next": "h"}), first=({"x": (4,), "h": (2,)}, {"z": "x", "t": "h"})
    )
    links = {"chains": ["last.x=first:z"], "states": ["last.h=next"]}
    wiring, run, runs, merged = step_of(mod, **links)
    assert wiring.order == ("first", "last")
    names = [param.name for param in merged["main"].params]
    assert ir.states(merged) == names[-1:] == ["last.h"]
    assert [(o.task, o.name) for o in ir.task_outputs(merged)] == [("last", "y"), ("first", "t"), ("last", "next")]
    values = {name: np.arange(1, 1 + np.prod(ir.static_shape(p)), dtype="float32") for name, p in
              zip(names, merged["main"].params, strict=True)}  # fmt: skip
    for got, want in zip(run(values), wiring.step(runs, values), strict=True):
        np.testing.assert_array_equal(got, want)


def test_equal_inputs_are_shared_beside_another() -> None:
    """Four heads read one embedding, two others something else of the same name."""
    head, other = ({"x": (1, 4)}, {"y": "x"}), ({"x": (1, 5)}, {"y": "x"})
    mod = networks(a=head, b=other, c=head, d=({"x": (1, 6)}, {"y": "x"}))
    assert list(wire(mod).inputs) == ["x", "b.x", "d.x"]
    assert list(wire(networks(a=head, b=other, c=head, d=other)).inputs) == ["a.x", "b.x"]


@pytest.mark.parametrize(
    ("chains", "states", "line"),
    [
        (["x"], [], r"chain 'x': write it as input=task:output, or input=task:output\[16\]"),
        (["x=front"], [], "write it as"),
        (["x=fronts:mel"], [], "there is no task 'fronts'; there are front, head"),
        (["x=front:mels"], [], "task 'front' has no output 'mels'; it has mel"),
        (["x=front:1"], [], "task 'front' has no output '1'; it has mel"),
        (["z=front:mel"], [], "there is no input 'z'; there are head.x, head.h"),
        (["front.audio=front:mel"], [], "'front.audio' is an input of front itself, .* is --state front.audio=mel$"),
        (["audio=front:mel[3]"], [], "'audio' is an input of front itself"),
        (["x=front:mel"], [], r"float32 1x8, the input float32 1x20x1; .* write x=front:mel\[3\]"),
        (["x=front:mel[2]"], [], "the last 2 results don't fit; it takes 3 of them"),
        (["h=front:mel[2]"], [], "float32 1x8, the input float32 2x3; the last 2 results don't fit$"),
        (["x=front:mel[3]", "head.x=front:mel[3]"], [], "input 'x' of task 'head' is fed twice"),
        ([], ["h"], "state 'h': write it as input=output"),
        ([], ["h=nx"], "task 'head' has no output 'nx'; it has y, next"),
        ([], ["g=next"], "there is no input 'g'"),
        ([], ["h=y"], "the output is float32 1x20x1, the input float32 2x3; they must be alike"),
        (["x=front:mel[3]"], ["h=next", "head.x=y"], "fed twice"),
        (["x=front:mel[3]", "audio=head:y"], [], "don't fit"),
    ],
)
def test_refused(chains: list[str], states: list[str], line: str) -> None:
    mod = networks(front=front(), head=({"x": (1, 20, 1), "h": (2, 3)}, {"y": "x", "next": "h"}))
    with pytest.raises(InputError, match=line) as caught:
        wire(mod, None, chains, states)
    assert len(str(caught.value).splitlines()) == 1


def test_refused_for_other_reasons() -> None:
    same = networks(a=({"x": (4,)}, {"y": "x"}), b=({"x": (4,)}, {"y": "x"}))
    with pytest.raises(InputError, match="the tasks a, b need each other's results"):
        wire(same, None, ["b.x=a:y", "a.x=b:y"])
    with pytest.raises(InputError, match="at least one has to leave"):
        wire(same, None, [], ["x=y"])
    with pytest.raises(InputError, match="must be of one type"):
        wire(networks(a=front((4,), "int32"), b=({"x": (4,)}, {"y": "x"})), None, ["x=a:mel"])
