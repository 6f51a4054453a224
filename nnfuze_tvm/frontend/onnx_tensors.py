"""The graphs of an ONNX file, and its tensors in the forms that the importer knows."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import numpy_helper

from nnfuze_tvm.errors import ModelError, first_line


def nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Give the nodes of a graph and of its subgraphs, in order."""
    for node in graph.node:
        yield node
        for inner in subgraphs(node):
            yield from nodes(inner)


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """Give the bodies and branches of a node."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def bodies(graph: onnx.GraphProto) -> list[onnx.GraphProto]:
    """Return a graph and all that are in it."""
    return [graph, *(body for node in nodes(graph) for body in subgraphs(node))]


def tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Give the weights of a graph and of its subgraphs, and the tensors that their nodes have as attributes."""
    for body in bodies(graph):
        yield from body.initializer
    for node in nodes(graph):
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors


def values_of(tensor: onnx.TensorProto) -> np.ndarray:
    """Return the values of a tensor.

    Raises
    ------
    ValueError
        If they don't fit its type and shape.
    """
    if min(tensor.dims, default=0) < 0:
        raise ValueError(f"shape {list(tensor.dims)}")
    try:
        return numpy_helper.to_array(tensor)
    except Exception as error:  # ONNX's, NumPy's and Python's own
        raise ValueError(f"its values don't fit its type and shape ({first_line(error)})") from None


_NARROW = {
    onnx.TensorProto.INT4: "int8",
    onnx.TensorProto.UINT4: "uint8",
}


def plain_tensors(graph: onnx.GraphProto, label: str) -> None:
    """Make ordinary tensors of sparse ones, and codes of 8 bits of those with fewer where they are only dequantized.

    Parameters
    ----------
    graph : onnx.GraphProto
        The graph of a file; it is changed.
    label : str
        What error messages call the file.

    Raises
    ------
    ModelError
        If a sparse tensor does not fit its shape.
    """
    for body in bodies(graph):
        body.initializer.extend(_dense(tensor, label) for tensor in body.sparse_initializer)
        del body.sparse_initializer[:]
    for node in nodes(graph):
        for attribute in node.attribute:
            if attribute.HasField("sparse_tensor"):
                tensor = _dense(attribute.sparse_tensor, label)
                attribute.CopyFrom(onnx.helper.make_attribute(attribute.name.removeprefix("sparse_"), tensor))
    everything = bodies(graph)
    read = {name for node in nodes(graph) if node.op_type != "DequantizeLinear" for name in node.input}
    read |= {value.name for body in everything for value in (*body.input, *body.output)}
    for body in everything:
        for tensor in body.initializer:
            if tensor.data_type in _NARROW and tensor.name not in read:
                wide = values_of(tensor).astype(_NARROW[tensor.data_type])
                tensor.CopyFrom(numpy_helper.from_array(wide, tensor.name))


def _dense(tensor: onnx.SparseTensorProto, label: str) -> onnx.TensorProto:
    try:
        values, places = numpy_helper.to_array(tensor.values), numpy_helper.to_array(tensor.indices)
        result = np.zeros(tuple(tensor.dims), values.dtype)
        if places.ndim == 1:
            result.reshape(-1)[places] = values
        else:
            result[tuple(places.T)] = values
    except (ValueError, IndexError, TypeError) as error:
        raise ModelError(f"{label}: sparse tensor {tensor.values.name!r}: {first_line(error)}") from None
    return numpy_helper.from_array(result, tensor.values.name)
