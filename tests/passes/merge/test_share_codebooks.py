"""ShareCodebooks: weights of several networks out of one set of vectors, and the bytes that they take as codes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax

from nnfuze_tvm.errors import InputError
from nnfuze_tvm.graph import ops
from nnfuze_tvm.graph.constants import array
from nnfuze_tvm.graph.dataflow import bindings
from nnfuze_tvm.passes.merge.share_codebooks import ShareCodebooks, clustered, nearest, stored_bytes
from tests.passes.merge.networks import answers, merged, module, weights


def layer_weights(mod, layer):
    return [array(b.value.args[1]) for f in mod.functions.values() for b in bindings(f) if b.var.name.endswith(layer)]


def test_layers_of_one_kernel_share_vectors():
    mod = module(a=weights(0), b=weights(1))
    coded = ShareCodebooks(2, 32)(mod)
    relax.analysis.well_formed(coded)
    wide, join = (layer_weights(coded, name) for name in ("wide", "join"))
    vectors = np.concatenate([np.moveaxis(each, 1, -1).reshape(-1, 2) for each in [*wide, *join]])
    assert len(np.unique(vectors, axis=0)) <= 32
    for name in ("stem", "depthwise"):  # 3 and 1 inputs
        for own, old in zip(layer_weights(coded, name), layer_weights(mod, name), strict=True):
            np.testing.assert_array_equal(own, old)
    assert np.corrcoef(answers(mod, "a").ravel(), answers(coded, "a").ravel())[0, 1] > 0.9


def test_bytes_are_those_of_codes_and_codebook():
    mod = module(a=weights(0), b=weights(1))
    plain, coded = stored_bytes(mod, 2), stored_bytes(ShareCodebooks(2, 16)(mod), 2)
    sizes = {n: weights(0)[n].size for n in ("narrow", "side", "wide", "join")}
    ones, threes = (sum(2 * sizes[n] for n in pair) for pair in (("narrow", "side"), ("wide", "join")))
    saved = 4 * (ones + threes) - (ones / 2 + threes / 2) / 2 - 2 * 16 * 2 * 4
    # The dense heads have 30 vectors each.
    head = 2 * weights(0)["head"].size
    assert plain - coded == saved + max(4 * head - head / 4 - 16 * 2 * 4, 0)
    assert plain == sum(v.nbytes for n in (0, 1) for v in weights(n).values())
    assert stored_bytes(merged(mod), 2) == plain


def test_what_would_be_no_smaller_stays():
    mod = module(a=weights(0))
    coded = ShareCodebooks(2, 4096)(mod)
    assert all(np.array_equal(*layer_weights_of(mod, coded, n)) for n in ("wide", "join", "head"))
    assert stored_bytes(coded, 2) == stored_bytes(mod, 2)


def layer_weights_of(mod, coded, name):
    return layer_weights(mod, name)[0], layer_weights(coded, name)[0]


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 40), st.integers(2, 9), st.integers(1, 4), st.integers(0, 9))
def test_a_codebook_is_of_centres(count, codes, length, seed):
    rows = np.random.default_rng(seed).normal(size=(count, length)).astype("float32")
    codebook = clustered(rows, codes)
    assert len(codebook) == min(codes, len(np.unique(rows, axis=0)))
    chosen = nearest(rows, codebook)
    apart = np.square(rows[:, None] - codebook).sum(-1)
    np.testing.assert_allclose(apart[np.arange(count), chosen], apart.min(1), atol=1e-5)
    np.testing.assert_array_equal(clustered(rows, codes), codebook)


@pytest.mark.parametrize(("length", "codes"), [(0, 4), (2, 1), (2, 1 << 17)])
def test_numbers_that_codes_can_not_have(length, codes):
    with pytest.raises(InputError, match="codebooks: give vectors"):
        ShareCodebooks(length, codes)


def test_every_kind_of_layer_goes_into_vectors_and_back():
    """Integers of few values come back as they were, whatever the layout of a layer's weights."""
    own = {n: np.sign(v) for n, v in weights(0).items()}
    mod = module(a=own, b={n: -v for n, v in own.items()})
    coded = ShareCodebooks(2, 4)(mod)
    for binding, other in zip(bindings(mod["a"]), bindings(coded["a"]), strict=True):
        if ops.layer(binding.value) is not None:
            np.testing.assert_array_equal(array(other.value.args[1]), array(binding.value.args[1]))
