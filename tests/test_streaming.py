"""Networks with state, compiled, over 200 calls: what ONNX Runtime answers when it is handed its own states."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime
import pytest
import tvm

import nnfuze_tvm
from nnfuze_tvm.deploy import build
from nnfuze_tvm.deploy.runner import Runner, signature
from nnfuze_tvm.devices.targets import resolve
from nnfuze_tvm.passes import pipeline
from tests import streaming_networks

STEPS = 200


@pytest.mark.parametrize(
    ("network", "size"),
    [
        (streaming_networks.voice_activity, (1, 512)),
        (streaming_networks.spectral_mask, (1, 1, 257)),
        (streaming_networks.learned_mask, (1, 1, 512)),
    ],
    ids=lambda each: getattr(each, "__name__", ""),
)
def test_answers_stay_equal(network: Callable[[], onnx.ModelProto], size: tuple[int, ...]) -> None:
    model = network()
    fresh, state = (value.name for value in model.graph.input[:2])
    result, following = (value.name for value in model.graph.output)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    merged = tvm.transform.Sequential(pipeline.merge_phases())(nnfuze_tvm.load([model], ["task"]))
    runner = Runner(build.build(merged, resolve("host")), *signature(merged))
    shape = [dim.dim_value for dim in model.graph.input[1].type.tensor_type.shape.dim]
    mine = theirs = np.zeros(shape, "float32")
    rng = np.random.default_rng(0)
    answers = []
    for step in range(STEPS):
        feeds = {fresh: rng.standard_normal(size).astype("float32")}
        if len(model.graph.input) == 3:
            # The rate changes now and then, as no user would do.
            feeds["rate"] = np.array(8000 if step % 50 > 40 else 16000, "int64")
        ours = runner.run({**feeds, state: mine})["task"]
        want, theirs = session.run([result, following], {**feeds, state: theirs})
        mine = ours[following]
        answers.append((ours[result], want))
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-4 * max(np.ptp(theirs), 1e-6))
    got, expected = (np.stack(each) for each in zip(*answers, strict=True))
    assert np.ptp(expected) > 0.05
    assert np.abs(got - expected).max() <= 1e-4 * np.ptp(expected)
