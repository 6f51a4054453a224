"""Repair: what is linear in what was kept comes back exactly, and nothing becomes worse."""

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax

from nnfuze_tvm.graph import ops
from nnfuze_tvm.graph.constants import array
from nnfuze_tvm.graph.dataflow import Emitter, bindings
from nnfuze_tvm.passes.compress.error import output_error
from nnfuze_tvm.passes.compress.least_squares import Seen, fit
from nnfuze_tvm.passes.compress.policy import Policy
from nnfuze_tvm.passes.compress.prune.prune_channels import PruneChannels
from nnfuze_tvm.passes.compress.sites import ordered, sites_of
from tests.helpers import evaluate_module
from tests.passes.compress.prune.test_prune_channels import Net

WITH_ROWS = {name: each for name, each in ops.OPERATORS.items() if each.rows is not None}


@pytest.mark.parametrize("name", WITH_ROWS)
def test_rows_times_weights_are_the_layer(name: str) -> None:
    operator, rng = WITH_ROWS[name], np.random.default_rng(0)
    for example in operator.examples:
        given = [rng.uniform(-1, 1, shape).astype("float32") for shape in example.shapes]
        data = relax.Var("x", relax.TensorType(given[0].shape, "float32"))
        emitter = Emitter()
        var = emitter.emit(example.call(data, *map(relax.const, given[1:])))
        (binding,) = bindings(emitter.finish([data], [var]))
        layer = ops.layer(binding.value)
        if layer is None:
            continue
        result = np.moveaxis(operator.evaluate(binding.value, *given), layer.result, -1)
        result = result.reshape(-1, result.shape[-1])
        places = np.sort(rng.permutation(len(result))[:7])
        filters = layer.filters.unpack(given[1])
        rows = operator.rows(binding.value, given[0], places)
        sums = rows @ filters.reshape(*filters.shape[:2], -1).swapaxes(1, 2)
        np.testing.assert_allclose(np.concatenate(list(sums), 1), result[places], rtol=1e-4, atol=1e-4)


def error(new: tvm.IRModule, mod: tvm.IRModule, samples: dict[str, np.ndarray]) -> float:
    rows = [{"x": x[None]} for x in samples["x"]]
    found, wanted = ([evaluate_module(each, row)[0] for row in rows] for each in (new, mod))
    return output_error(found, wanted)


def pruned(mod: tvm.IRModule, samples: dict[str, np.ndarray], repair: bool, **keep: float) -> tvm.IRModule:
    policy = Policy.parse({"layers": {name: {"keep": share} for name, share in keep.items()}})
    new = PruneChannels(policy, "l1", samples, repair=repair)(mod)
    relax.analysis.well_formed(new)
    return new


def samples_of(net: Net, count: int, seed: int = 5) -> dict[str, np.ndarray]:
    shape = [int(size) for size in net.x.ty.shape.values]
    return {"x": np.random.default_rng(seed).standard_normal((count, *shape[1:])).astype("float32")}


def redundant(net: Net, reader: str) -> tvm.IRModule:
    """Return a network whose first layer makes eight channels that are sums of four."""
    weight = net.rng.standard_normal((8, 3, 1, 1)).astype("float32")
    weight[:4] *= 4
    weight[4:] = 0.2 * weight[:4] + 0.1 * weight[[1, 2, 3, 0]]
    y = net(relax.op.nn.conv2d(net.x, relax.const(weight)), net._name())
    y = net(relax.op.add(y, net.const(1, 8, 1, 1)))
    if reader == "conv":
        y = net.conv(y, 6)
    elif reader == "conv without bias":
        y = net.conv(y, 6, bias=False)
    elif reader == "residual":
        y = net(relax.op.add(net.conv(y, 6), net.conv(net.x, 6)))
    elif reader == "dense":
        y = net.dense(net.flat(y), 5)
    elif reader == "two":
        return net.module(net.conv(y, 6), net.dense(net.flat(y), 5))
    return net.module(y)


@pytest.mark.parametrize("reader", ["conv", "residual", "dense", "two"])
def test_what_is_linear_in_what_stays_comes_back(reader: str) -> None:
    net = Net(1, 3, 3, 3)
    mod, samples = redundant(net, reader), samples_of(net, 160)
    plain, new = (pruned(mod, samples, repair, conv0=0.5) for repair in (False, True))
    unseen = samples_of(net, 8, seed=6)
    assert error(plain, mod, unseen) > 0.05
    assert error(new, mod, unseen) < 0.02


@given(
    st.sampled_from(["conv", "grouped", "depthwise", "strided", "residual"]),
    st.sampled_from([0.25, 0.5, 0.75]),
    st.integers(0, 99),
)
@settings(max_examples=10, deadline=None)
def test_no_output_is_worse_and_shapes_are_those_of_plain_removal(kind: str, keep: float, seed: int) -> None:
    net = Net(1, 3, 6, 6, seed=seed)
    y = net.relu(net.conv(net.x, 8, 3))
    if kind == "conv":
        y = net.conv(y, 8, 3)
    elif kind == "strided":
        y = net.conv(y, 8, 3, strides=2)
    elif kind == "residual":
        y = net(relax.op.add(net.conv(net.relu(net.conv(y, 8, 3)), 8, 3), y))
    else:
        y = net.conv(y, 8, 3, groups=8 if kind == "depthwise" else 2)
    mod, samples = net.module(net.head(net.relu(y))), samples_of(net, 16, seed)
    plain, new = (pruned(mod, samples, repair, **{"conv0": keep}) for repair in (False, True))
    kinds = [[(b.var.name, str(b.var.ty)) for b in bindings(each["main"])] for each in (plain, new)]
    assert kinds[0] == kinds[1]
    held = {"x": samples["x"][3::4]}
    assert error(new, mod, held) <= 1.021 * error(plain, mod, held)


def test_a_layer_waits_for_what_is_added_to_it() -> None:
    net = Net(1, 8, 4, 4)
    y = net.conv(net.relu(net.conv(net.x, 8, 3)), 8, 3)
    mod = net.module(net(relax.op.add(y, net.conv(net.x, 8))))
    func = mod["main"]
    same = {b.var.name: b.var for b in bindings(func)}
    sites = sites_of(func, same)
    by_name = {var.name: site for var, site in sites.items()}
    assert by_name["conv1"].total is not None
    assert by_name["conv2"].total is None
    order = [binding.var.name for binding in ordered(func, sites)]
    assert order.index("conv2") < order.index("conv1")
    assert sorted(order) == sorted(b.var.name for b in bindings(func))


def test_few_samples_repair_nothing() -> None:
    net = Net(1, 3, 3, 3)
    mod, samples = redundant(net, "conv"), samples_of(net, 3)
    one, other = (pruned(mod, samples, repair, conv0=0.5) for repair in (False, True))
    tvm.ir.assert_structural_equal(one, other)


def test_weights_that_two_layers_read_stay_as_they_are() -> None:
    net = Net(1, 3, 3, 3)
    y = net.conv(net.x, 8)
    shared = net.const(8, 8, 1, 1)
    once = net(relax.op.nn.conv2d(net.relu(y), shared), "once")
    again = net(relax.op.nn.conv2d(net(relax.op.abs(y)), shared), "again")
    new = pruned(net.module(once, again), samples_of(net, 16), True, conv0=0.5)
    weights = {b.var.name: array(b.value.args[1]) for b in bindings(new["main"]) if ops.is_layer(b.value)}
    assert np.array_equal(weights["once"], weights["again"])


@pytest.mark.parametrize("count", [40, 6])
def test_least_squares_find_the_weights_that_were_there(count: int) -> None:
    rng = np.random.default_rng(0)
    rows, weight = rng.standard_normal((2, count, 10)), rng.standard_normal((2, 3, 10))
    rows += 5
    parts = [Seen(part, part @ weight.swapaxes(1, 2) + 7) for part in (rows[:, ::2], rows[:, 1::2])]
    start, bias = np.zeros_like(weight), np.zeros((2, 1, 3))
    found = fit(*parts, start, bias, has_bias=True)
    assert found is not None
    assert parts[1].error(*found) < (1e-3 if count > 20 else 0.9) * parts[1].error(start, bias)
    assert fit(*parts, weight, bias + 7, has_bias=True) is None
