import json
import os

import pytest

from nnfuze_tvm.errors import PolicyError
from nnfuze_tvm.graph import Lineage
from nnfuze_tvm.passes.compress.method import Precision
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
        ({"layer": {}}, "unknown field 'layer'; did you mean 'layers'"),
        ({"layers": {"a/b": {"kep": 1}}}, r"unknown field 'layers\.a/b\.kep'; did you mean 'keep'"),
        ({"layers": {"a": {"keep": 0}}}, r"layers\.a\.keep"),
        ({"layers": {"a": {"keep": -1}}}, r"layers\.a\.keep"),
        ({"layers": {"a": {"keep": 1.01}}}, r"layers\.a\.keep"),
        ({"layers": {"a": {"keep": "0.5"}}}, r"layers\.a\.keep"),
        ({"layers": {"a": {"keep": True}}}, r"layers\.a\.keep"),
        ('{"default": {"keep": NaN}}', r"default\.keep"),
        ({"default": {"bits": 4}}, r"'default\.bits' 4: no method takes it; there are 8, 16 and 32"),
        ({"default": {"bits": 12}}, r"default\.bits"),
        ({"layers": {"a": {"weights": 5}}}, r"'layers\.a\.weights' 5: no method takes it; there are 4, 8, 16 and 32"),
        ({"layers": {"a": {"format": "posit"}}}, r"'layers\.a\.format' 'posit': no method takes it; there are 'int'"),
        ({"layers": {"a": {"weights": True}}}, r"layers\.a\.weights"),
        ({"default": {"activations": None}}, r"default\.activations"),
        ({"layers": {"a": {"bits": 8, "weights": 16}}}, r"'layers\.a\.weights' is 16, but bits 8 means 8"),
        ({"default": {"bits": 16, "format": "int"}}, r"'default\.format' is 'int', but bits 16 means 'float'"),
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


INT8, FLOAT16, FLOAT32 = Precision(8, 8, "int"), Precision(16, 16, "float"), Precision(32, 32, "float")


@pytest.mark.parametrize(
    ("entry", "precision"),
    [
        ({"bits": 8}, INT8),
        ({"weights": 8, "activations": 8}, INT8),
        ({"weights": 8, "activations": 8, "format": "int"}, INT8),
        ({"bits": 8, "weights": 8, "format": "int"}, INT8),
        ({"bits": 16}, FLOAT16),
        ({"weights": 16, "activations": 16}, FLOAT16),
        ({"bits": 32}, FLOAT32),
        ({}, FLOAT32),
    ],
)
def test_bits_are_short_for_weights_activations_and_format(entry, precision):
    assert Policy.parse({"default": entry}).for_layer("a/x").precision == precision
    assert Policy.parse({"layers": {"a/*": entry}}).for_layer("a/x").precision == precision
    assert LayerPolicy(**entry).precision == precision


@pytest.mark.parametrize(
    ("default", "pattern", "exact", "precision"),
    [
        # What an entry states by ``bits`` and what another states apart are the same fields.
        ({}, {"bits": 8}, {"weights": 32, "activations": 32}, FLOAT32),
        ({}, {"weights": 8, "activations": 8}, {"bits": 32}, FLOAT32),
        ({}, {"weights": 8}, {"activations": 8}, INT8),
        ({"bits": 8}, {"weights": 16}, {"activations": 16}, FLOAT16),
        # ``bits`` states the format, too: what is usual for them.
        ({"weights": 8, "activations": 8, "format": "int"}, {}, {"bits": 32}, FLOAT32),
        ({}, {"format": "int", "bits": 8}, {"bits": 16}, FLOAT16),
        ({"bits": 16}, {"bits": 8}, {"keep": 0.5}, INT8),
        ({"bits": 16}, {"bits": 8}, {"bits": None}, INT8),
    ],
)
def test_the_short_form_and_the_long_one_combine_field_by_field(default, pattern, exact, precision):
    policy = Policy.parse({"default": default, "layers": {"a/*": pattern, "a/x": exact}})
    assert policy.for_layer("a/x").precision == precision


@pytest.mark.parametrize(
    ("pattern", "exact", "said"),
    [
        ({"bits": 8}, {"weights": 32}, "weights 32 with activations 8: no method takes them; there are weights 4 with"),
        ({}, {"activations": 8}, r"weights 32 with activations 8: no method takes them"),
        ({"bits": 8}, {"format": "float"}, r"weights 8 with activations 8 \(float\): no method takes them"),
    ],
)
def test_weights_and_activations_that_no_method_takes_together(pattern, exact, said):
    policy = Policy.parse({"layers": {"a/*": pattern, "a/x": exact}}, "my.json")
    with pytest.raises(PolicyError, match=rf"^my\.json: layer 'a/x': {said}"):
        policy.validate_layers(["a/w", "a/x"])
    assert policy.for_layer("a/w")


def test_names_of_one_layer_combine():
    lineage = Lineage(aliases={"b/conv": "a/conv"})

    def precision(**entries):
        return Policy.parse({"layers": {f"{name}/conv": entry for name, entry in entries.items()}}).for_layer(
            "a/conv", lineage
        )

    assert precision(a={"bits": 8}, b={"bits": 16}).precision == FLOAT16
    assert precision(a={"weights": 8, "activations": 8, "format": "int"}, b={"bits": 32}).precision == FLOAT32
    assert precision(b={"bits": 8}).precision == INT8
    assert precision(a={"bits": 8}, b={"keep": 0.5}) == LayerPolicy(keep=0.5, bits=8)


def test_defaults_from_elsewhere_hold_where_the_document_states_nothing():
    policy = Policy.parse({"default": {"keep": 0.5}, "layers": {"a": {"bits": 32}}}, "my.json")
    wider = policy.with_default({"keep": 0.25, "weights": 8, "activations": 8, "format": None})
    assert wider.for_layer("b") == LayerPolicy(keep=0.5, bits=8)
    assert wider.for_layer("a") == LayerPolicy(keep=0.5, bits=32)
    stated = Policy.parse({"default": {"bits": 16}}).with_default({"weights": 8, "activations": 8, "format": "int"})
    assert stated.for_layer("b").precision == FLOAT16
    with pytest.raises(PolicyError, match=r"my\.json: unknown layer"):
        wider.validate_layers(["b"])


def test_a_layers_policy_names_what_is_wrong():
    with pytest.raises(PolicyError, match="unknown field 'kep'"):
        LayerPolicy(kep=1)
    with pytest.raises(PolicyError, match="'keep' should be less than or equal to 1"):
        LayerPolicy(keep=2.0)
    with pytest.raises(PolicyError, match="no method takes them"):
        LayerPolicy(activations=8)
    removed = "keep=1.0, rank=1.0, rank_error=0.0, butterfly=1.0, butterfly_error=0.0, sparsity=0.0"
    assert repr(LayerPolicy(bits=8)) == f"LayerPolicy({removed}, weights=8, activations=8, format='int')"
    assert LayerPolicy(bits=8) == LayerPolicy(weights=8, activations=8) != LayerPolicy(bits=16)
