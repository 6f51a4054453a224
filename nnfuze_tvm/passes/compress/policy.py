"""The compression policy: what is pruned and quantized, layer by layer, as one small JSON document.

::

    {"default": {"keep": 1.0, "bits": 32},
     "layers": {"keyword/conv1": {"keep": 0.75, "bits": 8}, "speaker/layer1.*": {"bits": 8}}}

Everything that compresses reads a policy, everything that searches writes one.
"""

from __future__ import annotations

import difflib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError

from nnfuze_tvm.errors import PolicyError


class LayerPolicy(BaseModel):
    """What happens to one layer.

    Parameters
    ----------
    keep : float
        Fraction of the layer's output channels that stays, in (0, 1].
    bits : int
        8 for int8 weights and activations, 16 for float16, 32 for float32.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    keep: Annotated[float, Field(gt=0, le=1, strict=True, allow_inf_nan=False)] = 1.0
    bits: Literal[8, 16, 32] = 32


class LayerOverride(BaseModel):
    """What the document says of one layer or pattern; None means "as the default"."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    keep: Annotated[float, Field(gt=0, le=1, strict=True, allow_inf_nan=False)] | None = None
    bits: Literal[8, 16, 32] | None = None


class Policy(BaseModel):
    """Per-layer compression, by layer name or by pattern (``*``, ``?``, ``[...]`` as in a shell).

    An exact name goes before patterns; of several patterns that match, the one written last decides. Each
    field is looked up on its own, so a pattern may state ``bits`` and the exact name ``keep``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    default: LayerPolicy = LayerPolicy()
    layers: dict[str, LayerOverride] = {}
    # Where the document came from, for messages; no part of what the policy says.
    _source: str = PrivateAttr("policy")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Policy) and (self.default, self.layers) == (other.default, other.layers)

    @classmethod
    def uniform(cls, keep: float = 1.0, bits: int = 32) -> Policy:
        """Return the policy that treats every layer alike."""
        return cls.parse({"default": {"keep": keep, "bits": bits}})

    @classmethod
    def parse(cls, document: Any, source: str = "policy") -> Policy:
        """Return the policy that ``document`` (what ``json.load`` gives) describes.

        Parameters
        ----------
        document : Any
            The parsed JSON.
        source : str
            Where it came from, for messages.

        Raises
        ------
        PolicyError
            With one line that names the source, the field and what is wrong with it.
        """
        try:
            policy = cls.model_validate(document)
        except ValidationError as error:
            raise PolicyError(f"{source}: {_first_complaint(error)}") from None
        policy._source = source
        return policy

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Policy:
        """Read a policy file.

        Raises
        ------
        PolicyError
            If the file can't be read, is no JSON or is no policy.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise PolicyError(f"{path}: can't read the policy: {error.strerror}") from None
        except UnicodeDecodeError:
            raise PolicyError(f"{path}: the policy is not UTF-8 text") from None
        try:
            document = json.loads(text, object_pairs_hook=_unique_keys)
        except json.JSONDecodeError as error:
            raise PolicyError(
                f"{path}: not valid JSON: {error.msg} in line {error.lineno}, column {error.colno}"
            ) from None
        except (ValueError, RecursionError) as error:
            raise PolicyError(f"{path}: not valid JSON: {error}") from None
        return cls.parse(document, str(path))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the policy, all of it or nothing.

        Raises
        ------
        PolicyError
            If the directory can't be written.
        """
        target = Path(path)
        text = json.dumps(self.model_dump(exclude_none=True), indent=2) + "\n"
        temporary = None
        try:
            with tempfile.NamedTemporaryFile(
                "w", encoding="utf-8", dir=target.parent, prefix=f".{target.name}.", delete=False
            ) as file:
                temporary = file.name
                file.write(text)
            # mkstemp makes the file private; a policy is as readable as any other file the user writes.
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(temporary, 0o666 & ~umask)
            os.replace(temporary, target)
        except OSError as error:
            if temporary is not None:
                Path(temporary).unlink(missing_ok=True)
            raise PolicyError(f"{path}: can't write the policy: {error.strerror}") from None

    def for_layer(self, name: str, aliases: Mapping[str, str] | None = None) -> LayerPolicy:
        """Return what happens to the layer ``name``.

        Parameters
        ----------
        name : str
            The layer's name in the module.
        aliases : Mapping[str, str] | None
            Names that a merge dropped → the name of the layer that does their work now (``ir.aliases``).
            Where the document speaks of several names of one layer, the largest ``keep`` and ``bits`` count.
        """
        keep = self._stated(name, "keep", aliases)
        bits = self._stated(name, "bits", aliases)
        return LayerPolicy(
            keep=self.default.keep if keep is None else keep, bits=self.default.bits if bits is None else bits
        )

    def states_keep(self, name: str, aliases: Mapping[str, str] | None = None) -> bool:
        """Return whether the document gives the layer a ``keep`` of its own, not just the default."""
        return self._stated(name, "keep", aliases) is not None

    def validate_layers(self, known: Iterable[str], aliases: Mapping[str, str] | None = None) -> None:
        """Check that every name and pattern of the document means at least one layer.

        Raises
        ------
        PolicyError
            With one line that names the unknown layer, the known names nearest to it, and the file.
        """
        names = list(dict.fromkeys([*known, *(aliases or {})]))
        for entry in self.layers:
            if entry not in names and not any(fnmatchcase(name, entry) for name in names):
                near = difflib.get_close_matches(entry, names, n=3, cutoff=0.4) or names[:3]
                hint = f"nearest: {', '.join(near)}" if near else "the network has no layers"
                what = "no layer matches the pattern" if _is_pattern(entry) else "unknown layer"
                raise PolicyError(f"{self._source}: {what} {entry!r}; {hint}")

    def _stated(self, name: str, field: str, aliases: Mapping[str, str] | None) -> Any:
        values = [
            value
            for alias in [name, *(old for old, new in (aliases or {}).items() if new == name)]
            if (value := next(self._matches(alias, field), None)) is not None
        ]
        return max(values, default=None)

    def _matches(self, name: str, field: str) -> Iterator[Any]:
        exact = self.layers.get(name)
        patterns = [v for k, v in self.layers.items() if k != name and _is_pattern(k) and fnmatchcase(name, k)]
        for override in [*([exact] if exact is not None else []), *reversed(patterns)]:
            value = getattr(override, field)
            if value is not None:
                yield value


def _is_pattern(name: str) -> bool:
    # Layer names hold none of these characters (ir.clean_name).
    return any(c in name for c in "*?[")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse what ``json`` lets pass: of two entries for one layer the first would be ignored in silence."""
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key {key!r} is there twice")
        result[key] = value
    return result


def _first_complaint(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"unknown field {where!r}"
    if where == "":
        return "the policy must be a JSON object"
    message = first["msg"].replace("Input should", "should")
    return f"field {where!r} {message[0].lower()}{message[1:]}, not {first['input']!r:.60}"
