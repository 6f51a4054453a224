"""What every ONNX file must be before anything walks through it: names, sizes, versions, functions that end."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import onnx
from onnx import defs

from nnfuze_tvm.errors import ModelError
from nnfuze_tvm.frontend.onnx_tensors import bodies, nodes, tensors
from nnfuze_tvm.reading import files, memory

MOST_NODES = 100_000
"""Nodes of a file, those of functions as often as they are called."""

_LONGEST_NAME = 1000
# That of ONNX's own inliner.
_DEEPEST_CALLS = 100
# What terminals obey, what turns lines around, and halves of characters.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
# Of TVM's arrays, and of the integers that its loops count with.
_MOST_AXES, _MOST_VALUES = 26, 2**31 - 1

_Key = tuple[str, str]


def check_file(model: onnx.ModelProto, label: str) -> None:
    """Check a file as it was read.

    Raises
    ------
    ModelError
        If its names are no names, its operator set is unknown, or it has too many nodes or functions without an end.
    """
    _check_opsets(model, label)
    try:
        for name in _names(model):
            # Bytes are what protobuf gives for what isn't UTF-8.
            if isinstance(name, bytes) or len(name) > _LONGEST_NAME or _CONTROL.search(name):
                why = "not UTF-8, too long, or with control characters"
                raise ModelError(f"{label}: {name!r:.80} is no name: {why}")
    except UnicodeDecodeError:
        raise ModelError(f"{label}: a name in it is not UTF-8: export it again") from None
    _check_size(model, label)


def check_graph(graph: onnx.GraphProto, label: str) -> None:
    """Check that a graph and those in it say one thing of every name.

    Raises
    ------
    ModelError
        If two inputs, weights or nodes have one name.
    """
    for body in bodies(graph):
        made = Counter(name for node in body.node for name in node.output if name)
        weights = Counter(tensor.name for tensor in body.initializer)
        weights.update(tensor.values.name for tensor in body.sparse_initializer)
        inputs = Counter(value.name for value in body.input)
        # An input may have a weight as its default, and outputs of graphs may be one value.
        for name, count in [*made.items(), *weights.items(), *inputs.items()]:
            if count > 1 or (name in made and (name in weights or name in inputs)):
                raise ModelError(f"{label}: {name!r} is defined twice")
        if "" in inputs or "" in weights:
            raise ModelError(f"{label}: an input or a weight has no name")


def check_external(model: onnx.ModelProto, folder: Path, label: str) -> None:
    """Check that weights that are kept elsewhere are in files.

    Raises
    ------
    ModelError
        If they aren't: pipes and devices may never end.
    """
    for tensor in tensors(model.graph):
        for place in (entry.value for entry in tensor.external_data if entry.key == "location"):
            try:
                files.check_kind(folder / place)
            except FileNotFoundError:
                raise ModelError(f"{label}: its weights are in {place!r:.80}: copy that beside it, too") from None
            except OSError as error:
                raise ModelError(f"{label}: external data can't be read: {place!r:.80} ({error.strerror})") from None


def impossible_size(shape: Sequence[int], item_bytes: int = 1) -> str:
    """Return why nothing here can have a shape, as what follows its name; an empty string if something can."""
    if len(shape) > _MOST_AXES:
        return f"has {len(shape)} dimensions; {_MOST_AXES} at most are supported"
    count = math.prod(shape)
    if count > _MOST_VALUES:
        return f"would have {count} values; {_MOST_VALUES} at most are supported"
    reason = memory.too_large(count * item_bytes)
    return f"would not fit: it {reason}" if reason else ""


def _names(model: onnx.ModelProto) -> Iterator[str]:
    yield model.graph.name
    for function in model.functions:
        yield from (function.domain, function.name, *function.input, *function.output, *function.attribute)
        for node in function.node:
            yield from _names_of(node)
    for node in nodes(model.graph):
        yield from _names_of(node)
    for body in bodies(model.graph):
        yield from (value.name for value in (*body.input, *body.output))
        yield from (tensor.name for tensor in body.initializer)


def _names_of(node: onnx.NodeProto) -> Iterator[str]:
    yield from (node.name, node.op_type, node.domain, *node.input, *node.output)
    for attribute in node.attribute:
        yield attribute.name
        yield attribute.ref_attr_name


def _check_opsets(model: onnx.ModelProto, label: str) -> None:
    newest = defs.onnx_opset_version()
    versions = [entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")]
    for version in versions:
        if not 1 <= version <= newest:
            raise ModelError(f"{label}: operator set {version}; 1 to {newest} are known here")
    if len(set(versions)) > 1:
        raise ModelError(f"{label}: operator sets {' and '.join(map(str, versions))} at the same time")


def _check_size(model: onnx.ModelProto, label: str) -> None:
    """Count nodes, with those of functions where they are called."""
    calls = {(f.domain, f.name): [_key(node) for node in nodes(onnx.GraphProto(node=f.node))] for f in model.functions}
    if len(calls) < len(model.functions):
        raise ModelError(f"{label}: two functions have one name")
    counts: dict[_Key, int] = {}

    def count(key: _Key, path: tuple[_Key, ...]) -> int:
        if key in path:
            raise ModelError(f"{label}: function {key[1]!r} calls itself")
        if len(path) > _DEEPEST_CALLS:
            raise ModelError(f"{label}: functions call each other more than {_DEEPEST_CALLS} deep")
        if key not in calls:
            return 1
        if key not in counts:
            counts[key] = sum(count(call, (*path, key)) for call in calls[key])
        return counts[key]

    if sum(count(_key(node), ()) for node in nodes(model.graph)) > MOST_NODES:
        raise ModelError(f"{label}: has more than {MOST_NODES} nodes, those of functions included")


def _key(node: onnx.NodeProto) -> _Key:
    return node.domain, node.op_type
