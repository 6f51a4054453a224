"""Kernels in bands where most memory is needed: the same bits, and never more memory."""

import numpy as np
import pytest
import tvm
from hypothesis import given
from hypothesis import strategies as st
from tvm import relax

from nnfuze_tvm.analysis import metrics
from nnfuze_tvm.deploy import build
from nnfuze_tvm.deploy.memory.lower_peak import LowerPeak
from nnfuze_tvm.deploy.memory.usage import usage
from nnfuze_tvm.deploy.memory.work import Step, Work
from nnfuze_tvm.devices.targets import resolve
from tests.helpers import few
from tests.schedules import chains
from tests.schedules.test_bands import LAYER, RESIDUAL, SHAPE, answers

HOST = resolve("host")


def needed(mod, target=HOST):
    return usage(build.finished(mod, target), target).total()


def check(network, tmp_path, quantized=False):
    """Check that less memory, or as much, is enough for the same bits; return both numbers of bytes."""
    shape = [dim.dim_value for dim in network.graph.input[0].type.tensor_type.shape.dim]
    data = np.random.default_rng(1).standard_normal(shape).astype("float32")
    _, alone, _ = chains.lowered(network, tmp_path, HOST, data if quantized else None, small=True)
    together = LowerPeak(HOST)(alone)
    for one, other in zip(answers(alone, data), answers(together, data), strict=True):
        np.testing.assert_array_equal(one, other)
    before, after = needed(alone), needed(together)
    assert after <= before
    return before, after


@few(2)
@given(
    layers=st.lists(LAYER | RESIDUAL, min_size=2, max_size=4),
    size=st.tuples(st.sampled_from([1, 1, 2]), st.just(16), st.integers(9, 33), st.integers(9, 40)),
)
def test_any_chain_computes_the_same_bits_in_no_more_memory(layers, size, tmp_path_factory):
    check(chains.chain(layers, size), tmp_path_factory.mktemp("chain"))


@pytest.mark.parametrize("quantized", [False, True])
def test_residual_blocks_need_less(tmp_path, quantized):
    layers = [
        {"kernel": 3, "channels": 32},
        *[{"kernel": 3, "add": True}] * 2,
        {"kernel": 3, "stride": 2, "channels": 32},
    ]
    before, after = check(chains.chain(layers, (1, 3, 40, 48)), tmp_path, quantized)
    assert after < 0.8 * before


@pytest.mark.parametrize(("name", "quantized"), [("host", False), ("rpi4", True), ("rpi5", True)])
def test_inverted_residuals_need_half(tmp_path, name, quantized):
    target = resolve(name)
    wide = [{**layer, "channels": 4 * layer.get("channels", 0)} for layer in chains.INVERTED]
    network = chains.chain([*wide, *[{"kernel": 3, "stride": 2, "channels": 16}] * 2], SHAPE)
    data = np.random.default_rng(1).standard_normal(SHAPE).astype("float32")
    _, alone, _ = chains.lowered(network, tmp_path, target, data if quantized else None, small=True)
    assert needed(LowerPeak(target)(alone), target) < 0.5 * needed(alone, target)


def test_networks_of_small_weights_are_fused_for_their_memory(tmp_path):
    fused, alone, _ = chains.lowered(chains.chain(chains.INVERTED, (1, 3, 37, 33)), tmp_path, HOST, small=True)
    built = build.schedule(fused, HOST)
    assert any(kernel.rule == "bands" for kernel in metrics.kernels(built))
    assert needed(built) < needed(alone)


def test_what_has_no_weights_is_no_group(tmp_path):
    network = chains.chain([{"pool": True}, {"kernel": 1, "channels": 8}], (1, 8, 7, 13))
    network.graph.node[0].attribute[1].ints[:] = [3, 3]
    del network.graph.value_info[:]
    check(network, tmp_path)


def test_what_no_group_lowers_stays_as_it_is():
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((4, 8), "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            out = builder.emit_output(builder.emit(relax.op.nn.softmax(x)))
        builder.emit_func_output(out)
    scheduled = build.lower(builder.get(), HOST)
    tvm.ir.assert_structural_equal(LowerPeak(HOST)(scheduled), scheduled)


def test_a_profile_has_its_peak():
    work = Work([4, 8, 2], [Step((), (0,), 1), Step((0,), (1,)), Step((1,), (2,), 3)], frozenset([2]))
    assert work.profile() == [5, 12, 13] and work.peak(range(3)) == 13
