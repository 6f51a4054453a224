"""Einstein sums."""

from __future__ import annotations

import numpy as np
import pytest

from nnfuze_tvm.errors import ModelError
from nnfuze_tvm.graph.dataflow import bindings, op_name
from tests.frontend.operators.one_node import check, imported, one_node

RNG = np.random.default_rng(0)
CASES = [
    ("ij,jk->ik", (2, 3), (3, 4)), ("ij,jk", (2, 3), (3, 4)), (" k i , k j -> j i ", (3, 2), (3, 4)),
    ("i->", (3,)), ("ii->i", (3, 3)), ("ii", (3, 3)), ("iij->j", (2, 2, 3)), ("...ii->...i", (2, 3, 3)),
    ("ij->ji", (2, 3)), ("bij,bjk->bik", (2, 3, 4), (2, 4, 5)), ("bhid,bhjd->bhij", (2, 3, 4, 5), (2, 3, 6, 5)),
    ("...ij,jk->...ik", (2, 2, 3, 4), (4, 5)), ("...ij,...jk", (1, 3, 4), (2, 4, 5)), ("i,j->ij", (3,), (4,)),
    ("i,i->", (3,), (3,)), ("i,i->i", (3,), (3,)), ("ij,kl,jk->il", (2, 3), (4, 5), (3, 4)),
    ("bld,hdk->bhlk", (2, 3, 4), (5, 4, 6)), ("j,ij->i", (3,), (2, 3)), ("ba,b->", (2, 3), (2,)),
]  # fmt: skip


@pytest.mark.parametrize(("equation", "shapes"), [(first, rest) for first, *rest in CASES], ids=[c[0] for c in CASES])
@pytest.mark.parametrize("dtype", ["float32", "int32"])
def test_sums_are_those_of_numpy(equation, shapes, dtype):
    operands = [(RNG.standard_normal(shape) * 5).astype(dtype) for shape in shapes]
    check("Einsum", [*operands], equation=equation, reference=True)


def test_a_contraction_is_a_matrix_product():
    network, _ = one_node("Einsum", [np.ones((2, 3, 4)), np.ones((2, 5, 4))], equation="bid,bjd->bij")
    names = [op_name(binding.value) for binding in bindings(imported(network)["main"])]
    assert "matmul" in names and "einsum" not in names


@pytest.mark.parametrize("equation", ["ij,jk->ik", "ijk->i", "ij->k"])
def test_equations_that_do_not_fit_are_refused(equation):
    network, _ = one_node("Einsum", [np.ones((2, 3))], equation=equation)
    with pytest.raises(ModelError, match="node 'node' \\(Einsum\\): equation"):
        imported(network)
