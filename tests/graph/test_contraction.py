"""How many products fit in int16 is a bound that holds for all data, and no product more does."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnfuze_tvm.graph.contraction import (
    ALL_PRODUCTS,
    FEW_PRODUCTS,
    FEWEST_PRODUCTS,
    MOST_WEIGHTS,
    most_of_few,
    narrow_products,
)

INT16 = np.iinfo("int16")


# By which places of four go to one sum, those of one of the two.
PLACES = {"neighbours": (0, 1), "apart": (0, 2)}


def largest_sums(weights: np.ndarray, count: int, pairs: str, step: int = 4) -> int:
    """Return the largest sum of ``count`` products that follow each other, the worst data given, of ``[O, K]``."""
    found = 0
    own = np.isin(np.arange(count) % 4, PLACES[pairs])
    for start in range(0, weights.shape[1] - count + 1, step):
        part = np.abs(weights[:, start : start + count].astype("int64")) * 128
        found = max(found, *(part[:, which].sum(1).max() for which in (own, ~own)))
    return found


@given(
    bound=st.integers(1, 127),
    shape=st.tuples(st.integers(1, 5), st.integers(1, 60).map(lambda n: 4 * n)),
    seed=st.integers(0, 2**16),
    pairs=st.sampled_from(list(PLACES)),
)
def test_so_many_products_fit_and_not_four_more(bound, shape, seed, pairs):
    weights = np.random.default_rng(seed).integers(-bound, bound + 1, shape).astype("int8")
    count = getattr(narrow_products(weights, 0), pairs)
    if count == ALL_PRODUCTS:
        assert largest_sums(weights, shape[1], pairs) <= INT16.max
    elif count in (0, FEW_PRODUCTS):
        assert largest_sums(weights, min(FEWEST_PRODUCTS, shape[1]), pairs) > INT16.max
        fit = shape[1] % FEW_PRODUCTS == 0 and largest_sums(weights, FEW_PRODUCTS, pairs, FEW_PRODUCTS) <= INT16.max
        assert (count == FEW_PRODUCTS) == fit
    else:
        assert count % 4 == 0 and count >= FEWEST_PRODUCTS
        assert largest_sums(weights, count, pairs) <= INT16.max < largest_sums(weights, count + 4, pairs)


@given(
    bound=st.integers(1, 127),
    shape=st.tuples(st.integers(1, 5), st.integers(1, 30).map(lambda n: FEW_PRODUCTS * n)),
    seed=st.integers(0, 2**16),
)
def test_few_products_fit_where_their_weights_are_few_enough(bound, shape, seed):
    weights = np.random.default_rng(seed).integers(-bound, bound + 1, shape).astype("int8")
    most = [max(largest_sums(row[None], FEW_PRODUCTS, pairs, FEW_PRODUCTS) for pairs in PLACES) for row in weights]
    assert (most_of_few(weights.astype("int32")) * 128).tolist() == most
    assert (max(most) <= INT16.max) == (most_of_few(weights.astype("int32")) <= MOST_WEIGHTS).all()


def test_channels_may_be_any_axis():
    weights = np.random.default_rng(0).integers(-20, 21, (6, 3, 3, 8)).astype("int8")
    found = narrow_products(weights, 0)
    assert found == narrow_products(np.moveaxis(weights, 0, 3), 3) and all(found)


@pytest.mark.parametrize("weights", [np.ones((4, 6), "int8"), np.ones((4, 8), "int16"), np.ones((4, 8), "float32")])
def test_others_have_no_such_number(weights):
    assert narrow_products(weights, 0) == (0, 0)
