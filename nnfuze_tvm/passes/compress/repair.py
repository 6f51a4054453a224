"""Repair without training: what is left of a network's weights learns to give what the layers gave before.

Layer by layer, in the order in which they are computed, least squares on samples fits weights and bias to the output
that the layer has in the whole network, by the input that it has in the compressed one, so that errors do not pile up
(after He et al., "Channel Pruning for Accelerating Very Deep Neural Networks", ICCV 2017). A layer in front of a
residual add is fitted to the sum, and makes up for what the other branch has lost.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import tvm
from tvm import relax
from tvm.ir import Call, GenericConst, Var

from nnfuze_tvm.graph import block_sparsity, ops
from nnfuze_tvm.graph.constants import array, constant
from nnfuze_tvm.graph.dataflow import Emitter, Value, bindings, operands, output_fields, substitute
from nnfuze_tvm.graph.evaluate import kernels_of, value_of
from nnfuze_tvm.graph.inferences import Inferences
from nnfuze_tvm.graph.ir import static_shape
from nnfuze_tvm.passes.compress.calibration import batches, spread
from nnfuze_tvm.passes.compress.error import output_error
from nnfuze_tvm.passes.compress.least_squares import Seen, fit
from nnfuze_tvm.passes.compress.sites import Site, ordered, sites_of

# So many inferences are looked at, fewer where they would be more multiply-accumulates in all, or more bytes at a time;
# one of four judges.
_MOST, _MACS, _BYTES, _HELD = 512, 4e11, 1 << 30, 4
# A layer is fitted to so many rows for each weight of a channel, and to so many more; and to fewer where these would
# be too many numbers.
_ROWS, _MORE_ROWS, _NUMBERS = 6, 1024, 1 << 26
# An output may become worse by so much by chance.
_SLACK = 1.02


@dataclass(frozen=True)
class Compressed:
    """A function from which something was taken away, and the one that it was.

    Attributes
    ----------
    before, after : relax.Function
        Straight-line functions of the same parameters and outputs.
    same : mapping of str to Var
        By the names of Vars of ``after``: the Var of ``before`` that held the same, as far as there is one.
    left : callable
        From a Var of ``before`` and its value to what is left of the value in ``after``.
    blocks : mapping of str to numpy.ndarray
        By the names of layers that have lost blocks of their weights: those that they have, see `block_sparsity`.
    """

    before: relax.Function
    after: relax.Function
    same: Mapping[str, Var]
    left: Callable[[Var, np.ndarray], np.ndarray]
    blocks: Mapping[str, np.ndarray] = field(default_factory=dict)


def repaired(
    mod: tvm.IRModule,
    compressed: Compressed,
    samples: Mapping[str, np.ndarray],
    announce: Callable[[str], None] = lambda _: None,
) -> relax.Function:
    """Return the compressed function with weights and biases fitted to samples.

    It is the function as it was where there are fewer than four inferences, and where an output is worse then on
    inferences that nothing was fitted to.

    Parameters
    ----------
    mod : tvm.IRModule
        The module of the function before.
    compressed : Compressed
        The function, and what it was.
    samples : mapping
        Checked samples, see :func:`nnfuze_tvm.passes.compress.calibration.load_calibration`.
    announce : callable
        Is told how far the repair is.
    """
    inputs = _inputs(compressed.before, samples)
    if len(inputs) < _HELD:
        return compressed.after
    repair = _Repair(compressed, inputs, kernels_of(mod))
    for number, name in enumerate(repair.steps(), 1):
        announce(f"repairing: {name} ({number} of {len(repair.sites)})")
    new = _with_constants(compressed.after, repair.changes)
    return new if repair.helps() else compressed.after


def _inputs(func: relax.Function, samples: Mapping[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """Return inferences, evenly spread over those that there are."""
    found = list(batches(samples, func.params))
    macs = sum(ops.macs(b.value) for b in bindings(func))
    # The tensors of the function before and after are there at once, and those that layers are fitted to.
    count = max(_HELD, min(len(found), _MOST, int(_MACS / max(1, 2 * macs)), _BYTES // max(1, 3 * _peak(func))))
    return spread(found, count)


def _peak(func: relax.Function) -> int:
    """Return the bytes of the values of one inference that are there at once, at most."""
    readers = Counter(leaf for b in bindings(func) for leaf in operands(b.value))
    readers.update(leaf for out in output_fields(func) for leaf in operands(out))
    now = peak = 0
    for binding in bindings(func):
        now += _bytes(binding.var)
        peak = max(peak, now)
        for leaf in operands(binding.value):
            readers[leaf] -= 1
            if not readers[leaf] and isinstance(leaf, Var) and leaf not in set(func.params):
                now -= _bytes(leaf)
    return peak


def _bytes(var: Var) -> int:
    return 4 * math.prod(static_shape(var)) if isinstance(var.ty, relax.TensorType) else 0


class _Repair:
    """Walks both functions, and fits layer by layer.

    Attributes
    ----------
    sites : dict of Var to Site
        The layers that can be fitted.
    changes : dict
        The operands that become other constants, by the Var of what reads them and their places there.
    """

    def __init__(
        self,
        compressed: Compressed,
        inputs: Sequence[Mapping[str, np.ndarray]],
        library: tvm.runtime.Module | None,
    ) -> None:
        self.compressed = compressed
        self.before, self.after, self.plain = (
            Inferences(compressed.before, inputs, library),
            Inferences(compressed.after, inputs, library),
            Inferences(compressed.after, inputs[_HELD - 1 :: _HELD], library),
        )
        self.sites = sites_of(compressed.after, compressed.same)
        self.changes: dict[Var, dict[int, GenericConst]] = {}
        self.before.readers.update(target for site in self.sites.values() for target in self._targets(site))
        self.rng = np.random.default_rng(0)

    def _targets(self, site: Site) -> list[Var]:
        """Return what a layer may be fitted to: its own result before, and the sum that it goes into."""
        return [self.compressed.same[var.name] for var in (site.end, site.total) if var is not None]

    def steps(self) -> Iterator[str]:
        """Fit everything, and tell the name of each layer before."""
        made = iter(bindings(self.compressed.before))
        done: set[Value] = set(self.compressed.before.params)
        for binding in ordered(self.compressed.after, self.sites):
            var, site = binding.var, self.sites.get(binding.var)
            if site is not None:
                yield var.name
                targets = self._targets(site)
                while not done.issuperset(targets):
                    step = next(made)
                    self.before.compute(step.var, step.value)
                    done.add(step.var)
                self._fit(site)
                for target in targets:
                    self.before.release(target)
            self.after.compute(var, _changed(binding.value, self.changes.get(var, {})))
        for step in made:
            self.before.compute(step.var, step.value)
        for step in bindings(self.compressed.after):
            self.plain.compute(step.var, step.value)

    def helps(self) -> bool:
        """Tell whether no output is worse than without, and some are better, where nothing was fitted."""
        held = slice(_HELD - 1, None, _HELD)
        exact = self.before.results(held)
        without, fitted = (
            np.array([output_error(own, wanted) for own, wanted in zip(results, exact, strict=True)])
            for results in (self.plain.results(slice(None)), self.after.results(held))
        )
        return bool((fitted <= _SLACK * without).all() and np.square(fitted).sum() < np.square(without).sum())

    def _fit(self, site: Site) -> None:
        layer = ops.layer(site.call)
        assert layer is not None
        old = array(site.call.args[1])
        filters = layer.filters.unpack(old)
        blocks = self.compressed.blocks.get(site.layer.name)
        own = filters if blocks is None else block_sparsity.in_rows(filters, blocks)
        weight = own.reshape(*own.shape[:2], -1)
        bias = np.zeros((len(weight), 1, weight.shape[1]), old.dtype)
        if site.bias is not None:
            bias = array(site.bias[1]).reshape(bias.shape)
        found = fit(*self._seen(site, layer, weight.shape), weight, bias, has_bias=site.bias is not None)
        if found is None:
            return
        new = found[0].reshape(own.shape)
        new = new if blocks is None else block_sparsity.of_rows(new, blocks, filters.shape[2])
        self.changes[site.layer] = {1: constant(layer.filters.pack(new), old.dtype)}
        if site.bias is not None:
            place, given = site.bias
            self.changes[site.end] = {place: constant(found[1].reshape(static_shape(given)), old.dtype)}

    def _seen(self, site: Site, layer: ops.Layer, shape: tuple[int, ...]) -> tuple[Seen, Seen]:
        """Return what to fit a layer to, and what to judge by; ``shape`` is that of its weights in groups."""
        groups, outputs, size = shape
        blocks = self.compressed.blocks.get(site.layer.name)
        operator = ops.of(site.call)
        assert operator is not None and operator.rows is not None
        known = self.after.known[0]
        # What makes up for another branch must know what that gives.
        whole = site.total is not None and (site.other in known or not isinstance(site.other, Var))
        target = self._targets(site)[-1 if whole else 0]
        everywhere = math.prod(static_shape(site.layer)) // (groups * outputs)
        most = min(_ROWS * size + _MORE_ROWS, _NUMBERS // (groups * size))
        each = max(1, min(everywhere, -(-most // len(self.after.known))))
        parts: tuple[list[Seen], list[Seen]] = ([], [])
        for number, (known, exact) in enumerate(zip(self.after.known, self.before.known, strict=True)):
            wanted = self.compressed.left(target, exact[target])
            if whole:
                wanted = wanted - value_of(site.other, known, None)
            places = np.sort(self.rng.permutation(everywhere)[:each])
            sums = np.moveaxis(wanted, layer.result, -1).reshape(everywhere, groups, outputs)[places]
            rows = operator.rows(site.call, known[site.call.args[0]], places)
            if blocks is not None:
                rows = rows[0][:, block_sparsity.columns(blocks, size // (blocks.shape[1] * block_sparsity.INPUTS))]
                rows = rows.swapaxes(0, 1)
            parts[number % _HELD == _HELD - 1].append(Seen(rows, sums.swapaxes(0, 1)))
        fitted, judged = (
            Seen(np.concatenate([p.rows for p in part], 1), np.concatenate([p.wanted for p in part], 1))
            for part in parts
        )
        return fitted, judged


def _changed(value: Value, constants: Mapping[int, GenericConst]) -> Value:
    """Return a call with other constants at some places."""
    if not constants:
        return value
    args = [constants.get(n, arg) for n, arg in enumerate(value.args)]
    return Call(value.op, args, value.attrs, value.ty_args, value.span, value.ty)


def _with_constants(func: relax.Function, changes: Mapping[Var, Mapping[int, GenericConst]]) -> relax.Function:
    emitter, values = Emitter(), dict[Value, Value]()
    for binding in bindings(func):
        value = substitute(_changed(binding.value, changes.get(binding.var, {})), values)
        values[binding.var] = emitter.emit(value, binding.var.name)
    return emitter.finish(func.params, [substitute(out, values) for out in output_fields(func)], func.attrs)
