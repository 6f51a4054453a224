"""Where a network can be cut in two, and one network's rest be put behind another's beginning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import tvm
import tvm_ffi
from tvm import relax
from tvm.relax import op

from nnfuze_tvm.errors import InputError
from nnfuze_tvm.graph import dataflow, ir, ops
from nnfuze_tvm.graph.constants import constant
from nnfuze_tvm.graph.ops.operator import always


@dataclass(frozen=True)
class Cut:
    """A tensor that everything behind it depends on, and on nothing else in front of it.

    Attributes
    ----------
    place : int
        Of the binding, in its function.
    name : str
        The last layer in front of it.
    shape : tuple of int
        Of the tensor.
    macs : int
        Multiply-accumulates in front of it.
    nonnegative : bool
        It has no negative numbers: an activation bounds it.
    """

    place: int
    name: str
    shape: tuple[int, ...]
    macs: int
    nonnegative: bool


def cuts(func: relax.Function) -> list[Cut]:
    """Return the cuts of a straight-line function, one behind each layer at most, from the input on.

    An activation belongs to the layer in front of it, a pooling to what follows. There is a layer behind each.
    """
    bindings = dataflow.bindings(func)
    last = {leaf: place for place, binding in enumerate(bindings) for leaf in dataflow.operands(binding.value)}
    outputs = set(dataflow.output_fields(func))
    # Up to where something in front of a place is read.
    reach = max((last.get(param, -1) for param in func.params), default=-1)
    found: list[Cut] = []
    macs, name = 0, ""
    for place, binding in enumerate(bindings):
        operator = ops.of(binding.value)
        macs += ops.macs(binding.value)
        if ops.is_layer(binding.value):
            name = binding.var.name
        alone = reach <= place and binding.var not in outputs and name
        reach = max(reach, last.get(binding.var, -1))
        if not alone or not _is_feature(binding.var):
            continue
        cut = Cut(
            place, name, ir.static_shape(binding.var), macs, operator is not None and operator.nonnegative is always
        )
        if not found or found[-1].macs < macs:
            found.append(cut)
        elif found[-1].shape == cut.shape:
            found[-1] = cut
    return [cut for cut in found if cut.macs < macs]


def _is_feature(var: tvm.ir.Var) -> bool:
    return isinstance(var.ty, relax.TensorType) and str(var.ty.dtype) == "float32" and len(ir.static_shape(var)) >= 2


@dataclass(frozen=True)
class Stitch:
    """What makes one network's features out of another's: a layer over channels, the second axis.

    Attributes
    ----------
    weight : np.ndarray
        ``[O, I]`` float32.
    bias : np.ndarray
        ``[O]`` float32.
    """

    weight: np.ndarray
    bias: np.ndarray


def beginning(func: relax.Function, cut: Cut) -> relax.Function:
    """Return the function up to a cut, whose tensor is its only output."""
    return dataflow.returning(func, [dataflow.bindings(func)[cut.place].var])


def graft(
    donor: relax.Function, donor_cut: Cut, func: relax.Function, cut: Cut, stitch: Stitch | None, task: str
) -> relax.Function:
    """Return ``func`` with what is in front of its cut replaced by another network's beginning and a stitch.

    Parameters
    ----------
    donor, donor_cut
        The other network and where it is cut. Its inputs have the names and types of the function's.
    func, cut
        The network whose rest stays.
    stitch : Stitch, optional
        None where the features are to be taken as they are.
    task : str
        What the stitch's layer is named after.
    """
    emitter = dataflow.Emitter()
    own = {param.name: param for param in func.params}
    for param in func.params:
        emitter.unique(param.name)
    new: dict[dataflow.Value, dataflow.Value] = {param: _input(own, param) for param in donor.params}
    begun = dataflow.bindings(donor)[: donor_cut.place + 1]
    emitter.copy(begun, new)
    value = _stitched(emitter, new[begun[-1].var], cut, stitch, f"{task}/stitch") if stitch else new[begun[-1].var]
    rest = dataflow.bindings(func)
    new = {rest[cut.place].var: value}
    emitter.copy(rest[cut.place + 1 :], new)
    outputs = [dataflow.substitute(field, new) for field in dataflow.output_fields(func)]
    return emitter.finish(func.params, outputs, func.attrs)


def _input(own: Mapping[str, tvm.ir.Var], param: tvm.ir.Var) -> tvm.ir.Var:
    found = own.get(param.name)
    if found is None or not tvm_ffi.structural_equal(found.ty, param.ty):
        raise InputError(f"input {param.name}: networks that share a trunk must have the same inputs")
    return found


def _stitched(emitter: dataflow.Emitter, value: dataflow.Value, cut: Cut, stitch: Stitch, name: str) -> dataflow.Value:
    """Emit the stitch, with the activation of what it replaces; images are brought to its size before."""
    weight, bias = stitch.weight, stitch.bias
    rank = len(cut.shape)
    if rank == 2:
        product = emitter.emit(op.matmul(value, constant(weight.T)), name)
        product = emitter.emit(op.add(product, constant(bias)))
    else:
        value = emitter.emit(_resized(value, cut.shape))
        kernel = weight.reshape(*weight.shape, *[1] * (rank - 2))
        product = emitter.emit(getattr(op.nn, f"conv{rank - 2}d")(value, constant(kernel)), name)
        product = emitter.emit(op.add(product, constant(bias.reshape(1, -1, *[1] * (rank - 2)))))
    return emitter.emit(op.nn.relu(product)) if cut.nonnegative else product


def resized(func: relax.Function, cut: Cut) -> relax.Function:
    """Return a function of one output with images brought to the size of those at a cut."""
    emitter = dataflow.Emitter()
    new: dict[dataflow.Value, dataflow.Value] = {}
    emitter.copy(dataflow.bindings(func), new)
    (field,) = dataflow.output_fields(func)
    return emitter.finish(func.params, [emitter.emit(_resized(new[field], cut.shape))])


def _resized(value: dataflow.Value, shape: tuple[int, ...]) -> dataflow.Value:
    """Average where images become smaller, interpolate where they become larger."""
    size, given = shape[2:], ir.static_shape(value)[2:]
    if len(shape) != 4 or given == size:
        return value
    if any(new > old for new, old in zip(size, given, strict=True)):
        return op.image.resize2d(value, size, layout="NCHW", method="linear")
    steps = [-(-old // new) for new, old in zip(size, given, strict=True)]
    if any(-(-old // step) != new for new, step, old in zip(size, steps, given, strict=True)):
        return op.nn.adaptive_avg_pool2d(value, size)
    # Around where a strided convolution looks; unlike windows of changing size, ONNX and integers have these.
    sizes, around = [2 * step - 1 for step in steps], [step - 1 for step in steps]
    return op.nn.avg_pool2d(value, sizes, steps, around * 2, count_include_pad=False)


def fits(donor: Cut, cut: Cut) -> bool:
    """Tell whether one stitch can lead from one cut to the other."""
    if len(donor.shape) != len(cut.shape) or len(cut.shape) not in (2, 3, 4) or donor.shape[0] != cut.shape[0]:
        return False
    return len(cut.shape) == 4 or donor.shape[2:] == cut.shape[2:]
