"""What a policy may say, by the methods that there are."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from nnfuze_tvm.errors import PolicyError
from nnfuze_tvm.passes.compress.method import Method, PolicyField, Precision, find_precision, policy_fields, precisions

_PRECISION = ("weights", "activations", "format")


@dataclass(frozen=True)
class Schema:
    """What policies may say where there are certain methods.

    Attributes
    ----------
    fields
        The fields by name, without ``bits``.
    precisions
        What layers can compute in.
    entry, document
        What pydantic checks what is said of a layer by, and a whole policy.
    """

    fields: Mapping[str, PolicyField]
    precisions: Sequence[Precision]
    entry: type[BaseModel]
    document: type[BaseModel]

    @property
    def defaults(self) -> dict[str, Any]:
        """The values of fields of which nothing is stated."""
        return {name: field.default for name, field in self.fields.items()}

    def expanded(self, entry: Mapping[str, Any], where: str = "") -> dict[str, Any]:
        """Return an entry with ``bits`` spelled out; its format is None, which means the usual one."""
        if entry.get("bits") is None:
            return dict(entry)
        bits = entry["bits"]
        usual = find_precision(self.precisions, bits, bits)
        assert usual is not None
        for field in _PRECISION:
            if entry.get(field) not in (None, getattr(usual, field)):
                raise PolicyError(
                    f"field {'.'.join(filter(None, [where, field]))!r} is {entry[field]!r}, but bits {bits} means "
                    f"{getattr(usual, field)!r}; state one of them"
                )
        rest = {field: value for field, value in entry.items() if field != "bits"}
        return {**rest, "weights": bits, "activations": bits, "format": None}

    def precision(self, values: Mapping[str, Any]) -> Precision:
        """Return what a layer with these values computes in.

        Raises
        ------
        PolicyError
            If no method takes them together.
        """
        found = find_precision(self.precisions, *(values[field] for field in _PRECISION))
        if found is None:
            format = f" ({values['format']})" if values["format"] else ""
            raise PolicyError(
                f"weights {values['weights']} with activations {values['activations']}{format}: no method takes them; "
                f"there are {'; '.join(map(str, self.precisions))}"
            )
        return found


@functools.lru_cache(maxsize=8)
def schema_of(methods: tuple[Method, ...]) -> Schema:
    """Return what policies may say where there are these methods."""
    fields, known = policy_fields(methods), precisions(methods)
    types = {name: field.type for name, field in fields.items()}
    types["bits"] = Literal[tuple(dict.fromkeys(p.weights for p in known if p.weights == p.activations))]
    entry = _model("LayerPolicy", {name: (type, None) for name, type in types.items()})
    override: Any = _model("LayerOverride", {name: (type | None, None) for name, type in types.items()})
    document = _model("Policy", {"default": (entry, {}), "layers": (dict[str, override], {})})
    return Schema(fields, known, entry, document)


def _model(name: str, fields: dict[str, Any]) -> Any:
    return create_model(name, __config__=ConfigDict(extra="forbid"), **fields)


def complaint(error: ValidationError, fields: Iterable[str]) -> str:
    """Return the first thing that pydantic says of a policy, as one line; ``fields`` are what it may say of a layer."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = [*(("default", "layers") if len(first["loc"]) == 1 else ()), *fields, "bits"]
        near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
        return f"unknown field {where!r}; {hint}"
    if where == "":
        return "the policy must be a JSON object"
    if first["type"] == "literal_error" and first["loc"][-1] in (*_PRECISION, "bits"):
        there = first["ctx"]["expected"].replace(" or ", " and ")
        return f"field {where!r} {first['input']!r:.60}: no method takes it; there are {there}"
    message = first["msg"].replace("Input should", "should")
    return f"field {where!r} {message[0].lower()}{message[1:]}, not {first['input']!r:.60}"
