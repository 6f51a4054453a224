import json
import os

import pytest

from nnfuze_tvm.errors import PolicyError
from nnfuze_tvm.graph import Lineage
from nnfuze_tvm.passes.compress.policy import LayerPolicy, Policy


def write(tmp_path, text):
    path = tmp_path / "policy.json"
    path.write_text(text if isinstance(text, str) else json.dumps(text))
    return path


def test_load_and_look_up(tmp_path):
    path = write(
        tmp_path,
        {
            "default": {"keep": 0.5, "bits": 8},
            "layers": {
                "kw/conv1": {"keep": 0.75},
                "kw/*": {"bits": 32},
                "kw/l[12]": {"keep": 1, "bits": None},
            },
        },
    )
    policy = Policy.load(path)
    assert policy.for_layer("kw/conv1") == LayerPolicy(keep=0.75, bits=32)
    assert policy.for_layer("kw/l1") == LayerPolicy(keep=1.0, bits=32)
    assert policy.for_layer("speaker/x") == LayerPolicy(keep=0.5, bits=8)
    assert policy.states("kw/conv1", "keep") and not policy.states("kw/other", "keep")


def test_exact_name_beats_pattern_and_later_pattern_beats_earlier():
    policy = Policy.parse({"layers": {"a/b": {"keep": 0.5}, "a/*": {"keep": 0.25}, "*/b*": {"keep": 0.125}}})
    assert policy.for_layer("a/b").keep == 0.5
    assert policy.for_layer("a/bb").keep == 0.125
    assert policy.for_layer("a/c").keep == 0.25


def test_alias_largest_wins():
    policy = Policy.parse({"default": {"keep": 0.1}, "layers": {"b/conv": {"keep": 0.5}, "c/conv": {"keep": 0.7}}})
    lineage = Lineage(aliases={"b/conv": "a/conv", "c/conv": "a/conv"})
    assert policy.for_layer("a/conv", lineage).keep == 0.7
    assert policy.for_layer("a/conv").keep == 0.1
    policy.validate_layers(["a/conv"], lineage)


@pytest.mark.parametrize("layer_count", [0, 2])
def test_save_round_trip_is_atomic_and_readable(tmp_path, layer_count):
    policy = Policy.parse(
        {
            "default": {"keep": 0.5, "bits": 8},
            "layers": {f"a/l{i}": {"keep": 0.3} for i in range(layer_count)},
        }
    )
    path = tmp_path / "out.json"
    path.write_text("old")
    policy.save(path)
    assert Policy.load(path) == policy
    assert os.listdir(tmp_path) == ["out.json"]
    assert path.stat().st_mode & 0o400


def test_save_into_missing_directory(tmp_path):
    with pytest.raises(PolicyError, match="can't write"):
        Policy().save(tmp_path / "nowhere" / "policy.json")


def test_uniform():
    policy = Policy.uniform(keep=0.75, bits=8)
    assert policy.for_layer("anything") == LayerPolicy(keep=0.75, bits=8)
    assert Policy.uniform().for_layer("anything") == LayerPolicy(keep=1.0, bits=32)
    with pytest.raises(PolicyError, match=r"default\.keep"):
        Policy.uniform(keep=0)


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ("{", "not valid JSON"),
        ('{"layers": {"a": {}, "a": {}}}', "'a' is there twice"),
        ("[]", "must be a JSON object"),
        ("null", "must be a JSON object"),
        ({"layer": {}}, "unknown field 'layer'"),
        ({"layers": {"a/b": {"kep": 1}}}, r"unknown field 'layers\.a/b\.kep'"),
        ({"layers": {"a": {"keep": 0}}}, r"layers\.a\.keep"),
        ({"layers": {"a": {"keep": -1}}}, r"layers\.a\.keep"),
        ({"layers": {"a": {"keep": 1.01}}}, r"layers\.a\.keep"),
        ({"layers": {"a": {"keep": "0.5"}}}, r"layers\.a\.keep"),
        ({"layers": {"a": {"keep": True}}}, r"layers\.a\.keep"),
        ('{"default": {"keep": NaN}}', r"default\.keep"),
        ({"default": {"bits": 4}}, r"default\.bits"),
        ({"default": {"bits": 12}}, r"default\.bits"),
        ({"layers": {"a": 3}}, r"layers\.a"),
        ({"layers": []}, "layers"),
    ],
)
def test_bad_documents(tmp_path, document, said):
    path = write(tmp_path, document)
    with pytest.raises(PolicyError, match=said) as caught:
        Policy.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_and_binary_file(tmp_path):
    with pytest.raises(PolicyError, match="No such file"):
        Policy.load(tmp_path / "absent.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PolicyError, match="UTF-8"):
        Policy.load(tmp_path / "binary.json")


def test_unknown_layers():
    known = ["kw/conv1", "kw/conv2", "speaker/fc"]
    Policy.parse({"layers": {"kw/*": {"keep": 0.5}, "speaker/fc": {}}}).validate_layers(known)
    with pytest.raises(PolicyError, match=r"my\.json: unknown layer 'kw/conv_1'; nearest: kw/conv1"):
        Policy.parse({"layers": {"kw/conv_1": {}}}, source="my.json").validate_layers(known)
    with pytest.raises(PolicyError, match=r"no layer matches the pattern 'kv/\*'"):
        Policy.parse({"layers": {"kv/*": {}}}).validate_layers(known)
    with pytest.raises(PolicyError, match="no layers"):
        Policy.parse({"layers": {"x": {}}}).validate_layers([])
