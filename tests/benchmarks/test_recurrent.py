"""The recurrent layers that are measured: both engines get the same network and agree."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import recurrent
from benchmarks.layers import onnx_runtime, ours

SMALL = (
    recurrent.Layer("LSTM", 3, 4, 8, attributes={"direction": "bidirectional"}),
    recurrent.Layer("GRU", 1, 4, 8, batch=2, attributes={"linear_before_reset": 1}),
)


@pytest.mark.parametrize("layer", SMALL, ids=lambda layer: layer.operator)
def test_both_compute_the_same(layer):
    model = recurrent.network(layer)
    feeds = recurrent.data(model)
    assert set(feeds) == {"x", *layer.states}
    mine, theirs = recurrent.outputs(ours(model).run(feeds)), onnx_runtime(model)(feeds)
    assert len(mine) == len(theirs) == max(1, len(layer.states))
    for one, other in zip(mine, theirs, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_the_layers_are_networks_of_their_sizes():
    for layer in recurrent.LAYERS:
        model = recurrent.network(layer)
        assert recurrent.data(model)["x"].shape == (layer.steps, layer.batch, layer.inputs)
        assert len(model.graph.output) == max(1, len(layer.states))
