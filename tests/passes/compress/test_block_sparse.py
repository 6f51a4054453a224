"""Blocks of weights that become zero: equally many in each row, chosen by samples, repaired, and kept in training."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relax

from nnfuze_tvm.errors import PolicyError
from nnfuze_tvm.graph import block_sparsity, ops
from nnfuze_tvm.graph.constants import array
from nnfuze_tvm.graph.dataflow import bindings
from nnfuze_tvm.graph.evaluate import evaluate
from nnfuze_tvm.passes.compress.block_sparse import BlockSparse
from nnfuze_tvm.passes.compress.free_weights import with_free_weights, with_zero_blocks
from nnfuze_tvm.passes.compress.insert_qdq import InsertQDQ
from nnfuze_tvm.passes.compress.policy import Policy
from tests.helpers import evaluate_module
from tests.passes.compress.prune.test_prune_channels import Net
from tests.passes.compress.test_repair import error, samples_of

KERNELS = {"dense": (), "1x1": (1, 1), "3x3": (3, 3), "conv1d": (3,)}


def network(kind: str, outputs: int = 32) -> tuple[Net, tvm.IRModule]:
    """Return a network of one layer of 32 input channels."""
    net, kernel = Net(*{"dense": (4, 32), "conv1d": (1, 32, 9)}.get(kind, (1, 32, 6, 6))), KERNELS[kind]
    weight = net.rng.standard_normal((outputs, 32, *kernel)).astype("float32")
    if kind == "dense":
        y = net(relax.op.matmul(net.x, relax.const(weight.T.copy())), "layer")
        return net, net.module(net(relax.op.add(y, net.const(outputs))))
    call = relax.op.nn.conv1d if kind == "conv1d" else relax.op.nn.conv2d
    y = net(call(net.x, relax.const(weight), padding=kernel[0] // 2), "layer")
    return net, net.module(net(relax.op.add(y, net.const(1, outputs, *[1] * len(kernel)))))


def sparse(mod: tvm.IRModule, sparsity: float, samples: dict[str, np.ndarray] | None = None) -> tvm.IRModule:
    new = BlockSparse(Policy.uniform(sparsity=sparsity), samples)(mod)
    relax.analysis.well_formed(new)
    return new


def filters(mod: tvm.IRModule) -> np.ndarray:
    (call,) = (b.value for b in bindings(mod["main"]) if ops.is_layer(b.value))
    return ops.layer(call).filters.unpack(array(call.args[1]))


@pytest.mark.parametrize("kind", KERNELS)
def test_the_largest_blocks_of_each_row_stay(kind: str) -> None:
    _, mod = network(kind)
    before, after = (block_sparsity.in_blocks(filters(each)) for each in (mod, sparse(mod, 0.75)))
    used, size = after.any((2, 3, 4)), np.square(before).sum((2, 3, 4))
    assert (used.sum(1) == 2).all()
    assert (np.where(used, size, np.inf).min(1) >= np.where(used, 0, size).max(1)).all()
    np.testing.assert_array_equal(after[used], before[used])


@pytest.mark.parametrize("kind", KERNELS)
def test_what_is_stored_of_blocks_gives_the_weights_back(kind: str) -> None:
    weights = filters(sparse(network(kind)[1], 0.6))
    kept = block_sparsity.kept_blocks(weights)
    rows = block_sparsity.in_rows(weights, kept)
    np.testing.assert_array_equal(block_sparsity.of_rows(rows, kept, 32), weights)
    x = np.random.default_rng(0).standard_normal((5, weights[0, 0].size)).astype("float32")
    own = x[:, block_sparsity.columns(kept, weights[0, 0, 0].size)].swapaxes(0, 1)
    sums = own @ rows.reshape(*rows.shape[:2], -1).swapaxes(1, 2)
    np.testing.assert_allclose(np.concatenate(list(sums), 1), x @ weights[0].reshape(32, -1).T, atol=1e-3)


@pytest.mark.parametrize("kind", ["dense", "3x3"])
def test_samples_choose_and_repair(kind: str) -> None:
    net, mod = network(kind)
    samples = samples_of(net, 128)
    shape = (1, -1) if kind == "dense" else (1, -1, 1, 1)
    # Channels of very different sizes, that go together.
    samples["x"] *= np.geomspace(8, 0.1, 32).astype("float32").reshape(shape)
    halves = np.split(samples["x"], 2, 1)
    samples["x"] = np.concatenate([halves[0], 0.7 * halves[0] + 0.2 * halves[1]], 1).astype("float32")
    blind, seeing = sparse(mod, 0.5), sparse(mod, 0.5, samples)
    assert error(seeing, mod, samples) < 0.6 * error(blind, mod, samples)
    assert block_sparsity.kept_blocks(filters(seeing)).shape == (2, 4)


def test_layers_without_whole_blocks_stay() -> None:
    _, mod = network("1x1", outputs=24)
    assert sparse(mod, 0.75).same_as(mod)
    assert sparse(network("1x1")[1], 0.05) is not None
    net = Net(1, 32, 4, 4)
    grouped = net.module(net.conv(net.x, 32, 3, groups=2))
    assert sparse(grouped, 0.75).same_as(grouped)


@pytest.mark.parametrize("bits", [32, 8])
def test_training_leaves_zero_blocks(bits: int) -> None:
    net, mod = network("3x3")
    samples = samples_of(net, 4)
    mod = sparse(mod, 0.75)
    if bits == 8:
        mod = InsertQDQ(samples, Policy.uniform(bits=8))(mod)
    form = (with_free_weights if bits == 8 else with_zero_blocks)(mod["main"])
    x = {"x": samples["x"][:1]}
    np.testing.assert_allclose(evaluate(form, x)[0], evaluate_module(mod, x)[0], rtol=1e-5, atol=1e-5)
    masks = [
        b.value for b in bindings(form) for arg in b.value.args if str(arg.ty.dtype) == "int8" and arg.ty.ndim == 4
    ]
    assert masks


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"sparsity": 1}, "'default.sparsity' should be less than 1, not 1"),
        ({"sparsity": -0.5}, "'default.sparsity' should be greater than or equal to 0, not -0.5"),
        ({"sparsity": "half"}, "'default.sparsity' should be a valid number, not 'half'"),
        ({"sparsiti": 0.5}, "unknown field 'default.sparsiti'; did you mean 'sparsity'?"),
    ],
)
def test_bad_values_are_one_line(entry: dict[str, object], said: str) -> None:
    with pytest.raises(PolicyError) as raised:
        Policy.parse({"default": entry})
    assert said in str(raised.value) and "\n" not in str(raised.value)
