"""Butterflies: exact for matrices that are ones, else nearer than thin layers of as many numbers, and as int8."""

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax

from nnfuze_tvm.errors import PolicyError
from nnfuze_tvm.graph import ir
from nnfuze_tvm.passes.compress.butterfly import Butterfly
from nnfuze_tvm.passes.compress.low_rank import LowRank
from nnfuze_tvm.passes.compress.policy import Policy
from tests.helpers import evaluate_module
from tests.passes.compress.prune.test_prune_channels import Net, shapes
from tests.passes.compress.test_repair import error, samples_of

INPUTS, OUTPUTS = 64, 96


def network(kind: str, weight: np.ndarray, bias: bool = True) -> tuple[Net, tvm.IRModule]:
    """Return a network of one layer with a weight ``[outputs, inputs]``."""
    outputs, inputs = weight.shape
    shape = {"dense": (1, inputs), "rows": (2, 3, inputs), "conv1d": (1, inputs, 9)}.get(kind, (1, inputs, 6, 5))
    net = Net(*shape)
    if kind in ("dense", "rows"):
        y = net(relax.op.matmul(net.x, relax.const(weight.T.astype("float32").copy())), "layer")
        return net, net.module(net(relax.op.add(y, net.const(outputs))) if bias else y)
    space = [1] * (len(shape) - 2)
    call = relax.op.nn.conv1d if kind == "conv1d" else relax.op.nn.conv2d
    given = {"strides": 2} if kind == "strided" else {}
    y = net(call(net.x, relax.const(weight.reshape(outputs, inputs, *space).astype("float32")), **given), "layer")
    return net, net.module(net(relax.op.add(y, net.const(1, outputs, *space))) if bias else y)


def of_blocks(rng: np.random.Generator, blocks: int, rank: int, outputs: int = OUTPUTS, inputs: int = INPUTS):
    """Return a matrix whose blocks have a rank."""
    wide = rng.standard_normal((blocks, blocks, outputs // blocks, rank))
    thin = rng.standard_normal((blocks, blocks, rank, inputs // blocks))
    return (wide @ thin).transpose(0, 2, 1, 3).reshape(outputs, inputs)


def butterfly(mod: tvm.IRModule, samples: dict[str, np.ndarray] | None = None, **asked: float) -> tvm.IRModule:
    new = Butterfly(Policy.parse({"layers": {"layer": asked}}), samples)(mod)
    relax.analysis.well_formed(new)
    return new


@settings(max_examples=8, deadline=None)
@given(
    kind=st.sampled_from(["dense", "rows", "1x1", "strided", "conv1d"]),
    blocks=st.sampled_from([2, 4]),
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    seed=st.integers(0, 99),
)
def test_matrices_of_low_blocks_are_two_layers_that_give_the_same(kind, blocks, sizes, seed) -> None:
    outputs, inputs = (64 * size for size in sizes)
    weight = of_blocks(np.random.default_rng(seed), blocks, 4, outputs, inputs)
    net, mod = network(kind, weight)
    new = butterfly(mod, butterfly_error=1e-4)
    assert "layer.butterfly" in shapes(new)
    assert ir.lineage(new).names("layer.butterfly") == ["layer"]
    x = np.random.default_rng(0).standard_normal(ir.static_shape(net.x)).astype("float32")
    (want,), (got,) = evaluate_module(mod, {"x": x}), evaluate_module(new, {"x": x})
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, atol=1e-3 * np.abs(want).max())


@pytest.mark.parametrize("kind", ["dense", "1x1"])
def test_as_many_numbers_are_nearer_than_in_thin_layers(kind: str) -> None:
    # A discrete cosine transform: of full rank, its blocks are not.
    weight = np.cos(np.pi / 512 * np.outer(np.arange(512), np.arange(512) + 0.5))
    net, mod = network(kind, weight, bias=False)
    samples = samples_of(net, 400)
    new = butterfly(mod, samples, butterfly=0.25)
    thin = LowRank(Policy.parse({"layers": {"layer": {"rank": 0.125}}}), samples)(mod)
    count = [sum(np.prod(shape) for shape in shapes(each).values()) for each in (mod, new, thin)]
    assert count[1] <= 0.25 * count[0] and count[1] <= count[2]
    assert error(new, mod, samples) < 0.5 * error(thin, mod, samples)


def test_samples_do_not_lead_away_from_what_is_exact() -> None:
    """Inputs that go together, as behind a rectifier, tell of every block something of the others."""
    rng = np.random.default_rng(0)
    _, mod = network("dense", of_blocks(rng, 4, 4, 128, 128), bias=False)
    mixed = rng.standard_normal((16, 128)) + 1
    samples = {"x": np.maximum(rng.standard_normal((600, 16)) @ mixed, 0).astype("float32")}
    assert error(butterfly(mod, samples, butterfly=0.25), mod, samples) < 1e-3


def test_samples_choose_what_of_the_blocks_stays() -> None:
    net, mod = network("1x1", np.random.default_rng(0).standard_normal((64, 64)), bias=False)
    samples = samples_of(net, 24)
    samples["x"] *= np.geomspace(8, 0.1, 64).astype("float32").reshape(1, -1, 1, 1)
    blind, seeing = butterfly(mod, butterfly=0.4), butterfly(mod, samples, butterfly=0.4)
    assert error(seeing, mod, samples) < 0.9 * error(blind, mod, samples)


def test_values_without_a_name_are_not_taken_for_each_other() -> None:
    """What is repaired behind a butterfly are the layers that were there, whatever new values are called."""
    rng = np.random.default_rng(0)
    net = Net(1, 64, 6, 5)
    y = net.x
    for n, (inputs, outputs) in enumerate([(64, 96), (96, 128), (128, 64)]):
        weight = rng.standard_normal((outputs, inputs, 1, 1)).astype("float32") / 8
        conv = net(relax.op.nn.conv2d(y, relax.const(weight)), f"c{n}")
        y = net(relax.op.nn.relu(net(relax.op.add(conv, net.const(1, outputs, 1, 1)))))
    mod = net.module(y)
    samples = samples_of(net, 24)
    new = Butterfly(Policy.uniform(butterfly=0.6), samples)(mod)
    relax.analysis.well_formed(new)
    plain = Butterfly(Policy.uniform(butterfly=0.6))(mod)
    assert {"c0.butterfly", "c1.butterfly", "c2.butterfly"} < shapes(new).keys()
    assert error(new, mod, samples) < error(plain, mod, samples)


@pytest.mark.parametrize("limit", [0.05, 0.2])
def test_as_few_numbers_as_the_error_allows(limit: float) -> None:
    weight = of_blocks(np.random.default_rng(0), 4, 9, 128, 128) * np.geomspace(1, 1e-3, 128)
    net, mod = network("1x1", weight, bias=False)
    samples = samples_of(net, 60)
    new = butterfly(mod, samples, butterfly_error=limit)
    assert "layer.butterfly" in shapes(new)
    assert error(new, mod, samples) <= 1.1 * limit


def test_what_is_no_less_work_or_has_no_whole_blocks_stays() -> None:
    rng = np.random.default_rng(0)
    _, mod = network("1x1", rng.standard_normal((64, 64)))
    assert butterfly(mod, butterfly_error=1e-3).same_as(mod)
    for outputs, inputs in ((60, 64), (61, 64), (16, 64)):
        _, odd = network("dense", rng.standard_normal((outputs, inputs)))
        assert butterfly(odd, butterfly=0.4).same_as(odd) == (outputs != 60)
    _, wild = network("1x1", np.full((64, 64), np.nan))
    assert butterfly(wild, butterfly=0.25).same_as(wild)
    assert LowRank(Policy.uniform(rank=0.25))(wild).same_as(wild)
    net = Net(1, 64, 4, 4)
    large = net.module(net.conv(net.x, 64, 3))
    assert Butterfly(Policy.uniform(butterfly=0.25))(large).same_as(large)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"butterfly": 0}, "'default.butterfly' should be greater than 0, not 0"),
        ({"butterfly": 2}, "'default.butterfly' should be less than or equal to 1, not 2"),
        ({"butterfly_error": 1}, "'default.butterfly_error' should be less than 1, not 1"),
        ({"buterfly": 0.1}, "unknown field 'default.buterfly'; did you mean 'butterfly'?"),
    ],
)
def test_bad_values_are_one_line(entry: dict[str, object], said: str) -> None:
    with pytest.raises(PolicyError) as raised:
        Policy.parse({"default": entry})
    assert said in str(raised.value) and "\n" not in str(raised.value)
