"""Graphs in PyTorch: the same values, gradients, and the way back without a change."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import tvm
from tvm import relax

from nnfuze_tvm import load
from nnfuze_tvm.errors import NNFuzeError
from nnfuze_tvm.graph import ir, ops
from nnfuze_tvm.graph.dataflow import Emitter
from nnfuze_tvm.graph.evaluate import evaluate
from nnfuze_tvm.passes.pipeline import merge_phases
from nnfuze_tvm.training.network import Network
from tests.graph.calls import calls, examples

SPEECH = Path(__file__).parents[2] / "examples" / "speech"
FAMILIES = sorted({operator.family for operator in ops.OPERATORS.values() if operator.train and operator.examples})


# Operators whose results jump where their operands change a little.
JUMPS = ("floor", "ceil", "round", "trunc", "mod")


def _trains(layer: str) -> bool:
    return ops.OPERATORS[layer.removeprefix("task/").rsplit("-", 1)[0]].train is not None


def test_every_family_has_gradients():
    without = {name for name, operator in ops.OPERATORS.items() if operator.examples and not operator.train}
    assert without == set()


@pytest.mark.parametrize("family", FAMILIES)
def test_operators_equal_their_numpy_forms(family):
    mod, inputs = calls({name: each for name, each in examples(family).items() if _trains(name)})
    rng = np.random.default_rng(1)
    samples = [inputs, {name: value * rng.uniform(0.9, 1.0, value.shape) for name, value in inputs.items()}]
    samples = [{name: np.asarray(value, "float32") for name, value in sample.items()} for sample in samples]
    together = {name: torch.from_numpy(np.stack([sample[name] for sample in samples])) for name in inputs}
    found = Network(mod["main"])(together)
    for n, sample in enumerate(samples):
        for owner, got, want in zip(ir.task_outputs(mod), found, evaluate(mod["main"], sample), strict=True):
            got = got[n].detach().numpy()
            assert got.shape == want.shape, owner.name
            close(got, want, 1e-3 if want.dtype == "float16" else 1e-5, owner.name)


@pytest.mark.parametrize("family", FAMILIES)
def test_operators_learn_in_bfloat16(family):
    mod, inputs = calls({name: each for name, each in examples(family).items() if _trains(name)})
    given = {name: torch.from_numpy(np.asarray(value, "float32")[None]) for name, value in inputs.items()}
    network = Network(mod["main"])
    for owner, got, want in zip(ir.task_outputs(mod), network(given, torch.bfloat16), network(given), strict=True):
        assert got.dtype == want.dtype, owner.name
        # What rounds to whole numbers jumps.
        if want.dtype == torch.float32 and not any(step in owner.task + owner.name for step in JUMPS):
            close(got.detach().numpy(), want.detach().numpy(), 0.03, owner.name)


def close(got: np.ndarray, want: np.ndarray, tolerance: float, what: str = "") -> None:
    """Hold that values are equal, floats within a part of the largest."""
    if want.dtype.kind != "f":
        np.testing.assert_array_equal(got, want, err_msg=what)
        return
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * float(np.abs(want).max(initial=1e-9)), err_msg=what)


@pytest.fixture(scope="module")
def pair() -> tvm.IRModule:
    """Two trained networks in one graph."""
    mod = load([SPEECH / "independent" / f"{name}.onnx" for name in ("keyword", "speaker")])
    return tvm.transform.Sequential(merge_phases())(mod)


def test_a_trained_pair_computes_the_same_and_comes_back_unchanged(pair):
    network = Network(pair["main"])
    rng = np.random.default_rng(0)
    data = {name: rng.normal(size=(3, *shape)).astype("float32") for name, shape in network.inputs.items()}
    found = network({name: torch.from_numpy(values) for name, values in data.items()})
    for n in range(3):
        wanted = evaluate(pair["main"], {name: values[n] for name, values in data.items()})
        for got, want in zip(found, wanted, strict=True):
            close(got[n].detach().numpy(), want, 1e-5)
    tvm.ir.assert_structural_equal(network.trained(), pair["main"], map_free_vars=True)
    assert sum(each.numel() for each in network.parameters()) > 100_000
    assert all("/" in name for name in dict(network.named_parameters()))


def test_a_step_lowers_the_loss_and_is_in_the_graph(pair):
    torch.manual_seed(0)
    network = Network(pair["main"])
    data = {name: torch.randn(8, *shape) for name, shape in network.inputs.items()}
    wanted = [torch.randn_like(each) for each in network(data)]

    def loss() -> torch.Tensor:
        return sum(torch.nn.functional.mse_loss(*each) for each in zip(network(data), wanted, strict=True))

    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3)
    before = loss()
    before.backward()
    assert all(each.grad is not None and each.grad.abs().max() > 0 for each in network.parameters())
    optimizer.step()
    after = loss()
    assert after < before
    trained = network.trained()
    own = evaluate(trained, {name: values[0].numpy() for name, values in data.items()})
    for got, want in zip(own, network(data), strict=True):
        close(got, want[0].detach().numpy(), 1e-5)


def test_a_constant_that_is_read_twice_is_one_parameter():
    emitter, x = Emitter(), tvm.ir.Var("x", relax.TensorType((1, 4), "float32"))
    weight = relax.const(np.eye(4, dtype="float32"))
    first = emitter.emit(relax.op.matmul(x, weight), "a.b")
    second = emitter.emit(relax.op.matmul(first, weight), "c")
    network = Network(emitter.finish([x], [second]))
    assert list(dict(network.named_parameters())) == ["a_b/1"]
    network({"x": torch.ones(2, 1, 4)})[0].sum().backward()
    assert torch.equal(network._parameters["a_b/1"].grad, torch.full((4, 4), 4.0))


def test_quantization_is_a_straight_line_to_gradients():
    emitter, x = Emitter(), tvm.ir.Var("x", relax.TensorType((1, 4), "float32"))
    codes = relax.op.quantize(x, relax.const(np.float32(0.1)), relax.const(np.int8(3)), out_dtype="int8")
    wide = relax.op.dequantize(codes, relax.const(np.float32(0.1)), relax.const(np.int8(3)), out_dtype="float32")
    func = emitter.finish([x], [emitter.emit(wide)])
    data = np.array([[0.34, -1.26, 20.0, -20.0]], "float32")
    tensor = torch.from_numpy(data[None]).requires_grad_()
    (found,) = Network(func)({"x": tensor})
    close(found[0].detach().numpy(), evaluate(func, {"x": data})[0], 1e-6)
    found.sum().backward()
    np.testing.assert_array_equal(tensor.grad.numpy()[0], [[1, 1, 0, 0]])


def test_a_kernel_has_no_form():
    emitter, x = Emitter(), tvm.ir.Var("x", relax.TensorType((1, 4), "float32"))
    call = relax.op.einsum((x,), "ij->ji")
    with pytest.raises(NNFuzeError, match="layer odd: PyTorch has no form of einsum"):
        Network(emitter.finish([x], [emitter.emit(call, "odd")]))
