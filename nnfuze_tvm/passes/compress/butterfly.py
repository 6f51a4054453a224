"""Butterflies: a dense layer becomes two of block-diagonal weights, with a shuffle between them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated

import numpy as np
import tvm
from pydantic import Field
from tvm import relax
from tvm.ir import Call, Var
from tvm.ir.transform import PassContext, module_pass

from nnfuze_tvm.graph import evaluate, ops
from nnfuze_tvm.graph.constants import array, constant
from nnfuze_tvm.graph.dataflow import Emitter, Value, bindings, op_name
from nnfuze_tvm.graph.evaluate import Executor
from nnfuze_tvm.graph.ir import static_shape
from nnfuze_tvm.graph.ops.convolution import with_attrs
from nnfuze_tvm.passes.compress.method import Inputs, Method, Option, PolicyField
from nnfuze_tvm.passes.compress.moments import moments
from nnfuze_tvm.passes.compress.two_layers import in_two

if TYPE_CHECKING:
    from nnfuze_tvm.passes.compress.policy import LayerPolicy, Policy

# How many blocks there may be in a row, and what an edge of one has at least: a vector of bytes.
_BLOCKS, _LEAST = (2, 4, 8, 16, 32), 16
# Every block hands a multiple of this many channels to every other one: the shuffle moves them at once.
_STEP = 4
# Of numbers of blocks that lose at most so much of the square more than the best one, the fewest are taken: fewer are
# faster.
_ALIKE = 1.2
# How often all blocks are fitted to what the others leave, after each was fitted to its own part of the weights.
_SWEEPS = 3
# What is added to second moments, as a part of their mean, so that they can be inverted.
_DAMPING = 1e-4
_POINTWISE = {"nn.conv1d", "nn.conv2d", "nn.conv3d"}


@module_pass(opt_level=0, name="Butterfly")
class Butterfly:
    """Replace dense layers and 1×1 convolutions by two of block-diagonal weights, as Monarch matrices are [1]_.

    A matrix of ``b × b`` blocks, each of a low rank ``r``, is two block-diagonal ones of ``b`` blocks and a permutation
    of the channels between them: few numbers, but the rank of the whole may be full, where two thin layers of as many
    numbers (`LowRank`) have a small one. Each block is first the nearest of its rank to its part of the weights, then,
    a few times in turn, the best one for what the others leave of the layer's results on the samples: by the singular
    value decomposition of that times the square root of the second moments of the inputs. The number of blocks is the
    one with the smallest error, or the smallest number with hardly more. Without samples, inputs count as independent.
    Where two layers would be no less work than one, the layer stays. With samples, convolutions are then fitted to
    what they gave before, see :mod:`nnfuze_tvm.passes.compress.repair`.

    Parameters
    ----------
    policy : Policy
        Which part of its numbers each layer keeps (``butterfly``), or which error it may have (``butterfly_error``).
    calibration : path or mapping, optional
        Samples, see :func:`nnfuze_tvm.passes.compress.calibration.load_calibration`.
    executor : callable
        Runs the float network; by default with NumPy.
    announce : callable
        Is told how far the repair is.

    References
    ----------
    .. [1] T. Dao et al., "Monarch: Expressive Structured Matrices for Efficient and Accurate Training", ICML 2022.
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
        """Return the module with butterflies; the module itself if there is none."""
        options = (self.policy, self.calibration, self.executor, self.announce)
        return in_two(mod, *options, is_asked=_is_asked, look=_inputs, halve=_halve)


def _is_asked(layer: LayerPolicy) -> bool:
    return bool(layer.butterfly < 1 or layer.butterfly_error > 0)


def _inputs(
    mod: tvm.IRModule, func: relax.Function, layers: list[Var], samples: Mapping[str, np.ndarray], executor: Executor
) -> dict[Var, np.ndarray]:
    """Return the second moments of the channels of what layers take, ``[inputs, inputs]``.

    Of few samples they say little of how channels go together: then rather what each is on its own.
    """
    calls = {b.var: b.value for b in bindings(func) if b.var in set(layers) and _matrix(b.value) is not None}
    taken = [(call.args[0], layer.data) for call in calls.values() if (layer := ops.layer(call)) is not None]
    found = {}
    known = moments(mod, func, {data: axis for data, axis in taken if isinstance(data, Var)}, samples, executor)
    for var, (total, count) in known.items():
        alone = len(total) / (len(total) + count)
        found[var] = (1 - alone) * total + alone * np.diag(np.diag(total))
    return {var: found[call.args[0]] for var, call in calls.items() if call.args[0] in found}


def _matrix(layer: Call) -> np.ndarray | None:
    """Return the weights ``[outputs, inputs]`` of a dense layer or a 1×1 convolution, float64; None if not finite."""
    found = ops.layer(layer)
    if found is None or op_name(layer) not in {"matmul", *_POINTWISE}:
        return None
    matrix = found.filters.unpack(array(layer.args[1]).astype("float64"))[0]
    pointwise = matrix.size == matrix.shape[0] * matrix.shape[1]
    return matrix.reshape(matrix.shape[:2]) if pointwise and np.isfinite(matrix).all() else None


def _halve(
    value: Call, asked: LayerPolicy, products: np.ndarray | None, emitter: Emitter, name: str
) -> tuple[Value, list[str]] | None:
    matrix = _matrix(value)
    found = None if matrix is None else _factors(matrix, asked, products)
    if found is None:
        return None
    data, shape = value.args[0], static_shape(value)
    if op_name(value) == "matmul":
        data = emitter.emit(relax.op.reshape(data, [-1, static_shape(data)[-1], 1, 1]), f"{name}.pixels")
        first = emitter.emit(_grouped(data, found[0]), f"{name}.butterfly")
        second = emitter.emit(_grouped(_shuffled(first, len(found[0]), emitter, name), found[1]), f"{name}.joined")
        return relax.op.reshape(second, shape), [first.name, second.name]
    first = emitter.emit(_like(value, data, found[0]), f"{name}.butterfly")
    once = {each: [1] * (len(shape) - 2) for each in ("strides", "dilation")}
    middle = _shuffled(first, len(found[0]), emitter, name)
    return _like(value, middle, found[1], padding=[0] * (2 * (len(shape) - 2)), **once), [first.name]


def _grouped(data: Value, blocks: np.ndarray) -> Value:
    weight = constant(blocks.reshape(-1, blocks.shape[2], 1, 1), "float32")
    return relax.op.nn.conv2d(data, weight, groups=len(blocks))


def _like(layer: Call, data: Value, blocks: np.ndarray, **changes: object) -> Value:
    ones = [1] * (len(static_shape(layer)) - 2)
    weight = constant(blocks.reshape(-1, blocks.shape[2], *ones), "float32")
    return with_attrs(layer, data, weight, groups=len(blocks), **changes)


def _shuffled(data: Value, blocks: int, emitter: Emitter, name: str) -> Value:
    """Return data whose channels ``[from, to, rank]`` are ``[to, from, rank]``."""
    count, channels, *space = static_shape(data)
    parts = [blocks, blocks, channels // blocks**2]
    apart = emitter.emit(relax.op.reshape(data, [count, *parts, *space]), f"{name}.apart")
    turned = emitter.emit(relax.op.permute_dims(apart, [0, 2, 1, 3, *range(4, 4 + len(space))]), f"{name}.turned")
    return emitter.emit(relax.op.reshape(turned, [count, channels, *space]), f"{name}.shuffled")


def _factors(
    matrix: np.ndarray, asked: LayerPolicy, products: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray] | None:
    """Return weights of the halves, ``[b, b · r, inputs / b]`` and ``[b, outputs / b, b · r]``; None to stay."""
    inputs = matrix.shape[1]
    products = np.eye(inputs) if products is None else products / max(np.trace(products) / inputs, 1e-30)
    products = products + _DAMPING * np.eye(inputs)
    allowed = asked.butterfly_error**2 * np.sum((matrix @ products) * matrix)
    found: list[tuple[np.ndarray, np.ndarray, float]] = []
    for blocks in _BLOCKS:
        edges = [size // blocks for size in matrix.shape]
        if any(size % blocks for size in matrix.shape) or min(edges) < _LEAST:
            continue
        # Two layers of more numbers than this would be no less work.
        most = min((edges[0] * edges[1] - 1) // sum(edges), int(asked.butterfly * edges[0] * edges[1] / sum(edges)))
        most -= most % _STEP
        rank = min(most, _least_rank(matrix, products, blocks, allowed) if allowed else most)
        if not rank:
            continue
        found.append(_fitted(matrix, products, blocks, rank))
        while found[-1][2] > allowed > 0 and rank < most:
            rank += _STEP
            found[-1] = _fitted(matrix, products, blocks, rank)
    within = [each for each in found if each[2] <= allowed]
    if not found or (not within and asked.butterfly == 1):
        return None
    least = min(left for *_, left in found)
    alike = [each for each in found if each[2] <= _ALIKE * least]
    wide, thin, _ = min(within, key=lambda each: each[0].size + each[1].size) if within else alike[0]
    b, rank = len(wide), wide.shape[-1]
    # thin[j, k] are the rows that block k gives to block j, wide[j, k] what j makes of them.
    first = thin.swapaxes(0, 1).reshape(b, b * rank, -1)
    second = wide.transpose(0, 2, 1, 3).reshape(b, -1, b * rank)
    return first, second


def _least_rank(matrix: np.ndarray, products: np.ndarray, blocks: int, allowed: float) -> int:
    """Return the rank of blocks at which that is allowed to be lost, were their inputs independent."""
    tall, long = (size // blocks for size in matrix.shape)
    squares = np.zeros(min(tall, long))
    for k in range(blocks):
        own = slice(k * long, (k + 1) * long)
        lengths, axes = np.linalg.eigh(products[own, own])
        parts = matrix[:, own].reshape(blocks, tall, long) @ (axes * np.sqrt(lengths))
        squares += np.square(np.linalg.svd(parts, compute_uv=False)).sum(0)
    lost = np.append(squares[::-1].cumsum()[::-1], 0)
    return -(-max(1, int(np.argmax(lost <= allowed))) // _STEP) * _STEP


def _fitted(matrix: np.ndarray, products: np.ndarray, blocks: int, rank: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Return blocks of a rank nearest to a matrix: ``[b, b, outputs / b, r]``, ``[b, b, r, inputs / b]``, the error."""
    outputs = len(matrix)
    tall, long = (size // blocks for size in matrix.shape)
    wide, thin = np.zeros((blocks, blocks, tall, rank)), np.zeros((blocks, blocks, rank, long))
    left = matrix.copy()
    for sweep in range(1 + _SWEEPS):
        for k in range(blocks):
            own = slice(k * long, (k + 1) * long)
            lengths, axes = np.linalg.eigh(products[own, own])
            root, back = axes * np.sqrt(lengths), axes / np.sqrt(lengths)
            now = (wide[:, k] @ thin[:, k]).reshape(outputs, long)
            # What this column of blocks should give so that nothing is left of what its inputs tell; at first, its own.
            gives = now + left @ products[:, own] @ (back @ back.T) if sweep else matrix[:, own]
            u, sizes, v = np.linalg.svd(gives.reshape(blocks, tall, long) @ root, full_matrices=False)
            wide[:, k] = u[:, :, :rank] * sizes[:, None, :rank]
            thin[:, k] = v[:, :rank] @ back.T
            left[:, own] += now - (wide[:, k] @ thin[:, k]).reshape(outputs, long)
    return wide, thin, float(np.sum((left @ products) * left))


_SHARE = Annotated[float, Field(gt=0, le=1)]


def _passes(inputs: Inputs) -> list[tvm.transform.Pass]:
    return [Butterfly(inputs.policy, inputs.samples, inputs.executor, inputs.announce)]


METHOD = Method(
    name="butterfly",
    activity="making butterflies",
    passes=_passes,
    wants=_is_asked,
    fields=(
        PolicyField(
            name="butterfly",
            type=Annotated[_SHARE, Field(strict=True, allow_inf_nan=False)],
            default=1.0,
            help="fraction of the numbers of a dense or 1×1 layer's weights that stays, in blocks of low rank",
        ),
        PolicyField(
            name="butterfly_error",
            type=Annotated[float, Field(ge=0, lt=1, strict=True, allow_inf_nan=False)],
            default=0.0,
            help="error of the layer's result, as a part of its size, that these may be fewer for; 0: none",
            combine=min,
        ),
    ),
    options=(
        Option(
            name="butterfly",
            type=_SHARE,
            default=None,
            help="Fraction of the weights of dense and 1×1 layers to keep, as butterflies, for example 0.25.",
            sets=lambda share: {"butterfly": share},
        ),
    ),
)
