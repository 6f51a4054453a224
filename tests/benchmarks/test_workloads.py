import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from benchmarks import networks
from benchmarks.workloads import kept, workload
from nnfuze_tvm.errors import InputError, ModelError


def weights(path) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


def test_a_network_gets_a_batch_of_one_and_separate_inputs(tmp_path):
    work = workload("mlp_autoencoder", tmp_path)
    (path,) = work.models
    value = onnx.load(path).graph.input[0]
    assert [dim.dim_value for dim in value.type.tensor_type.shape.dim] == [1, 640]
    calibration = work.calibration[0]["features"]
    assert calibration.shape == (32, 640)
    assert {sample[0]["features"].shape for sample in work.evaluation} == {(1, 640)}
    seen = {row.tobytes() for row in calibration}
    assert not any(sample[0]["features"][0].tobytes() in seen for sample in work.evaluation)


def test_a_network_named_twice_is_a_pair_with_a_common_trunk(tmp_path):
    work = workload("ds_cnn+ds_cnn", tmp_path)
    one, other = map(weights, work.models)
    differing = {name for name in one if not np.array_equal(one[name], other[name])}
    assert differing == {"head.weight", "head.bias"}


def test_networks_of_different_names_stay_themselves(tmp_path):
    work = workload("ds_cnn+mlp_autoencoder", tmp_path)
    assert [set(feed) for feed in work.evaluation[0]] == [{"audio"}, {"features"}]
    for name, path in zip(("ds_cnn", "mlp_autoencoder"), work.models, strict=True):
        expected = networks.build(name)
        for tensor in expected.graph.initializer:
            assert np.array_equal(weights(path)[tensor.name], numpy_helper.to_array(tensor))


def test_a_file_is_the_same_workload_as_long_as_its_content_is(tmp_path):
    file = tmp_path / "net.onnx"
    onnx.save(networks.build("mlp_autoencoder"), file)
    first = workload(str(file), tmp_path / "work")
    assert workload(str(file), tmp_path / "work").directory == first.directory
    onnx.save(networks.build("mlp_autoencoder", seed=1), file)
    assert workload(str(file), tmp_path / "work").directory != first.directory


def test_unknown_names_and_broken_files_are_one_clear_line(tmp_path):
    with pytest.raises(InputError, match=r"resnet9: no such network or file; there are ds_cnn"):
        workload("resnet9", tmp_path)
    file = tmp_path / "net.onnx"
    file.write_bytes(b"\xff\xff")
    with pytest.raises(ModelError, match=r"net.onnx: can't be read as ONNX"):
        workload(str(file), tmp_path)


def test_a_dynamic_shape_is_refused(tmp_path):
    model = networks.build("resnet8")
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "height"
    file = tmp_path / "net.onnx"
    onnx.save(model, file)
    with pytest.raises(ModelError, match=r"input 'image' is not a float32 tensor \[1, ...\] of static shape"):
        workload(str(file), tmp_path)


def test_what_fails_half_way_is_not_kept(tmp_path):
    def half(folder):
        (folder / "part").write_text("x")
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        kept(tmp_path / "made", half)
    assert list(tmp_path.iterdir()) == []
    made = kept(tmp_path / "made", lambda folder: (folder / "whole").write_text("x"))
    assert kept(made, half) == made
    assert [file.name for file in made.iterdir()] == ["whole"]
