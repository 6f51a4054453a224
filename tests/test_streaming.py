"""Networks with state, compiled, over 200 calls: what ONNX Runtime answers when it is handed its own states."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import tvm

import nnfuze_tvm
from nnfuze_tvm import cli
from nnfuze_tvm.deploy import build
from nnfuze_tvm.deploy.runner import Runner, signature
from nnfuze_tvm.devices.targets import resolve
from nnfuze_tvm.passes import pipeline
from tests import streaming_networks

STEPS = 200

Session = Callable[[Mapping[str, np.ndarray]], list[np.ndarray]]


def session(model: onnx.ModelProto) -> Session:
    """Return a network in ONNX Runtime; what it isn't given is missing."""
    found = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return lambda inputs: found.run(None, dict(inputs))


def compiled(models: Mapping[str, onnx.ModelProto], **links: list[str]) -> Runner:
    loaded = nnfuze_tvm.load(list(models.values()), list(models))
    merged = tvm.transform.Sequential(pipeline.merge_phases(**links))(loaded)
    return Runner(build.build(merged, resolve("host")), *signature(merged))


def close(got: list[np.ndarray], want: list[np.ndarray]) -> None:
    answers, expected = np.stack(got), np.stack(want)
    assert np.ptp(expected) > 0.05
    assert np.abs(answers - expected).max() <= 1e-4 * np.ptp(expected)


@pytest.mark.parametrize(
    ("network", "size"),
    [
        (streaming_networks.voice_activity, (1, 512)),
        (streaming_networks.spectral_mask, (1, 1, 257)),
        (streaming_networks.learned_mask, (1, 1, 512)),
    ],
    ids=lambda each: getattr(each, "__name__", ""),
)
def test_two_streams_stay_equal(network: Callable[[], onnx.ModelProto], size: tuple[int, ...]) -> None:
    """Two streams take turns; one of them begins anew after a while."""
    model = network()
    fresh, state = (value.name for value in model.graph.input[:2])
    following = model.graph.output[1].name
    runner = compiled({"task": model}, states=[f"{state}={following}"])
    assert [s.name for s in runner.states] == [state]
    assert [o.name for o in runner.outputs] == [model.graph.output[0].name]
    reference = session(model)
    zeros = np.zeros(runner.states[0].shape, "float32")
    streams, theirs = [runner.stream(), runner.stream()], [zeros, zeros]
    rng = np.random.default_rng(0)
    got, want = [], []
    for step in range(STEPS):
        feeds = {fresh: rng.standard_normal(size).astype("float32")}
        if len(model.graph.input) == 3:
            # The rate changes now and then, as no user would do.
            feeds["rate"] = np.array(8000 if step % 50 > 40 else 16000, "int64")
        turn = step % 3 % 2
        if step == STEPS // 2:
            streams[turn].reset()
            theirs[turn] = zeros
        got.append(streams[turn].run(feeds)["task"])
        result, theirs[turn] = reference({**feeds, state: theirs[turn]})
        want.append(result)
    close(got, want)


def pipeline_by_hand(models: Mapping[str, onnx.ModelProto]) -> Iterator[dict[str, np.ndarray]]:
    """Run wake words as one does without chains: windows kept in NumPy, one session per network."""
    mel, embedding, *heads = (session(model) for model in models.values())
    frames, features = np.zeros((1, 1, 76, 32), "float32"), np.zeros((1, 16, 24), "float32")
    answers: dict[str, np.ndarray] = {}
    while True:
        audio = yield answers
        (newest,) = mel({"audio": audio})
        frames = np.concatenate([frames[:, :, 8:], newest[:, None]], 2)
        (feature,) = embedding({"frames": frames})
        features = np.concatenate([features[:, 1:], feature.reshape(1, 1, 24)], 1)
        answers = {name: head({"features": features})[0] for name, head in zip([*models][2:], heads, strict=True)}


LINKS = {"chains": ["frames=mel:mel[10]", "features=embedding:0[16]"]}


def test_wake_words() -> None:
    """A spectrogram, an embedding over its last rows, and heads that read one window of embeddings."""
    models = streaming_networks.wake_words()
    runner = compiled(models, **LINKS)
    assert [i.name for i in runner.inputs] == ["audio"]
    assert len(runner.states) == 2 and runner.tasks == ["first", "second"]
    hand: Any = pipeline_by_hand(models)
    next(hand)
    rng = np.random.default_rng(0)
    got: dict[str, list[np.ndarray]] = {"first": [], "second": []}
    want: dict[str, list[np.ndarray]] = {"first": [], "second": []}
    for step in range(STEPS):
        audio = (np.sin(step / 9) * rng.standard_normal((1, 1, 640))).astype("float32")
        for name, answer in runner.run({"audio": audio}).items():
            got[name].append(answer)
        for name, answer in hand.send(audio).items():
            want[name].append(answer)
    for name in want:
        close(got[name], want[name])


def test_denoiser_of_four_networks() -> None:
    """Transform, mask, inverse transform and a learned filter: two of them with states of one name."""
    models = streaming_networks.denoiser()
    chains = ["mask.frame=transform:magnitude", "real=transform:real", "imaginary=transform:imaginary"]
    chains += [f"inverse.mask=mask:{models['mask'].graph.output[0].name}", "learned.frame=inverse:frame"]
    states = [f"{task}.state={models[task].graph.output[1].name}" for task in ("mask", "learned")]
    runner = compiled(models, chains=chains, states=states)
    transform, mask, inverse, learned = map(session, models.values())
    theirs = [np.zeros(state.shape, "float32") for state in runner.states]
    rng = np.random.default_rng(0)
    got, want = [], []
    for _ in range(STEPS):
        frame = rng.standard_normal((1, 1, 512)).astype("float32")
        got.append(runner.run({"frame": frame})["learned"])
        real, imaginary, magnitude = transform({"frame": frame})
        factors, theirs[0] = mask({"frame": magnitude, "state": theirs[0]})
        (masked,) = inverse({"mask": factors, "real": real, "imaginary": imaginary})
        result, theirs[1] = learned({"frame": masked, "state": theirs[1]})
        want.append(result)
    close(got, want)


def test_a_user_may_write_into_what_came_out() -> None:
    """What is kept is nobody else's, also where an output is the same values as a state."""
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node("Add", ["x", "h"], ["sum"]),
            onnx.helper.make_node("Reshape", ["sum", "flat"], ["y"]),
            onnx.helper.make_node("Identity", ["sum"], ["next"]),
            onnx.helper.make_node("Identity", ["x"], ["delayed"]),
            onnx.helper.make_node("Add", ["before", "x"], ["z"]),
        ],
        "g",
        [onnx.helper.make_tensor_value_info(name, 1, [1, 64]) for name in ("x", "h", "before")],
        [onnx.helper.make_tensor_value_info(n, 1, s) for n, s in (("y", [64]), ("next", [1, 64]), ("z", [1, 64]))]
        + [onnx.helper.make_tensor_value_info("delayed", 1, [1, 64])],
        [onnx.numpy_helper.from_array(np.array([64]), "flat")],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9)
    runner = compiled({"t": model}, states=["h=next", "before=delayed"])
    assert [o.name for o in runner.outputs] == ["y", "z"]
    for _ in range(2):
        total, before = np.zeros((1, 64), "float32"), np.zeros((1, 64), "float32")
        for step in range(6):
            x = np.full((1, 64), step + 1, "float32")
            answer: Any = runner.run({"x": x})["t"]
            total += x
            np.testing.assert_array_equal(answer["y"], total.ravel())
            np.testing.assert_array_equal(answer["z"], before + x)
            before = x.copy()
            x[:] = answer["y"][:] = answer["z"][:] = 99
        runner.reset()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the wake words in int8, calibrated on a stream, and ``audio.npy`` with 20 calls beside it."""
    folder = tmp_path_factory.mktemp("wake")
    for name, model in streaming_networks.wake_words().items():
        onnx.save(model, folder / f"{name}.onnx")
    loudness = np.sin(np.arange(20) / 3)[:, None, None]
    audio = (loudness * np.random.default_rng(1).standard_normal((20, 1, 640))).astype("float32")
    np.savez(folder / "calibration.npz", audio=audio)
    np.save(folder / "audio.npy", audio[:, None])
    models = [str(folder / f"{name}.onnx") for name in streaming_networks.wake_words()]
    chains = [word for chain in LINKS["chains"] for word in ("--chain", chain)]
    options = ["--quantize", "int8", "--calibration", str(folder / "calibration.npz"), "-o", str(folder / "out")]
    assert cli.run(["compile", *models, *chains, *options]) == 0
    return folder


def test_bundle_and_command_line(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All calls at once on the command line are the calls one by one; int8 stays near float32."""
    network = nnfuze_tvm.Bundle.load(bundle / "out")
    assert [state.name for state in network.states] == ["mel.mel.last", "embedding.embedding.last"]
    audio = np.load(bundle / "audio.npy")
    given = [str(word) for word in ("--input", f"audio={bundle / 'audio.npy'}", "-o", bundle / "answers")]
    assert cli.run(["run", str(bundle / "out"), *given]) == 0
    stream = network.stream()
    answers = [stream.run({"audio": call}) for call in audio]
    hand: Any = pipeline_by_hand(streaming_networks.wake_words())
    next(hand)
    exact = [hand.send(call) for call in audio]
    for task in ("first", "second"):
        one_by_one = np.stack([answer[task] for answer in answers])
        np.testing.assert_array_equal(np.load(bundle / f"answers/{task}.npy"), one_by_one)
        floats = np.stack([answer[task] for answer in exact])
        assert np.abs(one_by_one - floats).max() < 0.1 * np.ptp(floats)
    capsys.readouterr()
    assert cli.run(["inspect", str(bundle / "out")]) == 0
    assert "state        mel.mel.last [68, 32] float32" in capsys.readouterr().out


def test_inputs_of_different_length(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(bundle / "none.npy", np.zeros((0, 1, 1, 640), "float32"))
    assert cli.run(["run", str(bundle / "out"), "--input", f"audio={bundle / 'none.npy'}"]) == 2
    assert "no inference in audio" in capsys.readouterr().err
