"""ZipUnits: what is the same in another order is found, and what is nearly the same stays near."""

from __future__ import annotations

import numpy as np
import pytest
from tvm import relax

from nnfuze_tvm.errors import InputError
from nnfuze_tvm.graph import ir
from nnfuze_tvm.graph.dataflow import bindings, op_name
from nnfuze_tvm.passes.merge.zip_units import ZipUnits, _common, _Unit
from tests.passes.merge.networks import NAMES, answers, images, layers, merged, module, noisy, shuffled, weights

SAMPLES = images(16)


@pytest.mark.parametrize("upto", ["stem", "wide", "side", "join"])
def test_another_order_of_the_channels_is_found(upto):
    own = weights(0)
    mod = module(a=own, b=shuffled(own, 1))
    zipped = ZipUnits(SAMPLES, f"b/{upto}")(mod)
    relax.analysis.well_formed(zipped)
    for task in "ab":
        want = answers(mod, task)
        np.testing.assert_allclose(answers(zipped, task), want, atol=1e-5 * np.abs(want).max())
    main = merged(zipped)
    behind = NAMES[NAMES.index(upto) + 1 :]
    assert [name for name in layers(main) if name.startswith("a/")] == [f"a/{name}" for name in NAMES]
    # With everything in one order, the head is the same as well.
    rest = [] if upto == "join" else [f"b/{name}" for name in behind]
    assert [name for name in layers(main) if name.startswith("b/")] == rest
    assert ir.aliases(main)["b/stem"] == "a/stem"
    assert [op_name(b.value) for b in bindings(main["main"])].count("take") == (upto in ("stem", "wide"))


def test_three_networks_of_which_one_is_another():
    own = weights(0)
    mod = module(a=own, b=shuffled(own, 1), c=noisy(shuffled(own, 2), 0.01))
    zipped = ZipUnits(SAMPLES, "c/join")(mod)
    assert set(layers(merged(zipped))) == {*(f"a/{name}" for name in NAMES), "c/head"}
    for task in "abc":
        want = answers(mod, task)
        assert np.abs(answers(zipped, task) - want).max() < 0.1 * want.std()


@pytest.mark.parametrize("noise", [0.003, 0.03])
def test_noise_on_the_weights_costs_as_much_as_it_is(noise):
    own = weights(3)
    mod = module(a=own, b=noisy(shuffled(own, 1), noise))
    zipped = ZipUnits(SAMPLES, "a/join")(mod)
    lost = [np.abs(answers(zipped, task) - answers(mod, task)).max() / answers(mod, task).std() for task in "ab"]
    assert 0 < max(lost) < 10 * noise


def test_the_common_unit_loses_least():
    rng = np.random.default_rng(0)
    factors = rng.normal(size=(2, 1, 6, 9))
    units = [_Unit(rng.normal(size=(1, 4, 5)), rng.normal(size=4), f @ f.swapaxes(1, 2)) for f in factors]

    def loss(rows: np.ndarray) -> np.ndarray:
        apart = [rows - unit.rows() for unit in units]
        return np.einsum("tgoi,tgij,tgoj->o", apart, [unit.moments for unit in units], apart) / 2

    best = _common(units)
    for _ in range(20):
        assert (loss(best) <= loss(best + rng.normal(0, 1e-3, best.shape))).all()
    # What is lost is what pairs are chosen by.
    a, b = (unit.moments[0] for unit in units)
    apart = (units[0].rows() - units[1].rows())[0]
    parallel = np.linalg.inv(np.linalg.inv(a) + np.linalg.inv(b))
    np.testing.assert_allclose(loss(best), np.einsum("oi,ij,oj->o", apart, parallel, apart) / 2)


def test_what_can_not_be_zipped_is_refused():
    own = weights(0)
    mod = module(a=own, b=weights(1))
    with pytest.raises(InputError, match=r"layer 'a/narrow': no trunk can end behind it; .* a/stem, a/wide"):
        ZipUnits(SAMPLES, "a/narrow")(mod)
    with pytest.raises(InputError, match="two of them"):
        ZipUnits(SAMPLES, "a/wide")(module(a=own))
    with pytest.raises(InputError, match="no array for input 'image'"):
        ZipUnits({}, "a/wide")(mod)
    other = {**weights(1), "depthwise": weights(1)["depthwise"][:, :, :1, :1]}
    with pytest.raises(InputError, match=r"task b: .* differs from a's in more than weights, at 'a/depthwise'"):
        ZipUnits(SAMPLES, "a/wide")(module(a=own, b=other))
    with pytest.raises(InputError, match="must have the same inputs"):
        ZipUnits(SAMPLES, "a/wide")(module(a=own, b=weights(1), other_inputs=("b",)))
    with pytest.raises(InputError, match="must have the same inputs"):
        ZipUnits(SAMPLES, "a/wide")(mod.with_attr(ir.SHARED_INPUTS_ATTR, ["sound"]))
    with pytest.raises(InputError, match=r"must have no states: a\.h"):
        ZipUnits(SAMPLES, "a/wide")(mod.with_attr(ir.OWN_STATES_ATTR, ["a.h"]))
