"""Networks that were trained apart: where they can be cut, and how one learns to go on from another's beginning."""

from __future__ import annotations

import io
from itertools import pairwise

import numpy as np
import pytest
import torch
import tvm
from tvm import relax
from tvm.relax import op

from nnfuze_tvm.errors import InputError
from nnfuze_tvm.graph import ir
from nnfuze_tvm.graph.cuts import Cut, Stitch, beginning, cuts, graft, resized
from nnfuze_tvm.graph.dataflow import Emitter, Value, bindings, op_name, with_functions
from nnfuze_tvm.graph.evaluate import evaluate
from nnfuze_tvm.passes.merge.merge_tasks import MergeTasks
from nnfuze_tvm.passes.merge.share_trunk import ShareTrunk
from nnfuze_tvm.training.course import Schedule
from nnfuze_tvm.training.distill import agreement, answers, distill, held_back
from nnfuze_tvm.training.judge import Evaluation
from nnfuze_tvm.training.lessons import Asked, mixed, shifted
from nnfuze_tvm.training.merging import Search, Watch, share
from nnfuze_tvm.training.network import Network
from nnfuze_tvm.training.stitches import _spread, candidates, every
from nnfuze_tvm.training.trials import Point, Trial, hopeless

SIZE = (1, 2, 8, 8)


def network(task: str, widths: tuple[int, ...], seed: int, classes: int = 4, name: str = "image") -> relax.Function:
    """Return a small classifier: convolutions with ReLU, the first of stride 2, the second with a skip; a head."""
    rng, emitter = np.random.default_rng(seed), Emitter()
    x = tvm.ir.Var(emitter.unique(name), relax.TensorType(SIZE, "float32"))

    def layer(value: Value, width: int, stride: int, number: int) -> Value:
        depth = ir.static_shape(value)[1]
        weight = rng.normal(0, (2 / (9 * depth)) ** 0.5, (width, depth, 3, 3)).astype("float32")
        result = emitter.emit(op.nn.conv2d(value, relax.const(weight), stride, 1), f"{task}/conv{number}")
        bias = rng.normal(0, 0.1, (1, width, 1, 1)).astype("float32")
        return emitter.emit(op.nn.relu(emitter.emit(op.add(result, relax.const(bias)))))

    value: Value = layer(x, widths[0], 2, 0)
    for number, width in enumerate(widths[1:], start=1):
        after = layer(value, width, 1, number)
        value = emitter.emit(op.add(value, after)) if number == 1 and width == widths[0] else after
    flat = emitter.emit(op.reshape(emitter.emit(op.mean(value, [2, 3], keepdims=True)), (1, widths[-1])))
    head = rng.normal(0, 2.0, (widths[-1], classes)).astype("float32")
    scores = emitter.emit(op.matmul(flat, relax.const(head)), f"{task}/head")
    return emitter.finish([x], [scores]).with_attr("global_symbol", task)


def module(**functions: relax.Function) -> tvm.IRModule:
    mod = with_functions(tvm.IRModule({}), functions)
    return ir.with_task_outputs(mod, [ir.TaskOutput(task, "scores") for task in functions])


def images(count: int, seed: int = 0) -> dict[str, np.ndarray]:
    return {"image": np.random.default_rng(seed).normal(size=(count, *SIZE)).astype("float32")}


def test_cuts_lie_behind_activations_and_not_inside_of_blocks():
    found = cuts(network("a", (4, 4, 6), 0))
    assert [(cut.name, cut.shape) for cut in found] == [
        ("a/conv0", (1, 4, 4, 4)),
        ("a/conv1", (1, 4, 4, 4)),
        ("a/conv2", (1, 6, 4, 4)),
    ]
    # The skip goes around the second: what is cut there is the sum, which a ReLU made of two parts.
    assert [cut.nonnegative for cut in found] == [True, False, True]
    assert [cut.macs for cut in found] == [16 * 9 * 2 * 4, 16 * 9 * (2 * 4 + 16), 16 * 9 * (2 * 4 + 16 + 24)]


def test_a_graft_goes_on_from_the_donors_features():
    donor, own, data = network("a", (4, 6), 0), network("b", (5, 7), 1), images(1)["image"][0]
    stitch = Stitch(np.random.default_rng(2).normal(size=(7, 6)).astype("float32"), np.ones(7, "float32"))
    grafted = graft(donor, cuts(donor)[1], own, cuts(own)[1], stitch, "b")
    features = evaluate(beginning(donor, cuts(donor)[1]), {"image": data})[0]
    wanted = np.maximum(np.einsum("oi,nihw->nohw", stitch.weight, features) + 1, 0).mean((2, 3))
    head = next(b.value.args[1] for b in bindings(own) if b.var.name == "b/head").value.numpy()
    np.testing.assert_allclose(evaluate(grafted, {"image": data})[0], wanted @ head, rtol=1e-4)
    assert "b/stitch" in [b.var.name for b in bindings(grafted)]


@pytest.mark.parametrize(
    ("given", "size", "operator"),
    [((13, 10), (7, 5), "avg_pool2d"), ((8, 8), (3, 8), "avg_pool2d"), ((5, 9), (4, 2), "adaptive_avg_pool2d")],
)
def test_images_become_smaller_by_windows_where_a_strided_convolution_looks(given, size, operator):
    x = relax.Var("x", relax.TensorType((1, 2, *given), "float32"))
    builder = relax.BlockBuilder()
    with builder.function("f", [x]):
        with builder.dataflow():
            result = builder.emit_output(relax.Tuple([builder.emit(relax.op.nn.relu(x))]))
        builder.emit_func_output(result)
    small = resized(builder.get()["f"], Cut(0, "x", (1, 2, *size), 1, True))
    assert op_name(bindings(small)[-1].value) == f"nn.{operator}"
    data = np.random.default_rng(0).uniform(size=(1, 2, *given)).astype("float32")
    found = evaluate(small, {"x": data})[0]
    assert found.shape == (1, 2, *size)
    if operator == "avg_pool2d":
        steps = [-(-old // new) for old, new in zip(given, size, strict=True)]
        rows, columns = (
            [slice(max(0, (n - 1) * step + 1), (n + 1) * step) for n in range(new)]
            for new, step in zip(size, steps, strict=True)
        )
        want = [[data[..., own, across].mean((2, 3)) for across in columns] for own in rows]
        np.testing.assert_allclose(found, np.array(want).transpose(2, 3, 0, 1), rtol=1e-5)


def test_other_inputs_do_not_share():
    donor, own = network("a", (4, 4), 0, name="sound"), network("b", (4, 4), 1)
    with pytest.raises(InputError, match="input sound"):
        graft(donor, cuts(donor)[0], own, cuts(own)[0], None, "b")


def test_a_network_learns_what_another_one_answers():
    teacher, student = Network(network("a", (6, 6), 0)), Network(network("a", (6, 6), 1))
    samples, held = images(512), images(200, 1)
    right = answers(teacher, held)[0]
    before = agreement(answers(student, held)[0], right)
    losses: list[float] = []
    distill(student, samples, answers(teacher, samples), Schedule(least=150, rate=1e-2), lambda *s: losses.append(s[2]))
    assert len(losses) == 150 and np.mean(losses[-20:]) < 0.5 * np.mean(losses[:20])
    assert agreement(answers(student, held)[0], right) > max(before + 10, 65)


def test_the_same_seed_teaches_the_same():
    found = []
    for _ in range(2):
        student = Network(network("a", (4, 4), 1))
        samples = images(64)
        distill(
            student, samples, answers(Network(network("a", (4, 4), 0)), samples), Schedule(batch=16, least=20, seed=3)
        )
        found.append(torch.cat([each.detach().flatten() for each in student.parameters()]))
    assert torch.equal(*found)


def test_agreement_is_of_classes_or_of_values():
    scores = np.array([[[0.1, 0.9]], [[0.8, 0.2]], [[0.3, 0.7]], [[0.6, 0.4]]])
    assert agreement(scores[::-1], scores) == 0
    assert agreement(np.concatenate([scores[:3], scores[:1]]), scores) == 75
    values = np.arange(8.0).reshape(4, 1, 2, 1)
    assert agreement(values, values) == 100
    assert 50 < agreement(values + 0.5, values) < 90


def test_what_is_held_back_is_not_learnt():
    learnt, held = held_back(1000)
    assert len(held) == 100 and sorted([*learnt, *held]) == list(range(1000))
    assert len(held_back(100)[1]) == 25


class Diary(Watch):
    """Remembers what a search tells, and ends it when it has kept so much."""

    def __init__(self, ends: int = -1, given: bytes | None = None) -> None:
        self.told: list[Trial] = []
        self.ends, self.kept = ends, given

    def found(self):
        return None if self.kept is None else torch.load(io.BytesIO(self.kept), weights_only=True)

    def keep(self, search: Search, *, now: bool) -> None:
        written = io.BytesIO()
        torch.save(search.state(), written)
        self.kept = written.getvalue()
        self.ends -= 1
        if self.ends == 0:
            raise KeyboardInterrupt

    def tried(self, trial: Trial) -> None:
        self.told.append(trial)


@pytest.mark.parametrize("other", [(6, 6, 6), (5, 8)], ids=["same", "other architecture"])
def test_two_networks_share_a_trunk_as_deep_as_the_budget_allows(other):
    mod = module(a=network("a", (6, 6, 6), 0), b=network("b", other, 1, classes=3))
    diary = Diary()
    found = share(mod, images(256), 100.0, Schedule(batch=32, least=10), diary)
    shared, tried = found.module, found.tried
    assert diary.told == tried and len(tried) == 1 and tried[0].kept
    # All of the deepest cut's work is done once: what is left of the grafted network is a stitch and a head.
    merged = tvm.transform.Sequential([MergeTasks(), ShareTrunk()])(shared)
    kinds = [b.value.op.name for b in bindings(merged["main"]) if "conv2d" in str(getattr(b.value, "op", ""))]
    donor = {"a": (6, 6, 6), "b": other}[tried[0].candidate.donor]
    assert len(kinds) == len(donor) + 1
    data = {name: values[0] for name, values in images(1).items()}
    for task in "ab":
        place = [output.task for output in ir.task_outputs(merged)].index(task)
        want = evaluate(shared[task], data)[0]
        np.testing.assert_array_equal(evaluate(merged["main"], data)[place], want)


def test_without_a_budget_nothing_is_shared():
    mod = module(a=network("a", (4, 4), 0), b=network("b", (4, 4), 1))
    found = share(mod, images(128), 0.0, Schedule(batch=32, least=3, rate=10.0))
    assert not any(trial.kept for trial in found.tried) and len(found.tried) == 4
    tvm.ir.assert_structural_equal(found.module, mod, map_free_vars=True)


def test_trunks_that_are_the_same_are_shared_without_learning():
    mod = module(a=network("a", (4, 4), 0), b=network("b", (4, 4), 0, classes=3))
    found = share(mod, images(64), 0.0, Schedule())
    assert [(trial.kept, trial.steps, trial.candidate.fit) for trial in found.tried] == [
        (True, 0, pytest.approx(1, abs=1e-3))
    ]
    data = {name: values[0] for name, values in images(1).items()}
    for task in "ab":
        np.testing.assert_array_equal(evaluate(found.module[task], data)[0], evaluate(mod[task], data)[0])


def test_three_networks_become_a_tree():
    """Whoever came first to a trunk learns on with it when another one comes."""
    mod = module(**{name: network(name, (4, 4), seed) for seed, name in enumerate("abc")})
    found = share(mod, images(128), 100.0, Schedule(batch=32, least=4))
    assert [trial.kept for trial in found.tried] == [True, True]
    assert len({trial.candidate.donor for trial in found.tried}) == 1
    merged = tvm.transform.Sequential([MergeTasks(), ShareTrunk()])(found.module)
    kinds = [b.value.op.name for b in bindings(merged["main"]) if "conv2d" in str(getattr(b.value, "op", ""))]
    assert len(kinds) == 2 + 2


def test_of_many_cuts_those_are_left_that_differ_most():
    found = _spread([Cut(n, str(n), (1, 4, 2, 2), n * n, True) for n in range(1, 40)])
    assert len(found) == 12 and found[-1].place == 39
    assert min(after.macs - before.macs for before, after in pairwise(found)) > 50


def test_a_rest_goes_on_behind_the_deepest_features_that_explain_as_much_as_any():
    """Where the very features are computed, there; where none explains much, behind all that is computed anyway."""
    own = network("b", (6, 6, 6), 1)
    alike = candidates("a", network("a", (6, 6, 6), 1), "b", own, images(64))
    assert [one.donor_cut.place for one in alike] == [one.cut.place for one in alike]
    assert all(one.fit > 0.99 for one in alike)
    other = network("a", (6, 6, 6), 2)
    first = candidates("a", other, "b", own, images(64))[0]
    fits = {one.donor_cut.macs: one.fit for one in every("a", other, "b", own, images(64)) if one.cut == first.cut}
    assert first.fit < max(fits.values()) < 0.5 and first.donor_cut.macs == max(fits)


def test_of_what_saves_as_much_the_largest_donor_comes_first():
    mod = module(a=network("a", (4,), 0), b=network("b", (4, 4), 1), c=network("c", (4, 4, 4), 2))
    tried = share(mod, images(128), 0.0, Schedule(batch=32, least=3, rate=10.0)).tried
    donors = [trial.candidate.donor for trial in tried if trial.candidate.task == "a"]
    assert donors == ["c", "b"]


def test_what_failed_is_not_tried_again():
    mod = module(**{name: network(name, (4,), seed) for seed, name in enumerate("abc")})
    tried = share(mod, images(128), 0.0, Schedule(batch=32, least=3, rate=10.0)).tried
    assert len(tried) == len({(trial.candidate.donor, trial.candidate.task) for trial in tried}) == 6


def test_a_search_that_was_ended_goes_on_as_if_it_was_not():
    mod = module(**{name: network(name, (4, 4), seed) for seed, name in enumerate("abc")})
    labels = {"a": np.random.default_rng(0).integers(-1, 4, 50)}
    rest = (Evaluation(images(50, 3), labels), (mixed, shifted(1, 2)))
    # Some trials are within the budget, some are not.
    args = (mod, images(128), 35.0, Schedule(batch=32, least=12, rate=1e-2))
    whole = share(*args, Diary(), *rest)
    assert len({trial.kept for trial in whole.tried}) == 2
    diary, ended = Diary(), 0
    for ends in [1, 5, 13, 14, -1]:
        diary = Diary(ends, diary.kept)
        try:
            again = share(*args, diary, *rest)
        except KeyboardInterrupt:
            ended += 1
    assert ended == 4 and again == type(again)(again.module, whole.tried, whole.originals)
    for task in "abc":
        tvm.ir.assert_structural_equal(again.module[task], whole.module[task], map_free_vars=True)


def test_teachers_are_asked_about_changed_samples():
    teacher, data = Network(network("a", (4,), 0)), images(40)
    lessons = Asked(data, [(teacher, 1)], [shifted(2, 3), mixed])
    given, wanted = lessons(torch.arange(40), np.random.default_rng(0))
    assert not torch.equal(given["image"], torch.from_numpy(data["image"]))
    assert torch.equal(wanted[0], teacher(given)[0])


def test_a_shift_repeats_the_rim():
    values = torch.arange(5.0).reshape(1, 1, 5).repeat(64, 1, 1)
    found = shifted(2, 1)({"x": values}, np.random.default_rng(0))["x"]
    allowed = {(0, 0, 0, 1, 2), (0, 0, 1, 2, 3), (0, 1, 2, 3, 4), (1, 2, 3, 4, 4), (2, 3, 4, 4, 4)}
    assert {tuple(map(int, row[0])) for row in found} == allowed


def test_a_trial_without_hope_is_given_up():
    def curve(*lost: float) -> list[Point]:
        return [Point(10 * n, 0.0, {"a": 0.0, "b": each}) for n, each in enumerate(lost, start=1)]

    assert not hopeless(curve(90, 80), 100, 1.0)
    assert hopeless(curve(40, 38, 37), 100, 1.0) and hopeless(curve(40, 38, 37), 30, 1.0)
    assert not hopeless(curve(20, 10, 6), 100, 1.0)
    assert not hopeless(curve(2, 1.5, 0.9), 100, 1.0)
