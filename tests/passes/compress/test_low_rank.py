"""Two thin layers instead of one: exact where the weights have no higher rank, else nearest on the samples."""

import numpy as np
import pytest
import tvm
from tvm import relax

from nnfuze_tvm.errors import PolicyError
from nnfuze_tvm.graph import ir
from nnfuze_tvm.passes.compress.low_rank import LowRank
from nnfuze_tvm.passes.compress.policy import Policy
from tests.helpers import evaluate_module
from tests.passes.compress.prune.test_prune_channels import Net, shapes
from tests.passes.compress.test_repair import error, samples_of

KINDS = ["dense", "1x1", "3x3", "strided", "conv1d"]


def network(kind: str, rank: int | None = None) -> tuple[Net, tvm.IRModule]:
    """Return a network of one layer of 12 to 16 channels, of a certain rank."""
    net = Net(*{"dense": (4, 12), "conv1d": (1, 12, 9)}.get(kind, (1, 12, 6, 6)))
    kernel = {"3x3": (3, 3), "strided": (3, 3), "1x1": (1, 1), "conv1d": (3,), "dense": ()}[kind]
    weight = net.rng.standard_normal((16, 12, *kernel)).astype("float32")
    if rank is not None:
        weight = (net.rng.standard_normal((16, rank)) @ weight[:rank].reshape(rank, -1)).reshape(weight.shape)
    weight = weight.astype("float32")
    if kind == "dense":
        y = net(relax.op.matmul(net.x, relax.const(weight.T.copy())), "layer")
        return net, net.module(net(relax.op.add(y, net.const(16))))
    call = relax.op.nn.conv1d if kind == "conv1d" else relax.op.nn.conv2d
    given = {"strides": 2, "padding": 1} if kind == "strided" else {"padding": kernel[0] // 2}
    y = net(call(net.x, relax.const(weight), **given), "layer")
    return net, net.module(net(relax.op.add(y, net.const(1, 16, *[1] * len(kernel)))))


def thin(mod: tvm.IRModule, samples: dict[str, np.ndarray] | None = None, **asked: float) -> tvm.IRModule:
    new = LowRank(Policy.parse({"layers": {"layer": asked}}), samples)(mod)
    relax.analysis.well_formed(new)
    return new


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_low_rank_are_two_layers_that_give_the_same(kind: str) -> None:
    net, mod = network(kind, rank=4)
    new = thin(mod, rank=4 / 12) if kind in ("dense", "1x1") else thin(mod, rank=4 / 16)
    assert sorted(shapes(new)) == ["layer", "layer.thin"]
    assert 4 in shapes(new)["layer"] and 4 in shapes(new)["layer.thin"]
    assert ir.lineage(new).names("layer.thin") == ["layer"]
    x = np.random.default_rng(0).standard_normal(ir.static_shape(net.x)).astype("float32")
    (want,), (got,) = evaluate_module(mod, {"x": x}), evaluate_module(new, {"x": x})
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize("kind", ["1x1", "3x3"])
def test_samples_choose_what_of_the_weights_stays(kind: str) -> None:
    net, mod = network(kind)
    samples = samples_of(net, 24)
    # Channels of very different sizes, as behind a rectifier.
    samples["x"] *= np.geomspace(8, 0.1, 12).astype("float32").reshape(1, -1, 1, 1)
    blind, seeing = thin(mod, rank=0.25), thin(mod, samples, rank=0.25)
    assert shapes(blind) == shapes(seeing)
    assert error(seeing, mod, samples) < 0.9 * error(blind, mod, samples)


@pytest.mark.parametrize("limit", [0.02, 0.1, 0.3])
def test_the_rank_is_as_low_as_the_error_allows(limit: float) -> None:
    net, mod = network("1x1")
    samples = samples_of(net, 16)
    samples["x"] *= np.geomspace(8, 0.01, 12).astype("float32").reshape(1, -1, 1, 1)
    new = thin(mod, samples, rank_error=limit)
    found = shapes(new)["layer.thin"][0] if "layer.thin" in shapes(new) else 12
    assert error(new, mod, samples) <= 1.1 * limit
    assert found < 12
    if found > 1:
        assert error(thin(mod, samples, rank=(found - 1) / 12), mod, samples) > 0.5 * limit


def test_what_is_no_less_work_stays() -> None:
    _, mod = network("1x1")
    assert thin(mod, rank=0.75).same_as(mod)
    net = Net(1, 8, 4, 4)
    grouped = net.module(net.conv(net.x, 8, 3, groups=4))
    assert LowRank(Policy.uniform(rank=0.1))(grouped).same_as(grouped)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"rank": 0}, "'default.rank' should be greater than 0, not 0"),
        ({"rank": 1.5}, "'default.rank' should be less than or equal to 1, not 1.5"),
        ({"rank": "half"}, "'default.rank' should be a valid number, not 'half'"),
        ({"rank_error": 1}, "'default.rank_error' should be less than 1, not 1"),
        ({"rank_error": -0.1}, "'default.rank_error' should be greater than or equal to 0, not -0.1"),
        ({"rank_eror": 0.1}, "unknown field 'default.rank_eror'; did you mean 'rank_error'?"),
    ],
)
def test_bad_values_are_one_line(entry: dict[str, object], said: str) -> None:
    with pytest.raises(PolicyError) as raised:
        Policy.parse({"default": entry})
    assert said in str(raised.value) and "\n" not in str(raised.value)
