"""States that a network has by itself, of formats that know such: ONNX files say so in their metadata."""

from __future__ import annotations

from collections.abc import Iterable

import onnx

_KEY = "nnfuze.states"


def set_states(model: onnx.ModelProto, states: Iterable[tuple[str, str]]) -> None:
    """Note which inputs are what an output was at the call before, zeros at first; names have no ``=``."""
    if text := "\n".join(f"{taken}={given}" for taken, given in states):
        model.metadata_props.add(key=_KEY, value=text)


def states_of(model: onnx.ModelProto) -> list[tuple[str, str]]:
    """Return the inputs and outputs that are states."""
    texts = [entry.value for entry in model.metadata_props if entry.key == _KEY]
    links = [line.partition("=") for text in texts for line in text.splitlines()]
    return [(taken, given) for taken, _, given in links]
