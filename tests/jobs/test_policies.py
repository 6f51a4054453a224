"""Policies written for networks change nothing, say what layers cost, and are explained layer by layer."""

import json
from pathlib import Path

import pytest

from nnfuze_tvm.cli import run
from nnfuze_tvm.errors import InputError, PolicyError
from nnfuze_tvm.jobs.policies import explained, write_policy
from nnfuze_tvm.passes.compress.policy import Policy

SPEECH = Path("examples/speech")
MODELS = [str(SPEECH / "shared" / "keyword.onnx")]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("policy") / "policy.json"
    write_policy(MODELS, path, timed=False, calibration=str(SPEECH / "calibration.npz"))
    return path


def test_what_is_written_says_what_layers_cost_and_changes_nothing(written: Path) -> None:
    lines = written.read_text().splitlines()
    place = next(n for n, line in enumerate(lines) if '"keyword//trunk/block1/conv1/Conv"' in line)
    assert lines[place - 1].startswith(
        "    // nn.conv2d, 4.61 M MACs (24%), 37 KB, keep 0.75 loses 0.0%; keep 0.5 loses "
    )
    policy = Policy.load(written)
    assert policy == Policy(layers={name: {} for name in policy.layers})
    facts, asked = explained(MODELS, str(written))
    assert [each.name for each in facts] == list(policy.layers) and not asked


def test_the_number_of_a_bad_line_counts_comments(written: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text(written.read_text().replace('conv1/Conv": {},', 'conv1/Conv": {]', 1))
    with pytest.raises(PolicyError, match=r"broken.json: not valid JSON: .* in line 7, column"):
        Policy.load(broken)


def test_channels_that_stay_are_those_of_the_largest_keep(tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    path.write_text(json.dumps({"default": {"keep": 0.5}, "layers": {"*/block2/shortcut/Conv": {"keep": 0.75}}}))
    facts, asked = explained(MODELS, str(path))
    stays = {each.name.split("trunk/")[-1]: each.channels for each in facts}
    assert stays["block2/conv1/Conv"] == (32, 64)
    assert stays["block2/conv2/Conv"] == stays["block2/shortcut/Conv"] == (48, 64)
    assert asked == ["pruned"]


def test_the_verb(written: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["policy", "check", str(written), *MODELS]) == 0
    assert "fits 10 layers; asks for nothing" in capfd.readouterr().out
    assert run(["policy", "show", str(SPEECH / "policy.json"), *MODELS]) == 0
    assert "24 of 32" in capfd.readouterr().out
    bad = tmp_path / "bad.json"
    bad.write_text('{"layers": {"keyword//head/Gem": {"keep": 0.5}}}')
    assert run(["policy", "check", str(bad), *MODELS]) == 2
    assert "error: " in (said := capfd.readouterr().err) and "unknown layer 'keyword//head/Gem'; nearest: " in said


def test_what_is_there_is_not_replaced_unasked(written: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="exists already; use --force to replace it"):
        write_policy(MODELS, written, timed=False)
    with pytest.raises(InputError, match="a directory, not a file"):
        write_policy(MODELS, tmp_path, force=True, timed=False)
    with pytest.raises(InputError, match="is no directory that can be written"):
        write_policy(MODELS, tmp_path / "none" / "policy.json", timed=False)
