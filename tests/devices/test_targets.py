"""Targets as JSON objects: those that LLVM would crash on, or make something else of, end in one line."""

from __future__ import annotations

import json

import pytest

from nnfuze_tvm.devices.targets import NAMED, llvm_features, resolve
from nnfuze_tvm.errors import DeviceError


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"kind": "cuda"}, "its kind is 'cuda'; use llvm"),
        ({}, "its kind is None; use llvm"),
        ({"kind": "llvm", "mtriple": "zz"}, "LLVM has no architecture 'zz'"),
        ({"kind": "llvm", "mtriple": "bogus-linux-gnu"}, "LLVM has no architecture 'bogus'"),
        ({"kind": "llvm", "mtriple": 7}, "mtriple is text"),
        ({"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": "cortex-b72"}, "knows no mcpu 'cortex-b72'"),
        ({"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mattr": ["+avx2"]}, "knows no feature 'avx2'"),
        ({"kind": "llvm", "num-cores": 0}, "num-cores is 0; use 1 to 4096"),
        ({"kind": "llvm", "opt-level": "fast"}, "opt-level is 'fast'; use 0 to 3"),
        ({"kind": "llvm", "no-such": 1}, "not a TVM target"),
    ],
)
def test_refused(fields: dict, line: str) -> None:
    with pytest.raises(DeviceError, match=line) as caught:
        resolve(json.dumps(fields))
    assert len(str(caught.value).splitlines()) == 1


def test_not_json() -> None:
    with pytest.raises(DeviceError, match="not a TVM target"):
        resolve('{"kind": ')


@pytest.mark.parametrize("name", NAMED)
def test_named_targets_as_json(name: str) -> None:
    assert llvm_features(resolve(json.dumps(NAMED[name]))) == llvm_features(resolve(name))
