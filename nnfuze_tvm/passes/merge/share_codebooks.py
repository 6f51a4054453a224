"""One set of numbers for the weights of several networks, which are then short codes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import tvm
from tvm import relax
from tvm.ir import Call, GenericConst
from tvm.ir.transform import PassContext, module_pass

from nnfuze_tvm.errors import InputError
from nnfuze_tvm.graph import dataflow, ops
from nnfuze_tvm.graph.constants import array, constant
from nnfuze_tvm.graph.dataflow import Value
from nnfuze_tvm.passes.simplify.fold_batch_norm import FoldBatchNorm

# A codebook is learnt from so many vectors at most, in so many rounds; so many are looked up at a time.
_LEARNT, _ROUNDS, _AT_A_TIME = 100_000, 30, 8192
# Codes of more bits than these are no codes any more.
_MOST_CODES = 1 << 16


@module_pass(opt_level=0, name="ShareCodebooks")
class ShareCodebooks:
    """Make the weights of all layers of one kernel shape, of all networks, out of one small set of vectors.

    After NeuralMerger (Chou, Chan, Lee, Chiu and Chen, IJCAI 2018): the weights of a layer at one place of its kernel
    are cut into vectors of a few neighbouring input channels, and those of all layers of equal kernels are clustered
    together by k-means. Layers whose number of inputs is no multiple of that length stay, and so do kernels for which
    codes and codebook would be no smaller. The published method trains afterwards; this one does not. The graph stays
    what it is, and so does its speed: it is files that can be smaller, see `stored_bytes`.

    Parameters
    ----------
    length : int
        How many weights a vector has.
    codes : int
        How many vectors a codebook has.

    Raises
    ------
    InputError
        If either is no number that codes can have.
    """

    def __init__(self, length: int = 2, codes: int = 256) -> None:
        if length < 1 or not 2 <= codes <= _MOST_CODES:
            raise InputError(f"codebooks: give vectors of 1 weight or more, and 2 to {_MOST_CODES} of them")
        self.length, self.codes = length, codes

    def transform_module(self, mod: tvm.IRModule, _: PassContext) -> tvm.IRModule:
        """Return the module with other weights."""
        mod = tvm.transform.Sequential([FoldBatchNorm()])(mod)
        new: dict[GenericConst, GenericConst] = {}
        for layers in _by_kernel(mod, self.length).values():
            vectors = [_vectors(weight, call, self.length) for weight, call in layers.items()]
            every = np.concatenate(vectors)
            if _coded(len(every), self.length, self.codes) >= every.nbytes:
                continue
            codebook = clustered(every, self.codes)
            for (weight, call), own in zip(layers.items(), vectors, strict=True):
                new[weight] = constant(_weights(codebook[nearest(own, codebook)], call))
        return dataflow.with_rewritten(mod, lambda func, _: dataflow.with_values(func, _replaced(new))) if new else mod


def stored_bytes(mod: tvm.IRModule, length: int) -> int:
    """Return how many bytes the constants of a module take, with weights as codes where that is smaller.

    Parameters
    ----------
    mod : tvm.IRModule
        A module that `ShareCodebooks` made, or what further passes that keep weights made of that.
    length : int
        How many weights a vector has.
    """
    kernels = _by_kernel(mod, length)
    coded = {weight for layers in kernels.values() for weight in layers}
    total = sum(array(each).nbytes for each in _constants(mod) if each not in coded)
    for layers in kernels.values():
        vectors = np.concatenate([_vectors(weight, call, length) for weight, call in layers.items()])
        different = len(np.unique(vectors, axis=0))
        codes = _coded(len(vectors), length, different) if different <= _MOST_CODES else vectors.nbytes
        total += min(codes, vectors.nbytes)
    return total


def clustered(vectors: np.ndarray, count: int) -> np.ndarray:
    """Return ``[count, length]``: vectors that stand for many, by k-means (Lloyd).

    Parameters
    ----------
    vectors : np.ndarray
        ``[N, length]`` float32.
    count : int
        At most so many are returned: fewer where there are no more different ones.
    """
    rng = np.random.default_rng(0)
    if len(vectors) > _LEARNT:
        vectors = vectors[rng.choice(len(vectors), _LEARNT, replace=False)]
    different = np.unique(vectors, axis=0)
    if len(different) <= count:
        return different
    codebook = different[np.sort(rng.choice(len(different), count, replace=False))]
    for _ in range(_ROUNDS):
        codes = nearest(vectors, codebook)
        members = np.bincount(codes, minlength=count)
        sums = np.stack([np.bincount(codes, column, count) for column in vectors.T], axis=1)
        moved = np.where(members[:, None] > 0, sums / np.maximum(members, 1)[:, None], codebook).astype("float32")
        if np.array_equal(moved, codebook):
            break
        codebook = moved
    return codebook


def nearest(vectors: np.ndarray, codebook: np.ndarray) -> np.ndarray:
    """Return for each vector the number of the nearest one of a codebook."""
    half = np.square(codebook).sum(1) / 2
    parts = range(0, len(vectors), _AT_A_TIME)
    return np.concatenate([np.argmin(half - vectors[at : at + _AT_A_TIME] @ codebook.T, axis=1) for at in parts])


def _coded(vectors: int, length: int, codes: int) -> int:
    """Return the bytes of so many codes, and of their codebook of float32."""
    return math.ceil(vectors * math.ceil(math.log2(max(codes, 2))) / 8) + codes * length * 4


def _by_kernel(mod: tvm.IRModule, length: int) -> dict[tuple[int, ...], dict[GenericConst, Call]]:
    """Return by the shape of the kernel the weights that can be cut into vectors, each with a layer of them."""
    found: dict[tuple[int, ...], dict[GenericConst, Call]] = {}
    for func in mod.functions.values():
        for binding in dataflow.bindings(func) if isinstance(func, relax.Function) else ():
            where = ops.layer(binding.value)
            if where is None or str(binding.value.args[1].ty.dtype) != "float32":
                continue
            shape = where.filters.unpack(array(binding.value.args[1])).shape
            if shape[2] % length == 0:
                found.setdefault(shape[3:], {}).setdefault(binding.value.args[1], binding.value)
    return found


def _vectors(weight: GenericConst, call: Call, length: int) -> np.ndarray:
    """Return the vectors that weights are cut into, ``[N, length]``."""
    where = ops.layer(call)
    assert where is not None
    return np.moveaxis(where.filters.unpack(array(weight)), 2, -1).reshape(-1, length)


def _weights(vectors: np.ndarray, call: Call) -> np.ndarray:
    """Return what `_vectors` was made of."""
    where = ops.layer(call)
    assert where is not None
    shape = np.moveaxis(where.filters.unpack(array(call.args[1])), 2, -1).shape
    return where.filters.pack(np.moveaxis(vectors.reshape(shape), -1, 2))


def _replaced(new: dict[GenericConst, GenericConst]) -> Callable[[Value, str, dataflow.Emitter], Value | None]:
    """Return what puts other weights into layers."""

    def change(value: Value, _name: str, _emitter: dataflow.Emitter) -> Value | None:
        if ops.layer(value) is None or value.args[1] not in new:
            return None
        return Call(value.op, [value.args[0], new[value.args[1]]], value.attrs, value.ty_args, value.span)

    return change


def _constants(mod: tvm.IRModule) -> Iterator[GenericConst]:
    """Yield the constants of a module, each once."""
    seen: set[GenericConst] = set()
    for func in mod.functions.values():
        for binding in dataflow.bindings(func) if isinstance(func, relax.Function) else ():
            for leaf in dataflow.operands(binding.value):
                if isinstance(leaf, GenericConst) and leaf not in seen:
                    seen.add(leaf)
                    yield leaf
