"""Channels that others stand in for go first, and budgets for the whole network are kept."""

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax

from nnfuze_tvm.analysis import metrics
from nnfuze_tvm.errors import InputError
from nnfuze_tvm.graph import evaluate
from nnfuze_tvm.passes import pipeline
from nnfuze_tvm.passes.compress import method, method_settings
from nnfuze_tvm.passes.compress.policy import LayerPolicy, Policy
from nnfuze_tvm.passes.compress.prune.budget import Budget
from nnfuze_tvm.passes.compress.prune.channel_groups import CoupledFunction
from nnfuze_tvm.passes.compress.prune.elimination import eliminations
from nnfuze_tvm.passes.compress.prune.prune_channels import PruneChannels
from tests.passes.compress.prune.test_prune_channels import Net, shapes
from tests.passes.compress.test_repair import samples_of


def test_what_is_lost_is_what_least_squares_leave() -> None:
    """The errors of the last channels are those of regressions on the channels that are left."""
    net = Net(1, 3, 4, 4)
    y = net.relu(net.conv(net.x, 6))
    mod, samples = net.module(net.conv(y, 5)), samples_of(net, 40)
    coupling = CoupledFunction(mod["main"])
    (found,) = eliminations(mod, coupling, samples, evaluate.executor)
    assert sorted(found.order.tolist()) == sorted(coupling.groups()[0].classes.tolist())
    assert (np.diff(found.errors) >= -1e-9).all()
    rows = np.concatenate(
        [
            evaluate.executor(tvm.IRModule({"main": net.emitter.finish([net.x], [y])}))({"x": x[None]})[0][0].reshape(
                6, -1
            )
            for x in samples["x"]
        ],
        axis=1,
    ).T.astype("float64")
    rows -= rows.mean(0)
    weight = coupling.layers[next(v for v in coupling.layers if v.name == "conv1")].weight[:, :, 0, 0]
    wanted = rows @ weight.T
    first = {label: n for n, label in enumerate(coupling.groups()[0].classes.tolist())}
    for gone in (1, 3, 5):
        left = [first[label] for label in found.order[gone:].tolist()]
        solution = np.linalg.lstsq(rows[:, left], wanted, rcond=None)[0]
        error = np.square(wanted - rows[:, left] @ solution).sum() / np.square(wanted).sum()
        assert found.errors[gone] == pytest.approx(error, rel=0.05, abs=0.005)


def test_copies_go_first() -> None:
    net = Net(1, 3, 4, 4)
    weight = net.rng.standard_normal((6, 3, 1, 1)).astype("float32")
    weight[[1, 4]] = 3 * weight[[0, 5]]
    y = net.relu(net(relax.op.nn.conv2d(net.x, relax.const(weight)), net._name()))
    mod = net.module(net.conv(y, 4))
    policy = Policy.parse({"layers": {"conv0": {"keep": 4 / 6}}})
    new = PruneChannels(policy, calibration=samples_of(net, 16))(mod)
    (kept,) = [
        layer.weight[:, :, 0, 0] for layer in CoupledFunction(new["main"]).layers.values() if layer.name == "conv0"
    ]
    directions = {tuple(np.round(row / np.linalg.norm(row), 4)) for row in kept}
    assert len(directions) == 4


def macs(mod: tvm.IRModule) -> int:
    return sum(layer.macs for layer in metrics.layers(mod))


@given(
    st.floats(0.2, 0.9), st.sampled_from(["macs", "bytes", "both"]), st.sampled_from(["plain", "residual", "depthwise"])
)
@settings(max_examples=8, deadline=None)
def test_budgets_are_kept(share: float, of: str, kind: str) -> None:
    net = Net(1, 3, 6, 6)
    y = net.relu(net.conv(net.x, 16, 3))
    z = net.relu(net.conv(y, 16, 3, groups=16 if kind == "depthwise" else 1))
    z = net(relax.op.add(z, y)) if kind == "residual" else net.relu(net.conv(z, 24))
    mod = net.module(net.head(z))
    budget = Budget(macs=share if of != "bytes" else None, bytes=share if of != "macs" else None)
    new = PruneChannels(Policy(), calibration=samples_of(net, 4), budget=budget, repair=False)(mod)
    sizes = [sum(np.prod(shape) for shape in shapes(each).values()) for each in (new, mod)]
    assert macs(new) <= share * macs(mod) + 1 or of == "bytes"
    assert sizes[0] <= share * sizes[1] + 1 or of == "macs"
    # It ends as soon as the budget is met.
    assert macs(new) > 0.7 * share * macs(mod) or sizes[0] > 0.7 * share * sizes[1]


def test_what_a_policy_states_stays_and_bits_count() -> None:
    net = Net(1, 3, 6, 6)
    mod = net.module(net.head(net.relu(net.conv(net.relu(net.conv(net.x, 16, 3)), 16, 3))))
    samples = samples_of(net, 4)
    stated = Policy.parse({"layers": {"conv0": {"keep": 0.75}}})
    new = PruneChannels(stated, calibration=samples, budget=Budget(macs=0.4), repair=False)(mod)
    assert shapes(new)["conv0"][0] == 12
    assert shapes(new)["conv1"][0] < 16
    eight = Policy.uniform(bits=8)
    assert PruneChannels(eight, calibration=samples, budget=Budget(bytes=0.25), repair=False)(mod).same_as(mod)
    with pytest.raises(InputError, match=r"^--macs 0.001: with one channel .* of its macs are left$"):
        PruneChannels(Policy(), calibration=samples, budget=Budget(macs=0.001))(mod)
    with pytest.raises(InputError, match="a budget for the whole network goes with repair only"):
        PruneChannels(Policy(), "l2", samples, budget=Budget(macs=0.5))


def test_budgets_start_the_method_and_need_samples() -> None:
    whole = [LayerPolicy()]
    assert method.asked(pipeline.METHODS, whole, {"macs": None}) == []
    assert [one.name for one in method.asked(pipeline.METHODS, whole, {"macs": 0.5})] == ["pruned"]
    with pytest.raises(InputError, match=r"^--bytes 0.3: needs sample inputs"):
        method_settings.check_samples(pipeline.METHODS, {"bytes": 0.3})
