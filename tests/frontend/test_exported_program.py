"""PyTorch's exported programs: what PyTorch computes; without PyTorch one line that says what to install."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tvm
from onnx import helper, numpy_helper

import nnfuze_tvm
from benchmarks import networks
from nnfuze_tvm import cli
from nnfuze_tvm.graph import evaluate
from nnfuze_tvm.graph.dataflow import bindings, op_name
from nnfuze_tvm.passes import pipeline
from nnfuze_tvm.passes.lower.integer.realize_integer import RealizeInteger


def test_without_pytorch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    path = tmp_path / "a.pt2"
    zipfile.ZipFile(path, "w").close()
    assert cli.run(["compile", str(path), "-o", str(tmp_path / "out")]) == 2
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .endswith(f"{path}: reading it needs PyTorch: pip install 'nnfuze-tvm[torch]'")
    )


@pytest.mark.parametrize(
    "name", ["a/data/constants/custom_obj_0", "a/data/constants/opaque_obj_1", "a/data/aotinductor/model/x.cpp", "x.so"]
)
def test_code_in_an_archive(name: str, tmp_path: Path) -> None:
    """PyTorch would run it while it reads the file."""
    with zipfile.ZipFile(tmp_path / "a.pt2", "w") as archive:
        archive.writestr(name, b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(nnfuze_tvm.errors.ModelError, match="which is code or may be"):
        nnfuze_tvm.load([tmp_path / "a.pt2"])


def test_damaged(tmp_path: Path) -> None:
    path = tmp_path / "a.pt2"
    path.write_bytes(b"PK\3\4 and nothing else")
    with pytest.raises(nnfuze_tvm.errors.ModelError, match=r"a.pt2: not a program that torch.export.save wrote"):
        nnfuze_tvm.load([path])


@pytest.mark.parametrize("recurrent", [False, True])
def test_values(recurrent: bool, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("onnxscript")

    class Image(torch.nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.first = torch.nn.Conv2d(3, 8, 3, stride=2, padding=1)
            self.norm = torch.nn.BatchNorm2d(8)
            self.last = torch.nn.Linear(8, 5)

        def forward(self, image):
            return self.last(torch.nn.functional.silu(self.norm(self.first(image))).mean((2, 3)))

    class Sequence(torch.nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.cell = torch.nn.GRU(10, 16, batch_first=True)

        def forward(self, sound):
            return self.cell(sound)

    torch.manual_seed(0)
    module, x = (Sequence(), torch.randn(1, 7, 10)) if recurrent else (Image(), torch.randn(1, 3, 32, 32))
    path = tmp_path / "a.pt2"
    torch.export.save(torch.export.export(module.eval(), (x,)), path)
    mod = tvm.transform.Sequential(pipeline.merge_phases())(nnfuze_tvm.load([path]))
    (name,) = (param.name for param in mod["main"].params)
    assert name == ("sound" if recurrent else "image")
    with torch.no_grad():
        want = module(x)
    for got, each in zip(evaluate.executor(mod)({name: x.numpy()}), want if recurrent else [want], strict=True):
        np.testing.assert_allclose(got, each.numpy(), rtol=0, atol=1e-5)


def in_torch(model: onnx.ModelProto) -> Any:
    """Return a network of convolutions, sums and one dense layer as a module of PyTorch."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("onnxscript")
    functional = torch.nn.functional

    class Network(torch.nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            for n, tensor in enumerate(model.graph.initializer):
                self.register_buffer(f"weight{n}", torch.tensor(numpy_helper.to_array(tensor)))

        def forward(self, image):
            values = {model.graph.input[0].name: image}
            values |= {tensor.name: getattr(self, f"weight{n}") for n, tensor in enumerate(model.graph.initializer)}
            for node in model.graph.node:
                given = [values[name] for name in node.input]
                facts = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
                values[node.output[0]] = operators[node.op_type](facts, *given)
            return values[model.graph.output[0].name]

    def convolution(facts, data, weights, bias):
        top, left, bottom, right = facts["pads"]
        padded = functional.pad(data, (left, right, top, bottom))
        return functional.conv2d(padded, weights, bias, tuple(facts["strides"]), groups=facts["group"])

    operators = {
        "Conv": convolution,
        "Relu": lambda facts, x: torch.relu(x),
        "Add": lambda facts, x, y: x + y,
        "GlobalAveragePool": lambda facts, x: x.mean((2, 3), keepdim=True),
        "Flatten": lambda facts, x: x.flatten(1),
        "Gemm": lambda facts, x, w, b: functional.linear(x, w if facts["transB"] else w.T, b),
    }
    return Network().eval()


@pytest.mark.parametrize("name", ["ds_cnn", "resnet8"])
def test_the_same_network_as_onnx(name: str, tmp_path: Path) -> None:
    """Whole networks, written as both kinds of files, give the same answers; so do those of TensorFlow Lite's."""
    model = networks.build(name)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    module = in_torch(model)
    import torch

    (sample,) = networks.inputs(model, 1).values()
    torch.export.save(torch.export.export(module, (torch.tensor(sample),)), tmp_path / "network.pt2")
    onnx.save(model, tmp_path / "network.onnx")
    got, want = (
        evaluate.executor(tvm.transform.Sequential(pipeline.merge_phases())(nnfuze_tvm.load([tmp_path / file])))(
            {given: sample}
        )[0]
        for file, given in (("network.pt2", "image"), ("network.onnx", model.graph.input[0].name))
    )
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.ptp(want))


def test_quantized(tmp_path: Path) -> None:
    """Layers become integer ones; codes that end before their type does are bounded."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("onnxscript")
    pytest.importorskip("torch.ao.quantization.fx._decomposed")
    own = torch.ops.quantized_decomposed

    def through(x, scale, zero, low, high, dtype):
        codes = own.quantize_per_tensor(x, scale, zero, low, high, dtype)
        return own.dequantize_per_tensor(codes, scale, zero, low, high, dtype)

    class Layers(torch.nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("codes", torch.randint(-127, 128, (8, 3, 3, 3), dtype=torch.int8))
            self.register_buffer("scales", torch.rand(8, dtype=torch.float64) / 500 + 0.001)

        def forward(self, image):
            zeros = torch.zeros(8, dtype=torch.int64)
            weights = own.dequantize_per_channel(self.codes, self.scales, zeros, 0, -127, 127, torch.int8)
            x = through(image, 0.02, 64, 0, 127, torch.uint8)
            return through(torch.relu(torch.conv2d(x, weights)), 0.02, 0, -127, 127, torch.int8)

    torch.manual_seed(0)
    module, x = Layers().eval(), 2 * torch.randn(1, 3, 12, 12)
    torch.export.save(torch.export.export(module, (x,)), tmp_path / "a.pt2")
    mod = tvm.transform.Sequential(pipeline.merge_phases())(nnfuze_tvm.load([tmp_path / "a.pt2"]))
    (got,) = evaluate.executor(mod)({"image": x.numpy()})
    want = module(x).numpy()
    assert want.max() > 2.5, "some codes are at their bound"
    assert np.abs(got - want).max() <= 0.021 and (got != want).mean() < 0.01
    integer = RealizeInteger()(mod)
    assert "int32" in {str(b.var.ty.dtype) for b in bindings(integer["main"]) if op_name(b.value) == "nn.conv2d"}
