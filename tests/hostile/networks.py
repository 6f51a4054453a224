"""Files that should hold networks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, TensorProto, helper, numpy_helper

from tests.hostile.harness import Case
from tests.tiny_networks import classifier

HUGE = 10**9
Shape = Sequence[int | str | None]


def network(
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, Shape] | None = None,
    weights: Mapping[str, np.ndarray] | None = None,
    outputs: Sequence[str] = ("y",),
    opset: int = 18,
) -> onnx.ModelProto:
    """Return a network with inputs and outputs of floats; by default it takes an ``x`` of 1 × 4 × 8 × 8."""
    taken = {"x": (1, 4, 8, 8)} if inputs is None else inputs
    graph = helper.make_graph(
        list(nodes),
        "net",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in taken.items()],
        [helper.make_empty_tensor_value_info(name) for name in outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in (weights or {}).items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)


def node(op: str, inputs: str = "x", outputs: str = "y", **attributes: Any) -> onnx.NodeProto:
    """Return a node that is called after its operator."""
    return helper.make_node(op, inputs.split(), outputs.split(), name=op.lower(), **attributes)


def conv(**attributes: Any) -> onnx.ModelProto:
    """Return a convolution with a kernel of 3 × 3."""
    return network([node("Conv", "x w", **attributes)], weights={"w": np.ones((4, 4, 3, 3), "float32")})


def one(op: str, *constants: Any, inputs: Mapping[str, Shape] | None = None, **attributes: Any) -> onnx.ModelProto:
    """Return a node with constants behind its first input."""
    names = [f"c{n}" for n in range(len(constants))]
    weights = dict(zip(names, map(np.asarray, constants), strict=True))
    return network([node(op, " ".join(["x", *names]), **attributes)], inputs, weights)


def dimensions() -> Iterator[tuple[str, onnx.ModelProto]]:
    """Give networks with sizes that can't be."""
    for name, shape in {
        "of 10^12": [10**12, 4],
        "all huge": [2**62, 2**62, 2**62],
        "beyond int64": [2**63 - 1],
        "of 8 GB each": [2**31],
        "zero": [0, 4],
        "all zero": [0, 0],
        "negative": [-3, 4],
        "rank 200": [1] * 200,
    }.items():
        yield f"input {name}", network([node("Relu")], {"x": shape})
    yield "flat of 10^12", network([node("Flatten")], {"x": [10**6, 10**6]})
    yield "product", network([node("MatMul", "x t"), node("Transpose", "x", "t")][::-1], {"x": [10**6, 4]})
    for op, *values in [
        ("Expand", np.array([10**12, 4, 8, 8])),
        ("Expand", np.array([10**6, 4, 10**3 * 8, 8])),
        ("Expand", np.array([-1, 4, 8, 8])),
        ("Tile", np.array([10**5, 10**5, 1, 1])),
        ("Tile", np.array([-1, 1, 1, 1])),
        ("Reshape", np.array([10**12, -1])),
        ("Reshape", np.array([-1, -1])),
        ("Reshape", np.array([-5, 4])),
        ("Reshape", np.array([7, 7])),
        ("Pad", np.array([0, 0, HUGE, HUGE, 0, 0, HUGE, HUGE])),
        ("Pad", np.array([0, 0, -50, 0, 0, 0, 0, 0])),
        ("Pad", np.array([1, 2, 3])),
        ("OneHot", np.array(HUGE), np.array([0.0, 1.0], "float32")),
        ("Unsqueeze", np.array([40])),
        ("Squeeze", np.array([2])),
        ("Resize", np.zeros(0, "float32"), np.array([1, 1, 1e9, 1e9], "float32")),
        ("Resize", np.zeros(0, "float32"), np.array([1, 1, -1, 0], "float32")),
        ("Resize", np.zeros(0, "float32"), np.array([np.nan, np.inf, 1, 1], "float32")),
        ("Split", np.array([3, 3])),
        ("TopK", np.array([HUGE])),
        ("Upsample", np.array([1, 1, 1e6, 1e6], "float32")),
        ("Slice", np.array([0]), np.array([9]), np.array([7])),
        ("Slice", np.array([0]), np.array([9]), np.array([0]), np.array([0])),
        ("CumSum", np.array(9)),
    ]:
        yield f"{op} by {' '.join(str(v.tolist()) for v in values)}"[:60], one(op, *values)
    yield (
        "constant of 40 GB",
        network([node("ConstantOfShape", "s", "c"), node("Add", "x c")], weights={"s": np.array([10**5, 10**5])}),
    )
    yield (
        "range of 10^12",
        network(
            [node("Range", "a b c", "r"), node("Add", "x r")],
            {"x": [1]},
            {"a": np.int64(0), "b": np.int64(10**12), "c": np.int64(1)},
        ),
    )
    yield (
        "range without step",
        network(
            [node("Range", "a b c", "r"), node("Add", "x r")],
            {"x": [1]},
            {"a": np.int64(0), "b": np.int64(5), "c": np.int64(0)},
        ),
    )
    yield "eye of 10^6", network([node("EyeLike", "s", "e"), node("Add", "x e")], {"x": [1], "s": [10**6, 10**6]})
    doubled = [node("Concat", " ".join([f"v{n}"] * 4), f"v{n + 1}", axis=0) for n in range(30)]
    yield "four times as much, 30 times", network(doubled, {"v0": [1, 8]}, outputs=["v30"])


def attributes() -> Iterator[tuple[str, onnx.ModelProto]]:
    """Give layers with attributes that can't be."""
    for name, values in {
        "pads of 10^9": {"pads": [HUGE] * 4},
        "pads beyond int32": {"pads": [2**40] * 4},
        "negative pads": {"pads": [-9] * 4},
        "three pads": {"pads": [1, 1, 1]},
        "dilation of 10^9": {"dilations": [HUGE, HUGE]},
        "dilation 0": {"dilations": [0, 0]},
        "negative dilation": {"dilations": [-1, -1]},
        "one dilation": {"dilations": [1]},
        "stride 0": {"strides": [0, 0]},
        "stride of 2^62": {"strides": [2**62, 2**62]},
        "negative stride": {"strides": [-1, -1]},
        "wrong kernel_shape": {"kernel_shape": [5, 5]},
        "kernel_shape of 10^9": {"kernel_shape": [HUGE, HUGE]},
        "long kernel_shape": {"kernel_shape": [3, 3, 3]},
        "group 0": {"group": 0},
        "group 3": {"group": 3},
        "negative group": {"group": -1},
        "group of 10^9": {"group": HUGE},
        "auto_pad": {"auto_pad": "SOMEHOW"},
        "pads as text": {"pads": "abcd"},
        "strides as floats": {"strides": [1.5, 1.5]},
        "pads as tensor": {"pads": numpy_helper.from_array(np.ones(4))},
        "unknown": {"wobble": 3},
    }.items():
        codes = conv(**values)
        yield f"Conv: {name}", codes
        if name.split()[-1] in ("text", "floats", "tensor") or "group" in name:
            continue
        yield f"MaxPool: {name}", network([node("MaxPool", **{"kernel_shape": [3, 3], **values})])
        if name != "unknown":
            weights = {"w": np.ones((4, 4, 3, 3), "float32")}
            yield f"ConvTranspose: {name}", network([node("ConvTranspose", "x w", **values)], weights=weights)
    yield (
        "ConvTranspose: output_padding",
        network(
            [node("ConvTranspose", "x w", output_padding=[HUGE, HUGE])], weights={"w": np.ones((4, 4, 3, 3), "float32")}
        ),
    )
    yield "AveragePool: no kernel", network([node("AveragePool")])
    for op, values in [
        ("Concat", {"axis": 9}),
        ("Flatten", {"axis": 99}),
        ("Softmax", {"axis": -99}),
        ("Transpose", {"perm": [0, 0, 1, 2]}),
        ("Transpose", {"perm": [0, 1]}),
        ("LRN", {"size": HUGE}),
        ("LRN", {"size": -1}),
        ("DepthToSpace", {"blocksize": 0}),
        ("DepthToSpace", {"blocksize": HUGE}),
        ("SpaceToDepth", {"blocksize": -2}),
        ("Cast", {"to": 99}),
        ("Cast", {"to": TensorProto.STRING}),
        ("ReduceMean", {"keepdims": 2**40}),
        ("Split", {"num_outputs": 0}),
        ("GlobalLpPool", {"p": -1}),
        ("Gelu", {"approximate": "\udcff".encode("utf-8", "surrogateescape")}),
        ("HannWindow", {"output_datatype": 99}),
    ]:
        yield f"{op}: {values}", network([node(op, **values)], opset=20)


def indices() -> Iterator[tuple[str, onnx.ModelProto]]:
    """Give networks that read where nothing is."""
    for name, places in {"beyond": [9], "before": [-9], "huge": [2**62], "lowest": [-(2**63)]}.items():
        where = np.array(places)
        yield f"Gather {name}", one("Gather", where, axis=1)
        yield f"GatherElements {name}", one("GatherElements", where.reshape(1, 1, 1, 1), axis=1)
        yield f"GatherND {name}", one("GatherND", np.array([[0, places[0]]]))
        update = np.ones((1, 1, 1, 1), "float32")
        yield f"ScatterElements {name}", one("ScatterElements", where.reshape(1, 1, 1, 1), update, axis=1)
        yield f"ScatterND {name}", one("ScatterND", np.array([[0, places[0]]]), np.ones((1, 8, 8), "float32"))
        yield (
            f"constant Gather {name}",
            network(
                [node("Gather", "c i", "g"), node("Add", "x g")],
                {"x": [1]},
                {"c": np.ones(4, "float32"), "i": where},
            ),
        )
    yield "Gather of a scalar", network([node("Gather", "x i")], {"x": []}, {"i": np.array([0])})
    yield "Gather along 7", one("Gather", np.array([0]), axis=7)
    yield "ReduceSum along 99", one("ReduceSum", np.array([99]))


def functions() -> Iterator[tuple[str, onnx.ModelProto]]:
    """Give functions that call themselves, or grow."""
    own = helper.make_opsetid("own", 1), helper.make_opsetid("", 18)

    def calling(names: Mapping[str, Sequence[str]]) -> onnx.ModelProto:
        model = network([helper.make_node("f0", ["x"], ["y"], domain="own")])
        model.opset_import.append(own[0])
        for name, called in names.items():
            chain = ["a", *(f"t{n}" for n in range(len(called) - 1)), "b"] if called else ["a", "b"]
            nodes = [
                helper.make_node(kind, [before], [after], domain="own")
                for kind, before, after in zip(called, chain, chain[1:], strict=False)
            ] or [helper.make_node("Relu", ["a"], ["b"])]
            model.functions.append(helper.make_function("own", name, ["a"], ["b"], nodes, own))
        return model

    yield "function that calls itself", calling({"f0": ["f0"]})
    yield "functions that call each other", calling({"f0": ["f1"], "f1": ["f0"]})
    yield "exponential functions", calling({**{f"f{n}": [f"f{n + 1}"] * 10 for n in range(12)}, "f12": []})
    yield "deep functions", calling({**{f"f{n}": [f"f{n + 1}"] for n in range(3000)}, "f3000": []})
    yield "function that is not there", calling({"f1": []})
    twice = calling({"f0": []})
    twice.functions.append(twice.functions[0])
    yield "two functions of one name", twice
    inner = network([node("Relu", "x", "z")]).graph
    for depth in range(25):
        body = helper.make_graph(
            [helper.make_node("If", ["c"], [f"o{depth}"], then_branch=inner, else_branch=inner)]
            if depth < 8
            else [helper.make_node("If", ["c"], [f"o{depth}"], then_branch=inner)],
            "b", [], [helper.make_empty_tensor_value_info(f"o{depth}")],
        )  # fmt: skip
        inner = body
    nested = network([helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner)])
    nested.graph.initializer.append(numpy_helper.from_array(np.array(True), "c"))
    yield "branches nested 25 deep", nested
    yield (
        "many nodes",
        network(
            [helper.make_node("Relu", [f"v{n}"], [f"v{n + 1}"]) for n in range(120_000)],
            {"v0": [1]},
            outputs=["v120000"],
        ),
    )
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["on"]), helper.make_node("Relu", ["s"], ["t"])],
        "body",
        [helper.make_tensor_value_info(*value) for value in (("n", 7, []), ("go", 9, []), ("s", 1, [1, 4, 8, 8]))],
        [helper.make_empty_tensor_value_info(name) for name in ("on", "t")],
    )
    loop = helper.make_node("Loop", ["m", "", "x"], ["y"], body=body)
    yield "loop of 10^12", network([loop], weights={"m": np.int64(10**12)})


def changed(change: Callable[[onnx.ModelProto], object]) -> onnx.ModelProto:
    """Return a good network with something changed."""
    model = classifier()
    change(model)
    return model


def tensors() -> Iterator[tuple[str, onnx.ModelProto]]:
    """Give weights that are not what they say, and graphs that don't hang together."""

    def weight(**fields: Any) -> onnx.ModelProto:
        def change(model: onnx.ModelProto) -> None:
            tensor = model.graph.initializer[0]
            for name, value in fields.items():
                if isinstance(value, list):
                    getattr(tensor, name)[:] = value
                else:
                    setattr(tensor, name, value)

        return changed(change)

    yield "weight of 10^12", weight(dims=[10**12, 10**12])
    yield "weight of 16 GB, no data", weight(dims=[2**32], raw_data=b"")
    yield "negative weight", weight(dims=[-1, 2, 3, 3])
    yield "empty weight", weight(dims=[0, 2, 3, 3], raw_data=b"")
    yield "weight, less data", weight(raw_data=b"123")
    yield "weight of type 0", weight(data_type=0)
    yield "weight of type 99", weight(data_type=99)
    yield "weight of text", weight(data_type=TensorProto.STRING)
    yield "weight as ints", weight(data_type=TensorProto.INT64)
    yield "weight in two places", weight(float_data=[1.0, 2.0])
    yield "weight NaN", weight(raw_data=b"\xff" * 4 * 8 * 2 * 9)
    yield "rank of 1000", weight(dims=[1] * 1000)

    def external(**entries: str) -> onnx.ModelProto:
        def change(model: onnx.ModelProto) -> None:
            tensor = model.graph.initializer[0]
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in entries.items():
                tensor.external_data.add(key=key, value=value)

        return changed(change)

    yield "external, nowhere", external()
    yield "external, above", external(location="../../../../etc/passwd")
    yield "external, absolute", external(location="/etc/passwd")
    yield "external, pipe", external(location="pipe")
    yield "external, folder", external(location=".")
    yield "external, device", external(location="zero")
    yield "external, negative", external(location="text.txt", offset="-5", length="-3")
    yield "external, huge", external(location="text.txt", offset="999999999999", length="99999999999999")
    yield "external, no number", external(location="text.txt", offset="²", length="many")
    yield "external, nul", external(location="a\0b")

    graph_changes: dict[str, Callable[[onnx.GraphProto], object]] = {
        "two nodes of one output": lambda g: g.node.append(helper.make_node("Relu", ["x"], ["r"])),
        "two outputs of one name": lambda g: g.output.append(g.output[0]),
        "two inputs of one name": lambda g: g.input.append(g.input[0]),
        "two weights of one name": lambda g: g.initializer.append(g.initializer[0]),
        "node writes an input": lambda g: g.node.append(helper.make_node("Relu", ["r"], ["x"])),
        "node writes a weight": lambda g: g.node.append(helper.make_node("Relu", ["r"], ["conv_w"])),
        "circle": lambda g: g.node[0].input.__setitem__(0, "r"),
        "backwards": lambda g: _reverse(g),
        "no outputs": lambda g: g.ClearField("output"),
        "no nodes": lambda g: g.ClearField("node"),
        "no inputs": lambda g: g.ClearField("input"),
        "no type": lambda g: g.input[0].ClearField("type"),
        "sequence": lambda g: g.input[0].CopyFrom(helper.make_tensor_sequence_value_info("x", 1, [1])),
        "type 99": lambda g: setattr(g.input[0].type.tensor_type, "elem_type", 99),
        "input of text": lambda g: setattr(g.input[0].type.tensor_type, "elem_type", TensorProto.STRING),
        "input without a name": lambda g: setattr(g.input[0], "name", ""),
        "node without inputs": lambda g: g.node[0].ClearField("input"),
        "node without weights": lambda g: g.node[0].input.pop(),
        "node with 10,000 inputs": lambda g: g.node[1].input.extend(["x"] * 10_000),
        "node without outputs": lambda g: g.node[0].ClearField("output"),
        "node without operator": lambda g: g.node[0].ClearField("op_type"),
        "attribute of a function": lambda g: setattr(g.node[0].attribute[0], "ref_attr_name", "k"),
        "attribute of no type": lambda g: setattr(g.node[0].attribute[0], "type", 0),
        "attribute of type 99": lambda g: setattr(g.node[0].attribute[0], "type", AttributeProto.TYPE_PROTOS),
        "attribute twice": lambda g: g.node[0].attribute.append(g.node[0].attribute[0]),
        "attribute without a name": lambda g: g.node[0].attribute[0].ClearField("name"),
        "long names": lambda g: _rename(g, "n" * 100_000),
        "names with control characters": lambda g: _rename(g, "\x1b[31m\n\r\0\x07\u202e\u2028"),
        "names of markup": lambda g: _rename(g, "[/red][bold]"),
        "names of paths": lambda g: _rename(g, "../../../tmp/\\..\\x"),
        "unknown operator, strange name": lambda g: setattr(g.node[0], "op_type", "\x1b]0;title\x07\n[/]" * 100),
    }  # fmt: skip
    for name, change in graph_changes.items():
        yield name, changed(lambda model, change=change: change(model.graph))
    for version in (0, -1, 1, 30, HUGE, 2**62):
        yield f"opset {version}", changed(lambda m, v=version: setattr(m.opset_import[0], "version", v))
    yield "no opset", changed(lambda m: m.ClearField("opset_import"))
    yield "two opsets", changed(lambda m: m.opset_import.append(helper.make_opsetid("", 9)))
    yield "IR version 10^9", changed(lambda m: setattr(m, "ir_version", HUGE))


def _reverse(graph: onnx.GraphProto) -> None:
    nodes = list(graph.node)[::-1]
    del graph.node[:]
    graph.node.extend(nodes)


def _rename(graph: onnx.GraphProto, name: str) -> None:
    graph.name = graph.input[0].name = graph.node[0].input[0] = graph.node[0].name = name
    graph.node[-1].output[0] = graph.output[0].name = f"{name}2"


def raw() -> Iterator[tuple[str, bytes]]:
    """Give bytes that are no network."""
    good = classifier().SerializeToString()
    yield "empty", b""
    yield "one byte", b"\x08"
    yield "picture", b"\x89PNG\r\n\x1a\n" + bytes(range(256))
    yield "text", b"model\n"
    yield "cut", good[:-100]
    yield "not UTF-8", good.replace(b"conv_w", b"con\xff\xfe\x80")
    yield "output not UTF-8", good.replace(b"scores", b"s\xffores")
    yield "operator not UTF-8", good.replace(b"Flatten", b"Fl\xfftten")
    yield "graph's name not UTF-8", good.replace(b"net", b"n\xfft")
    yield "deep message", b"\x3a\x80\x80\x01" * 5000
    yield "length of 2 GB", b"\x08\x08\x3a\xff\xff\xff\xff\x07" + b"\x0a" * 50
    yield "many fields", b"\x08\x08" * 500_000


def tflite_files() -> Iterator[tuple[str, bytes]]:
    """Give bytes that begin as TensorFlow Lite files do."""
    yield "header only", b"\x1c\0\0\0TFL3"
    yield "zeros", b"\x1c\0\0\0TFL3" + bytes(200)
    yield "offset beyond", b"\xff\xff\xff\x7fTFL3" + bytes(200)
    yield "ones", b"\x08\0\0\0TFL3" + b"\xff" * 500
    yield "circle", b"\x08\0\0\0TFL3" + b"\x04\0\0\0" * 500


def cases(folder: Path, bundle: Path, model: Path) -> Iterator[Case]:
    """Give every file to ``compile``, some to ``analyze`` and ``tune``."""
    import os

    os.mkfifo(folder / "pipe")
    os.symlink("/dev/zero", folder / "zero")
    (folder / "text.txt").write_text("text")
    fine = {
        "input zero", "input all zero", "weight NaN", "empty weight", "weight in two places", "two outputs of one name",
        "Conv: unknown", "MaxPool: unknown", "opset 1", "no opset", "two opsets", "IR version 10^9", "many nodes",
        "names of paths", "names of markup", "graph's name not UTF-8", "loop of 10^12", "attribute twice",
        "MaxPool: stride of 2^62", "Conv: stride of 2^62", "ConvTranspose: stride of 2^62", "MaxPool: negative pads",
        "branches nested 25 deep", "deep functions", "input negative", "MaxPool: wrong kernel_shape",
        "node without weights", "attribute without a name", "LRN: {'size': 1000000000}",
    }  # fmt: skip
    groups = (dimensions(), attributes(), indices(), functions(), tensors())
    files = [(name, found.SerializeToString()) for group in groups for name, found in group]
    for n, (name, data) in enumerate([*files, *raw()]):
        path = folder / f"onnx{n}.onnx"
        path.write_bytes(data)
        verb = "analyze" if n % 5 == 1 else "compile"
        options = ["-o", "out", "--no-compare"] if verb == "compile" else []
        yield Case(f"onnx: {name}", [verb, path, *options], (0, 2) if name in fine else (2,))
    for name, data in tflite_files():
        path = folder / f"{name}.tflite"
        path.write_bytes(data)
        yield Case(f"tflite: {name}", ["compile", path, "-o", "out"])
    for name, data in {"no zip": b"no zip", "empty": b"", "pickle": b"cos\nsystem\n(S'true'\ntR."}.items():
        path = folder / f"{name}.pt2"
        path.write_bytes(data)
        yield Case(f"pt2: {name}", ["compile", path, "-o", "out"])
