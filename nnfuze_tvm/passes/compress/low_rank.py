"""Low rank: one layer becomes two thin ones."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import tvm
from pydantic import Field
from tvm import relax
from tvm.ir import Call, GenericConst, Var
from tvm.ir.transform import PassContext, module_pass

from nnfuze_tvm.graph import evaluate, ops
from nnfuze_tvm.graph.constants import array, constant
from nnfuze_tvm.graph.dataflow import Emitter, Value, bindings, op_name
from nnfuze_tvm.graph.evaluate import Executor
from nnfuze_tvm.graph.ops.convolution import with_attrs
from nnfuze_tvm.passes.compress.method import Inputs, Method, Option, PolicyField
from nnfuze_tvm.passes.compress.moments import moments
from nnfuze_tvm.passes.compress.two_layers import in_two

if TYPE_CHECKING:
    from nnfuze_tvm.passes.compress.policy import LayerPolicy, Policy


@module_pass(opt_level=0, name="LowRank")
class LowRank:
    """Replace layers by two thin ones: the first has the layer's kernel and few outputs, the second is pointwise.

    Of all weights of a rank, those are taken whose results are nearest to the layer's own on the samples: with ``U``
    the first eigenvectors of the second moments ``E[y yᵀ]`` of its results, ``Uᵀ W`` and ``U``. That is the singular
    value decomposition of ``W C^½``, where ``C`` are the second moments of what the weights multiply (Zhang et al.,
    "Accelerating Very Deep Convolutional Networks for Classification and Detection", 2016). Without samples it is that
    of ``W``. Where two layers would be as much work as one, the layer stays. With samples, what is left is then
    fitted to what the layers gave before, see :mod:`nnfuze_tvm.passes.compress.repair`.

    Parameters
    ----------
    policy : Policy
        Which part of its rank each layer keeps (``rank``), or which error it may have (``rank_error``).
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
        """Return the module with thin layers; the module itself if none is."""
        options = (self.policy, self.calibration, self.executor, self.announce)
        return in_two(mod, *options, is_asked=_is_asked, look=_results, halve=_thin)


def _is_asked(layer: LayerPolicy) -> bool:
    return bool(layer.rank < 1 or layer.rank_error > 0)


def _results(
    mod: tvm.IRModule, func: relax.Function, layers: list[Var], samples: Mapping[str, np.ndarray], executor: Executor
) -> dict[Var, np.ndarray]:
    """Return the sums of products of the channels of what layers give, ``[outputs, outputs]``."""
    calls = {b.var: b.value for b in bindings(func)}
    axes = {var: layer.result for var in layers if (layer := ops.layer(calls[var])) is not None}
    return {var: total for var, (total, _) in moments(mod, func, axes, samples, executor).items()}


def _thin(
    value: Call, asked: LayerPolicy, products: np.ndarray | None, emitter: Emitter, name: str
) -> tuple[Value, list[str]] | None:
    factors = _factors(value, asked, products)
    if factors is None:
        return None
    data = emitter.emit(_first(value, factors[0]), f"{name}.thin")
    return _second(value, data, factors[1]), [data.name]


def _factors(layer: Call, asked: LayerPolicy, products: np.ndarray | None) -> tuple[np.ndarray, np.ndarray] | None:
    """Return weights ``[rank, inputs × kernel]`` and ``[outputs, rank]``; None if no less work, or not finite."""
    found = ops.layer(layer)
    assert found is not None
    matrix = found.filters.unpack(array(layer.args[1]).astype("float64"))[0]
    matrix = matrix.reshape(len(matrix), -1)
    if not np.isfinite(matrix).all():
        return None
    powers, vectors = np.linalg.eigh(matrix @ matrix.T if products is None else products)
    powers, vectors = powers[::-1].clip(0), vectors[:, ::-1]
    full = min(matrix.shape)
    rank = max(1, round(asked.rank * full))
    if asked.rank_error > 0 and powers.sum() > 0:
        lost = np.sqrt(np.append(powers[::-1].cumsum()[::-1], 0) / powers.sum())
        rank = min(rank, max(1, int(np.argmax(lost <= asked.rank_error))))
    if rank * sum(matrix.shape) >= matrix.size:
        return None
    return vectors[:, :rank].T @ matrix, vectors[:, :rank]


def _first(layer: Call, thin: np.ndarray) -> Value:
    found, weight = ops.layer(layer), array(layer.args[1])
    assert found is not None
    filters = found.filters.unpack(weight)
    packed = constant(found.filters.pack(thin.reshape(1, len(thin), *filters.shape[2:])), "float32")
    return _with_weight(layer, layer.args[0], packed)


def _second(layer: Call, data: Value, wide: np.ndarray) -> Value:
    found = ops.layer(layer)
    assert found is not None
    shape = (1, *wide.shape, *[1] * (array(layer.args[1]).ndim - 2))
    packed = constant(found.filters.pack(wide.reshape(shape)), "float32")
    once = {name: [1] * (packed.value.ndim - 2) for name in ("strides", "dilation")}
    return _with_weight(layer, data, packed, padding=[0] * (2 * (packed.value.ndim - 2)), **once)


def _with_weight(layer: Call, data: Value, weight: GenericConst, **changes: Any) -> Value:
    if op_name(layer) == "matmul":
        return relax.op.matmul(data, weight)
    return with_attrs(layer, data, weight, **changes)


_SHARE = Annotated[float, Field(gt=0, le=1)]


def _passes(inputs: Inputs) -> list[tvm.transform.Pass]:
    return [LowRank(inputs.policy, inputs.samples, inputs.executor, inputs.announce)]


METHOD = Method(
    name="low-rank",
    activity="lowering ranks",
    passes=_passes,
    wants=_is_asked,
    fields=(
        PolicyField(
            name="rank",
            type=Annotated[_SHARE, Field(strict=True, allow_inf_nan=False)],
            default=1.0,
            help="fraction of the rank of the layer's weights that stays",
        ),
        PolicyField(
            name="rank_error",
            type=Annotated[float, Field(ge=0, lt=1, strict=True, allow_inf_nan=False)],
            default=0.0,
            help="error of the layer's result, as a part of its size, that the rank may be lowered to; 0: none",
            combine=min,
        ),
    ),
    options=(
        Option(
            name="rank",
            type=_SHARE,
            default=None,
            help="Fraction of the rank of the layers' weights to keep, for example 0.25.",
            sets=lambda rank: {"rank": rank},
        ),
    ),
)
