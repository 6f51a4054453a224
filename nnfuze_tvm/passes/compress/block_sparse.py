"""Block sparsity: blocks of weights become zero, which kernels then skip."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import tvm
from pydantic import Field
from tvm import relax
from tvm.ir import Call, Var
from tvm.ir.transform import PassContext, module_pass

from nnfuze_tvm.graph import block_sparsity, evaluate, ir, ops
from nnfuze_tvm.graph.constants import array, constant
from nnfuze_tvm.graph.dataflow import Emitter, Value, bindings, output_fields, returning, substitute, with_functions
from nnfuze_tvm.graph.evaluate import Executor
from nnfuze_tvm.passes.compress.calibration import load_calibration, observed
from nnfuze_tvm.passes.compress.free_weights import with_zero_blocks
from nnfuze_tvm.passes.compress.method import Inputs, Method, Option, PolicyField, Training
from nnfuze_tvm.passes.compress.repair import Compressed, repaired
from nnfuze_tvm.passes.compress.sites import has_one_matrix

if TYPE_CHECKING:
    from nnfuze_tvm.passes.compress.policy import LayerPolicy, Policy

# What layers read is looked at in so many inferences at most.
_MOST_BATCHES = 256


@module_pass(opt_level=0, name="BlockSparse")
class BlockSparse:
    """Make blocks of the weights of layers zero, see `graph.block_sparsity`; of every 16 outputs equally many.

    Those blocks go that add least to the results: with samples by ``Σ w² E[x²]`` over a block, where ``x`` is what an
    input channel has (after Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", 2023),
    else by ``Σ w²``. With samples, what is left is then fitted to what the layers gave before, see
    :mod:`nnfuze_tvm.passes.compress.repair`. A layer without whole blocks stays as it is.

    Parameters
    ----------
    policy : Policy
        Which part of the blocks of each layer goes (``sparsity``).
    calibration : path or mapping, optional
        Samples, see :func:`nnfuze_tvm.passes.compress.calibration.load_calibration`.
    executor : callable
        Runs the float network; by default with NumPy.
    announce : callable
        Is told how far the repair is.
    """

    def __init__(
        self,
        policy: Policy,
        calibration: str | os.PathLike[str] | Mapping[str, np.ndarray] | None = None,
        executor: Executor = evaluate.executor,
        announce: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.policy, self.calibration, self.executor, self.announce = policy, calibration, executor, announce

    def transform_module(self, mod: tvm.IRModule, _: PassContext) -> tvm.IRModule:
        """Return the module with zeros; the module itself if there are no more than before."""
        samples = None if self.calibration is None else load_calibration(self.calibration, mod)
        lineage, changed = ir.lineage(mod), {}
        for gvar, func in mod.functions_items():
            if not isinstance(func, relax.Function):
                continue
            layers = {b.var: b.value for b in bindings(func) if has_one_matrix(b.value)}
            asked = {var: self.policy.for_layer(var.name, lineage).sparsity for var in layers}
            layers = {var: call for var, call in layers.items() if asked[var] > 0}
            powers = {} if samples is None else _powers(mod, func, layers, samples, self.executor)
            kept = {var: _kept(call, asked[var], powers.get(var)) for var, call in layers.items()}
            blocks = {var: each for var, each in kept.items() if each is not None}
            if blocks:
                changed[gvar] = self._sparse(mod, func, blocks, samples)
        return with_functions(mod, {**mod.functions, **changed}) if changed else mod

    def _sparse(
        self,
        mod: tvm.IRModule,
        func: relax.Function,
        blocks: Mapping[Var, np.ndarray],
        samples: Mapping[str, np.ndarray] | None,
    ) -> relax.Function:
        emitter, values = Emitter(), dict[Value, Value]()
        for binding in bindings(func):
            value = substitute(binding.value, values)
            if binding.var in blocks:
                value = _with_blocks(value, blocks[binding.var])
            values[binding.var] = emitter.emit(value, binding.var.name)
        new = emitter.finish(func.params, [substitute(out, values) for out in output_fields(func)], func.attrs)
        if samples is None:
            return new
        same = {b.var.name: b.var for b in bindings(func)}
        own = {var.name: kept for var, kept in blocks.items()}
        return repaired(mod, Compressed(func, new, same, lambda _, value: value, own), samples, self.announce)


def _powers(
    mod: tvm.IRModule,
    func: relax.Function,
    layers: Mapping[Var, Call],
    samples: Mapping[str, np.ndarray],
    executor: Executor,
) -> dict[Var, np.ndarray]:
    """Return the sums of the squares of the channels of what layers read, ``[inputs]``."""
    powers: dict[Var, Any] = dict.fromkeys(layers, 0)
    read = [call.args[0] for call in layers.values()]
    if not layers:
        return powers
    for found in observed(mod, returning(func, read), samples, executor, _MOST_BATCHES):
        for (var, call), values in zip(layers.items(), found, strict=True):
            layer = ops.layer(call)
            assert layer is not None
            rows = np.moveaxis(values, layer.data, -1).reshape(-1, values.shape[layer.data])
            powers[var] = powers[var] + np.square(rows, dtype="float64").sum(0)
    return powers


def _kept(call: Call, sparsity: float, powers: np.ndarray | None) -> np.ndarray | None:
    """Return which blocks of a layer stay, ``[rows, kept]``; None where all do, or it has none."""
    layer = ops.layer(call)
    assert layer is not None
    filters = layer.filters.unpack(array(call.args[1]))
    if not block_sparsity.has_blocks(filters):
        return None
    size = np.square(block_sparsity.in_blocks(filters), dtype="float64").sum((2, 4))
    if powers is not None:
        size = size * powers.reshape(1, -1, block_sparsity.INPUTS)
    count = size.shape[1]
    stay = max(1, round((1 - sparsity) * count))
    if stay == count:
        return None
    return np.sort(np.argsort(-size.sum(2), axis=1, kind="stable")[:, :stay], axis=1)


def _with_blocks(call: Call, kept: np.ndarray) -> Call:
    """Return a layer with only these blocks of its weights."""
    layer = ops.layer(call)
    assert layer is not None
    filters = layer.filters.unpack(array(call.args[1]))
    left = block_sparsity.of_rows(block_sparsity.in_rows(filters, kept), kept, filters.shape[2])
    weight = constant(layer.filters.pack(left), "float32")
    return Call(call.op, [call.args[0], weight, *call.args[2:]], call.attrs, call.ty_args, call.span, call.ty)


_SHARE = Annotated[float, Field(ge=0, lt=1)]


def _passes(inputs: Inputs) -> list[tvm.transform.Pass]:
    return [BlockSparse(inputs.policy, inputs.samples, inputs.executor, inputs.announce)]


def _is_asked(layer: LayerPolicy) -> bool:
    return bool(layer.sparsity > 0)


METHOD = Method(
    name="sparse",
    activity="removing blocks of weights",
    passes=_passes,
    wants=_is_asked,
    fields=(
        PolicyField(
            name="sparsity",
            type=Annotated[_SHARE, Field(strict=True, allow_inf_nan=False)],
            default=0.0,
            help="fraction of the blocks of the layer's weights, 16 outputs × 4 inputs, that become zero",
            combine=min,
        ),
    ),
    options=(
        Option(
            name="sparsity",
            type=_SHARE,
            default=None,
            help="Fraction of the blocks of the layers' weights to remove, for example 0.75.",
            sets=lambda sparsity: {"sparsity": sparsity},
        ),
    ),
    training=Training(form=with_zero_blocks),
)
