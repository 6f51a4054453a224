"""ONNX's own tests of every operator: imported and computed they give what is expected, or are refused in a line.

In those tests every operand is an input; in networks weights, axes and shapes are constants, so here they are, too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import onnx
import pytest
import tvm
from onnx import numpy_helper

import nnfuze_tvm
from nnfuze_tvm.deploy import build
from nnfuze_tvm.deploy.runner import Runner, signature
from nnfuze_tvm.devices.targets import resolve
from nnfuze_tvm.errors import ModelError
from nnfuze_tvm.graph.evaluate import executor
from nnfuze_tvm.passes import pipeline

# Operands that are data; of other operators the first one is.
ALL = tuple(range(16))
DATA: dict[str, tuple[int, ...]] = dict.fromkeys(
    (
        "Add Sub Mul Div Pow Mod And Or Xor Equal Greater GreaterOrEqual Less LessOrEqual Max Min Mean Sum Concat "
        "Where MatMul Attention BitwiseAnd BitwiseOr BitwiseXor BitShift MatMulInteger Einsum SwiGLU"
    ).split(),
    ALL,
) | {
    "LSTM": (0, 5, 6),
    "GRU": (0, 5),
    "RNN": (0, 5),
    "GatherElements": (0, 1),
    "Gather": (0, 1),
    "GatherND": (0, 1),
    "ScatterElements": (0, 2),
    "ScatterND": (0, 2),
    "GridSample": (0, 1),
    "NonMaxSuppression": (0, 1),
    "Gemm": (0, 2),
    "RoiAlign": (0, 1),
    "MaxUnpool": (0, 1),
    "DeformConv": (0, 2),
    "Loop": (0, 1, 2),
}
# Training, strings, images, sequences and what has no numbers to compare.
OTHER = frozenset(
    """Adagrad Adam Momentum SoftmaxCrossEntropyLoss NegativeLogLikelihoodLoss ImageDecoder StringConcat StringSplit
    StringNormalizer RegexFullMatch TfIdfVectorizer LabelEncoder ArrayFeatureExtractor Binarizer TreeEnsemble
    SequenceMap SequenceInsert SplitToSequence OptionalGetElement OptionalHasElement Bernoulli BitCast
    FlexAttention CausalConvWithState LinearAttention TensorScatter""".split()
)
# Types that no kernel here has.
EXOTIC = re.compile(r"FLOAT8|FLOAT4|FLOAT6|INT4|INT2|BFLOAT16|STRING|COMPLEX|E8M0|_e\dm\d|bfloat16", re.IGNORECASE)


@cache
def cases() -> Mapping[str, list[Any]]:
    """Return the tests by operator."""
    from onnx.backend.test.case.node import collect_testcases

    found: dict[str, list[Any]] = {}
    for case in collect_testcases(None):
        operators = {node.op_type for node in case.model.graph.node}
        values = [*case.model.graph.input, *case.model.graph.output]
        if len(operators) != 1 or "_expanded" in case.name or not case.data_sets or operators & OTHER:
            continue
        if any(value.type.WhichOneof("value") != "tensor_type" for value in values):
            continue
        found.setdefault(operators.pop(), []).append(case)
    return found


def network(case: Any) -> tuple[onnx.ModelProto, dict[str, np.ndarray], list[np.ndarray]]:
    """Return a test with constants for operands that are no data, its inputs, and what it expects."""
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    operands, expected = (list(map(_array, each)) for each in case.data_sets[0])
    node = model.graph.node[0]
    kept = {name for n, name in enumerate(node.input) if n in DATA.get(node.op_type, (0,))}
    named = list(zip(list(model.graph.input), operands, strict=False))
    if not any(value.name in kept for value, _ in named):
        kept = {value.name for value, _ in named[:1]}
    del model.graph.input[:]
    feeds = {}
    for value, operand in named:
        if value.name in kept:
            model.graph.input.append(value)
            feeds[value.name] = np.array(operand)
        else:
            model.graph.initializer.append(numpy_helper.from_array(operand, value.name))
    return model, feeds, expected


def _array(value: Any) -> np.ndarray:
    return numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else np.asarray(value)


def compare(case: Any, answers: list[np.ndarray], expected: list[np.ndarray]) -> None:
    """Check values, shapes and types."""
    assert len(answers) == len(expected), case.name
    for mine, theirs in zip(answers, expected, strict=True):
        assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype), case.name
        tolerance = 1e-2 if mine.dtype == np.float16 else 1e-3
        np.testing.assert_allclose(mine, theirs, rtol=tolerance, atol=tolerance / 10, err_msg=case.name)


def imported(case: Any) -> tuple[tvm.IRModule, dict[str, np.ndarray], list[np.ndarray]] | None:
    """Return a test's graph, inputs and expectation; None if it is refused as a user would want it."""
    model, feeds, expected = network(case)
    try:
        mod = nnfuze_tvm.load([model], ["task"], shapes={name: array.shape for name, array in feeds.items()})
    except ModelError as error:
        assert len(str(error).splitlines()) == 1, case.name
        assert model.graph.node[0].op_type in str(error) or re.search("type .* is not supported", str(error)), case.name
        return None
    return mod, feeds, expected


def is_exotic(case: Any) -> bool:
    values = [*case.model.graph.input, *case.model.graph.output]
    types = [onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type) for value in values]
    return bool(EXOTIC.search(" ".join([case.name, *types])))


# Refused in a line: what a result's size depends on is data there, or a type or mode that no kernel has.
REFUSED = re.compile(
    """test_(batchnorm_.*training_mode|training_dropout.*|blackmanwindow.*|hammingwindow.*|hannwindow.*|melweightmatrix
    |constantofshape_.*|range_.*|loop11|nonzero_.*|unique_.*|top_k_uint64|nonmaxsuppression_.*
    |resize_downsample_scales_(linear|cubic)_align_corners)""",
    re.VERBOSE,
)
# Of operators with many tests so many are quick to run, and find most.
FEW = 2


def fails(case: Any, built: bool) -> str | None:
    """Return what is wrong with a test's outcome, None if nothing is."""
    try:
        found = imported(case)
        if found is None:
            return None if REFUSED.fullmatch(case.name) else f"{case.name}: refused"
        if REFUSED.fullmatch(case.name):
            return f"{case.name}: not refused"
        mod, feeds, expected = found
        merged = tvm.transform.Sequential(pipeline.merge_phases())(mod)
        if built:
            answer = Runner(build.build(merged, resolve("host")), *signature(merged)).run(feeds)["task"]
            answers = list(answer.values()) if isinstance(answer, dict) else [answer]
        else:
            answers = executor(merged)(feeds)
        compare(case, answers, expected)
    except Exception as error:
        return f"{case.name}: {type(error).__name__}: {str(error).strip().splitlines()[:1]}"
    return None


def test_operators() -> None:
    chosen = [case for of_one in cases().values() for case in of_one[:FEW] if not is_exotic(case)]
    assert len(chosen) > 300
    assert list(filter(None, (fails(case, built=False) for case in chosen))) == []


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_all_cases_built() -> None:
    chosen = [case for of_one in cases().values() for case in of_one if not is_exotic(case)]
    assert list(filter(None, (fails(case, built=True) for case in chosen))) == []


def test_types_that_no_kernel_has_are_refused() -> None:
    """In a line: neither a crash nor a wrong answer."""
    wrong = []
    for case in (case for of_one in cases().values() for case in of_one[:FEW] if is_exotic(case)):
        try:
            imported(case)
        except Exception as error:
            wrong.append(f"{case.name}: {type(error).__name__}: {str(error).strip().splitlines()[:1]}")
    assert wrong == []
