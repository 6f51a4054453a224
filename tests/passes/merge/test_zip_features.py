"""ZipFeatures: features that go together become one, and each network finds its own again."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tvm import relax

from nnfuze_tvm.passes.merge.zip_features import ZipFeatures, matched
from tests.passes.merge.networks import NAMES, answers, images, layers, merged, module, noisy, shuffled, weights

SAMPLES = images(16)


@pytest.mark.parametrize("upto", ["wide", "join"])
def test_another_order_of_the_channels_is_found(upto):
    own = weights(0)
    mod = module(a=own, b=shuffled(own, 1))
    zipped = ZipFeatures(SAMPLES, f"a/{upto}")(mod)
    relax.analysis.well_formed(zipped)
    for task in "ab":
        want = answers(mod, task)
        np.testing.assert_allclose(answers(zipped, task), want, atol=1e-5 * np.abs(want).max())
    behind = NAMES[NAMES.index(upto) + 1 :]
    assert set(layers(merged(zipped))) - {f"a/{name}" for name in NAMES} <= {f"b/{name}" for name in behind}


def test_noise_on_the_weights_costs_as_much_as_it_is():
    own = weights(3)
    mod = module(a=own, b=noisy(shuffled(own, 1), 0.01))
    zipped = ZipFeatures(SAMPLES, "a/join")(mod)
    lost = [np.abs(answers(zipped, task) - answers(mod, task)).max() / answers(mod, task).std() for task in "ab"]
    assert 0 < max(lost) < 0.1


def test_a_channel_that_a_network_has_twice_makes_room():
    a, b = weights(0), weights(1)
    for name in ("stem", "stem.bias"):
        b[name][:7] = a[name][:7]
        a[name][7] = a[name][0]
    mod = module(a=a, b=b)
    zipped = ZipFeatures(SAMPLES, "a/stem")(mod)
    for task in "ab":
        want = answers(mod, task)
        np.testing.assert_allclose(answers(zipped, task), want, atol=1e-5 * np.abs(want).max())


def test_the_trunk_varies_as_its_features_do():
    mod = module(a=weights(0), b=weights(1))
    zipped = ZipFeatures(SAMPLES, "a/join")(mod)
    assert len(layers(merged(zipped))) == len(NAMES) + 1
    for task in "ab":
        want, got = answers(mod, task), answers(zipped, task)
        assert 0.3 < got.std() / want.std() < 1.5


@given(st.integers(2, 3), st.integers(1, 6), st.integers(0, 99))
def test_every_feature_is_in_one_set(tasks, count, seed):
    rows = np.random.default_rng(seed).normal(size=(20, tasks * count))
    sets = matched(
        np.corrcoef(rows, rowvar=False).reshape(tasks * count, -1), np.repeat(np.arange(tasks), count), count
    )
    assert len(sets) == count and sorted(each for one in sets for each in one) == list(range(tasks * count))
    within = sum(len({each // count for each in one}) < len(one) for one in sets if len(one) == 2)
    assert within <= 0.125 * count * (tasks - 1)
