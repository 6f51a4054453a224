"""ONNX files: read them, name their nodes, bind their input shapes, and say in one line what is wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import checker, external_data_helper
from onnx.inliner import inline_selected_functions

from nnfuze_tvm.errors import InputError, ModelError, first_line
from nnfuze_tvm.frontend import clipped_lstm, exported_program, onnx_door
from nnfuze_tvm.frontend.onnx_tensors import bodies, nodes, plain_tensors, subgraphs
from nnfuze_tvm.reading.files import read_file

Shape = tuple[int, ...]

_LONGEST_TASK = 200
# What the fifth to eighth byte of a TensorFlow Lite file are.
_TFLITE = b"TFL3"

TYPES = frozenset("float16 float32 float64 int8 int16 int32 int64 uint8 uint16 uint32 uint64 bool".split())
"""NumPy's names of the types that tensors may have."""


@dataclass
class Source:
    """One network to import.

    Attributes
    ----------
    task
        Name of its task.
    label
        What error messages call it: the file's path, or the task's name where there is no file.
    model
        Its graph, private to the import.
    """

    task: str
    label: str
    model: onnx.ModelProto

    @property
    def inputs(self) -> list[onnx.ValueInfoProto]:
        """The graph inputs that are no weights, in order."""
        weights = {tensor.name for tensor in self.model.graph.initializer}
        weights |= {tensor.values.name for tensor in self.model.graph.sparse_initializer}
        return [value for value in self.model.graph.input if value.name not in weights]

    @property
    def opset(self) -> int:
        """Version of the default operator set."""
        versions = [entry.version for entry in self.model.opset_import if entry.domain in ("", "ai.onnx")]
        return versions[0] if versions else 1


def read(path: str | Path) -> onnx.ModelProto:
    """Read one ONNX file with its external data, or a TensorFlow Lite file or a PyTorch program as if it were one.

    Raises
    ------
    ModelError
        If there is no such file, it is no (whole) model, or its external data is missing.
    """
    path = Path(path)
    try:
        data = read_file(path)
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file") from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from None
    if path.suffix == ".pt2":
        return exported_program.to_onnx(path)
    if data[4:8] == _TFLITE:
        from nnfuze_tvm.frontend.tflite import to_onnx  # with a module per operator of the schema

        return to_onnx(data, str(path))
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
        broken = not model.graph.node and not model.graph.output
    except DecodeError:
        broken = True
    if broken or not data:
        # Field 1 (ir_version, a varint) comes first in what every exporter writes.
        damaged = data[:1] == b"\x08"
        raise ModelError(
            f"{path}: truncated or damaged ONNX file: export or copy it again"
            if damaged
            else f"{path}: not an ONNX file, nor TensorFlow Lite's (.tflite) or PyTorch's (.pt2)"
        )
    try:
        onnx_door.check_external(model, path.parent, str(path))
        external_data_helper.load_external_data_for_model(model, str(path.parent))
    except (OSError, ValueError, checker.ValidationError) as error:
        raise ModelError(f"{path}: external data can't be read: {first_line(error)}") from None
    return model


def sources(models: Sequence[str | Path | onnx.ModelProto], tasks: Sequence[str] | None) -> list[Source]:
    """Read all models and settle the task names.

    Raises
    ------
    InputError
        If task names are missing, equal, empty or contain a colon.
    ModelError
        See :func:`read`.
    """
    if isinstance(models, str | Path | onnx.ModelProto):
        models = [models]
    if not models:
        raise InputError("no models given: name at least one ONNX file")
    if tasks is not None and len(tasks) != len(models):
        raise InputError(f"{len(models)} models but {len(tasks)} task names: give one name per model")
    named = [_named(model, index) for index, model in enumerate(models)]
    names = list(tasks) if tasks is not None else [name for name, _ in named]
    for name, (_, where) in zip(names, named, strict=True):
        if isinstance(where, Path) and where.is_dir():
            raise InputError(f"{where}: a directory; name the model file in it")
        if not name or ":" in name or not name.isprintable() or len(name) > _LONGEST_TASK:
            label = where if isinstance(where, str | Path) else "model"
            why = "empty, too long, or has a colon or what can't be printed"
            raise InputError(f"{label}: {name!r:.60} is no task name ({why}): use name=path")
        if names.count(name) > 1:
            raise InputError(f"two models have the task name {name!r}: name them, like first={name}.onnx")
    result = []
    for name, (_, where) in zip(names, named, strict=True):
        if isinstance(where, onnx.ModelProto):
            model, label = onnx.ModelProto(), name
            model.CopyFrom(where)
        else:
            model, label = read(where), str(where)
        onnx_door.check_file(model, label)
        if model.functions:
            own = [(clipped_lstm.DOMAIN, clipped_lstm.NAME)]
            try:
                model = inline_selected_functions(model, own, exclude=True)
            except checker.ValidationError as error:
                raise ModelError(f"{label}: {first_line(error)}") from None
        result.append(Source(name, label, model))
    return result


def checked_sources(
    models: Sequence[str | Path | onnx.ModelProto], tasks: Sequence[str] | None, shapes: Mapping[str, Sequence[int]]
) -> tuple[list[Source], dict[str, dict[str, Shape]]]:
    """Read all models; return them with the static shape of every input by task and name.

    Everything is checked that can be without TVM, whose import takes seconds.

    Raises
    ------
    InputError, ModelError
        See :func:`sources`, :func:`check_shape_names`, :func:`check_edges`, :func:`input_shapes`.
    """
    found = sources(models, tasks)
    check_shape_names(found, shapes)
    for source in found:
        name_nodes(source)
        onnx_door.check_graph(source.model.graph, source.label)
        plain_tensors(source.model.graph, source.label)
        check_edges(source)
        drop_unused_outputs(source)
    return found, {source.task: input_shapes(source, shapes) for source in found}


def _named(model: str | Path | onnx.ModelProto, index: int) -> tuple[str, Path | onnx.ModelProto]:
    if isinstance(model, onnx.ModelProto):
        return model.graph.name.replace(":", "_") or f"task{index}", model
    name, equals, path = str(model).partition("=")
    if equals and not Path(model).exists():
        return name, Path(path)
    return Path(model).stem, Path(model)


def name_nodes(source: Source) -> None:
    """Give every node a name of its own: ``<op_type>_<index>`` where it has none."""
    taken: set[str] = set()
    for index, node in enumerate(nodes(source.model.graph)):
        name = node.name or f"{node.op_type}_{index}"
        node.name = name if name not in taken else f"{name}_{index}"
        taken.add(node.name)


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """Return a node's attributes by name: numbers, bytes, tuples of them, and protos.

    Raises
    ------
    ValueError
        If one is that of a function, which nobody has given.
    """
    found = {}
    for attribute in node.attribute:
        if attribute.ref_attr_name:
            raise ValueError(f"its attribute {attribute.name!r} has no value")
        value = onnx.helper.get_attribute_value(attribute)
        several = attribute.type in _SEVERAL
        found[attribute.name] = tuple(value) if several else value
    return found


_SEVERAL = frozenset(
    getattr(onnx.AttributeProto, kind) for kind in ("FLOATS", "INTS", "STRINGS", "TENSORS", "GRAPHS", "TYPE_PROTOS")
)


def drop_unused_outputs(source: Source) -> None:
    """Take the names from outputs that nothing reads: they need not be computed."""
    graph = source.model.graph
    everything = list(nodes(graph))
    read = {name for node in everything for name in node.input}
    read |= {value.name for body in bodies(graph) for value in body.output}
    for node in everything:
        for index, name in enumerate(node.output):
            if name not in read:
                node.output[index] = ""


def check_edges(source: Source) -> None:
    """Check that nodes read only what exists before them.

    Raises
    ------
    ModelError
        If a node or an output reads a tensor that nothing defines.
    """
    if not source.model.graph.output:
        raise ModelError(f"{source.label}: the graph has no output")
    _check_edges(source, source.model.graph, set())


def _check_edges(source: Source, graph: onnx.GraphProto, outside: set[str]) -> None:
    known = outside | {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer} | {""}
    for node in graph.node:
        for name in node.input:
            if name not in known:
                raise ModelError(f"{source.label}: node {node.name!r} reads {name!r}, which nothing defines")
        for inner in subgraphs(node):
            _check_edges(source, inner, known)
        known.update(node.output)
    for value in graph.output:
        if value.name not in known:
            raise ModelError(f"{source.label}: output {value.name!r} is computed by no node")


def input_shapes(source: Source, shapes: Mapping[str, Sequence[int]]) -> dict[str, Shape]:
    """Return the static shape of every graph input.

    ``shapes`` maps input names, or ``task:input``, to shapes. What neither it nor the file fixes is taken as 1 where it
    is a batch: the first dimension, or another one of the same name.

    Raises
    ------
    InputError
        If a given shape has another rank or another static dimension than the file, or another dimension is open.
    ModelError
        If an input is no tensor or has unknown rank.
    """
    result = {}
    batches = {value.type.tensor_type.shape.dim[0].dim_param for value in source.inputs if _rank(value)} - {""}
    for value in source.inputs:
        if not value.type.HasField("tensor_type"):
            raise ModelError(f"{source.label}: input {value.name!r} is no tensor")
        type_name(value.type.tensor_type.elem_type, f"{source.label}: input {value.name!r}: ")
        given = shapes.get(f"{source.task}:{value.name}", shapes.get(value.name))
        if not value.type.tensor_type.HasField("shape"):
            if given is None:
                raise ModelError(f"{source.label}: input {value.name!r} has no shape: give it one in shapes")
            result[value.name] = tuple(int(dim) for dim in given)
            continue
        # A dimension of -1 is an open one, written so by hand; a zero that is written down is a size.
        dims = value.type.tensor_type.shape.dim
        fixed = [dim.dim_value if dim.HasField("dim_value") and dim.dim_value >= 0 else None for dim in dims]
        if given is None:
            for axis, dim in enumerate(dims):
                if axis and fixed[axis] is None and dim.dim_param not in batches:
                    called = f" ({dim.dim_param})" if dim.dim_param else ""
                    example = ",".join("N" if n == axis else str(1 if d is None else d) for n, d in enumerate(fixed))
                    raise InputError(
                        f"{source.label}: input {value.name!r}: dimension {axis}{called} is open; say how long it is, "
                        f"as in --shape {value.name}={example}"
                    )
            result[value.name] = tuple(1 if dim is None else dim for dim in fixed)
            if reason := onnx_door.impossible_size(result[value.name]):
                raise ModelError(f"{source.label}: input {value.name!r} {reason}")
            continue
        given = tuple(int(dim) for dim in given)
        if len(given) != len(fixed):
            raise InputError(
                f"{source.label}: input {value.name!r} is {_text(fixed)}, of {len(fixed)} dimensions; {_text(given)} "
                f"has {len(given)}"
            )
        # Some exporters write a zero for any size.
        if any(
            new < 0 or old not in (None, 0, new) or (new == 0 != old) for old, new in zip(fixed, given, strict=True)
        ):
            raise InputError(f"{source.label}: input {value.name!r} is {_text(fixed)}, which can't be {_text(given)}")
        if reason := onnx_door.impossible_size(given):
            raise InputError(f"{source.label}: input {value.name!r} {reason}")
        result[value.name] = given
    return result


def _text(shape: Sequence[int | None]) -> str:
    return "x".join("?" if dim is None else str(dim) for dim in shape) or "a number"


def _rank(value: onnx.ValueInfoProto) -> int:
    """Return the number of an input's dimensions, 0 where it is not known."""
    return len(value.type.tensor_type.shape.dim) if value.type.HasField("tensor_type") else 0


def type_name(number: int, where: str = "") -> str:
    """Return NumPy's name of a type that files call by a number.

    Raises
    ------
    ModelError
        If there are no kernels for it; ``where`` begins the message.
    """
    try:
        name = str(onnx.helper.tensor_dtype_to_np_dtype(number))
    except KeyError:
        name = ""
    if name not in TYPES:
        known = number in onnx.TensorProto.DataType.values()
        called = onnx.TensorProto.DataType.Name(number).lower() if known else str(number)
        raise ModelError(f"{where}type {called} is not supported")
    return name


def check_shape_names(all_sources: Sequence[Source], shapes: Mapping[str, Sequence[int]]) -> None:
    """Check that every name in ``shapes`` is an input of some network.

    Raises
    ------
    InputError
        If one is not.
    """
    known = {value.name for source in all_sources for value in source.inputs}
    qualified = {f"{source.task}:{value.name}" for source in all_sources for value in source.inputs}
    for name in shapes:
        if name not in known | qualified:
            raise InputError(f"shapes: no network has an input {name!r} (there are: {', '.join(sorted(known))})")
