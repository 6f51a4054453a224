"""Groups of kernels that are computed band by band: the same bits as one after the other, and worth it by the model."""

import numpy as np
import onnx
import pytest
import tvm
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper
from tvm import relax

from nnfuze_tvm.analysis import metrics, roofline
from nnfuze_tvm.analysis.kernels import kernel_uses
from nnfuze_tvm.deploy import build
from nnfuze_tvm.deploy.memory.usage import usage
from nnfuze_tvm.devices.hardware import Hardware
from nnfuze_tvm.devices.targets import resolve
from nnfuze_tvm.schedules.bands import model
from nnfuze_tvm.schedules.bands.progress import Bands, Reach, Step, course, ends, starts
from nnfuze_tvm.schedules.families import pixel_lanes
from nnfuze_tvm.schedules.fuse_bands import FuseBands
from tests.helpers import few
from tests.schedules import chains

HOST = resolve("host")
SHAPE = (1, 3, 48, 64)


def answers(mod, data):
    machine = relax.VirtualMachine(build.generate(mod, HOST), tvm.cpu())
    return [output.numpy() for output in machine["main"](tvm.runtime.tensor(data))]


def groups(mod):
    return [kernel for kernel in metrics.kernels(mod) if kernel.rule == "bands"]


def check(network, tmp_path, height, parts, quantized=False):
    """Check that groups compute the same bits; return how many kernels are in groups."""
    shape = [dim.dim_value for dim in network.graph.input[0].type.tensor_type.shape.dim]
    data = np.random.default_rng(1).standard_normal(shape).astype("float32")
    _, alone, _ = chains.lowered(network, tmp_path, HOST, samples=data if quantized else None)
    together = chains.grouped(alone, HOST, height, parts)
    for one, other in zip(answers(alone, data), answers(together, data), strict=True):
        np.testing.assert_array_equal(one, other)
    return sum(kernel.knobs["kernels"] for kernel in groups(together))


LAYER = st.fixed_dictionaries(
    {
        "kernel": st.sampled_from([1, 3, 5]),
        "stride": st.sampled_from([1, 1, 2]),
        "dilation": st.sampled_from([1, 1, 2]),
        "channels": st.sampled_from([8, 16, 24]),
        "depthwise": st.booleans(),
        "pool": st.sampled_from([False, False, False, True]),
    }
)
RESIDUAL = st.just({"kernel": 3, "add": True})


@few(2)
@given(
    layers=st.lists(LAYER | RESIDUAL, min_size=2, max_size=3),
    size=st.tuples(st.sampled_from([1, 1, 2]), st.just(16), st.integers(23, 33), st.integers(23, 40)),
    height=st.sampled_from([1, 2, 3, 64]),
    parts=st.sampled_from([1, 2]),
)
def test_any_chain_computes_the_same_bits(layers, size, height, parts, tmp_path_factory):
    check(chains.chain(layers, size), tmp_path_factory.mktemp("chain"), height, parts)


@pytest.mark.parametrize(("height", "parts", "quantized"), [(1, 1, False), (3, 2, True)])
def test_an_inverted_residual_is_one_kernel(tmp_path, height, parts, quantized):
    assert check(chains.chain(chains.INVERTED, (1, 3, 37, 33)), tmp_path, height, parts, quantized) >= 4


def test_reports_know_groups(tmp_path):
    fused, alone, network = chains.lowered(chains.chain(chains.INVERTED, (1, 3, 37, 33)), tmp_path, HOST)
    together = chains.grouped(alone, HOST, 2, 1)
    (group,) = groups(together)
    # Which three of the four are one kernel depends on the machine's vectors.
    assert len(group.layers) >= 3 and set(group.layers) >= {"chain/n1", "chain/n2"}
    less, more = (usage(build.finished(mod, HOST), HOST).total() for mod in (together, alone))
    assert less < more
    machine = roofline.of_board(resolve("rpi4"))
    uses = {use.name: use for use in kernel_uses(network, fused, together, HOST, machine, {})}
    assert uses[group.name].rule == "bands" and uses[group.name].operations > 0
    assert sum(use.operations for use in uses.values()) == pytest.approx(
        sum(use.operations for use in kernel_uses(network, fused, alone, HOST, machine, {}))
    )


def test_what_stays_in_the_cache_is_left_alone(tmp_path):
    _, alone, _ = chains.lowered(chains.chain(chains.INVERTED, (1, 3, 37, 33)), tmp_path, HOST)
    assert groups(FuseBands(HOST)(alone)) == []


@pytest.mark.parametrize(("name", "quantized"), [("rpi3", False), ("rpi5", True)])
def test_inverted_residuals_of_boards_are_one_kernel(tmp_path, name, quantized):
    target = resolve(name)
    network = chains.chain([{**layer, "channels": 4 * layer.get("channels", 0)} for layer in chains.INVERTED], SHAPE)
    data = np.random.default_rng(1).standard_normal(SHAPE).astype("float32")
    _, alone, _ = chains.lowered(network, tmp_path, target, samples=data if quantized else None)
    assert max(kernel.knobs["kernels"] for kernel in groups(chains.grouped(alone, target, 2, 1))) >= 5


@given(
    height=st.integers(1, 56), width=st.integers(1, 56), depth=st.sampled_from([8, 64, 512]), wide=st.integers(1, 32)
)
def test_pointwise_kernels_take_whole_rows(height, width, depth, wide):
    quads, hw = height * width // 4, Hardware.of(resolve("rpi4"))
    found = pixel_lanes.bands(height, width, depth, 16 * wide, hw) if height * width % 4 == 0 else []
    assert all(quads % band == 0 and band * 4 % width == 0 for band in found)
    assert bool(found) == (height * width % 4 == 0)


def test_what_others_read_stays_outside(tmp_path):
    network = chains.chain(chains.INVERTED, (1, 3, 21, 33))
    network.graph.output.append(helper.make_tensor_value_info("v1", TensorProto.FLOAT, None))
    network = onnx.shape_inference.infer_shapes(network)
    _, alone, _ = chains.lowered(network, tmp_path, HOST)
    together = chains.grouped(alone, HOST, 2, 1)
    data = np.random.default_rng(1).standard_normal((1, 3, 21, 33)).astype("float32")
    for one, other in zip(answers(alone, data), answers(together, data), strict=True):
        np.testing.assert_array_equal(one, other)


STEPS = [Step(112, 1, {}), Step(56, 1, {0: Reach(2, -1, 1)}), Step(56, 1, {1: Reach(1, -1, 1)})]


def test_stages_are_as_far_as_the_next_one_needs():
    assert [int(n) for n in ends(STEPS, 4)] == [10, 5, 4]
    assert [int(n) for n in ends(STEPS, 56)] == [112, 56, 56]
    assert [int(n) for n in starts(STEPS, 28)] == [53, 27, 28]


@given(height=st.integers(1, 56), parts=st.integers(1, 4))
def test_every_row_is_there_when_it_is_read(height, parts):
    bands = Bands(height, min(parts, -(-56 // height)))
    found = course(STEPS, bands)
    assert found.iterations[-1] == 56
    assert all(count >= step.rows for count, step in zip(found.iterations, STEPS, strict=True))
    assert 3 <= found.lines[0] <= 112 and 3 <= found.lines[1] <= min(56, height + 2)
    if bands.parts == 1:
        assert found.iterations == (112, 56, 56)


def test_steps_that_do_not_fit_are_no_group():
    assert model.fits(STEPS)
    assert not model.fits([STEPS[0], Step(56, 1, {0: Reach(0, 0, 111)})])
    assert not model.fits([STEPS[0], Step(56, 1, {}), Step(56, 1, {1: Reach(1, 0, 0)})])
