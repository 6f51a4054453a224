"""The compression policy: what is done to which layer, as one small JSON document.

::

    {"default": {"keep": 1.0, "bits": 32},
     "layers": {"keyword/conv1": {"keep": 0.75, "weights": 8, "activations": 8}, "speaker/layer1.*": {"bits": 8}}}

Everything that compresses reads a policy, everything that searches writes one. The fields are those of the methods that
there are; ``bits`` is short for ``weights``, ``activations`` and the format that is usual for them.
"""

from __future__ import annotations

import difflib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from nnfuze_tvm.errors import PolicyError
from nnfuze_tvm.graph.ir import Lineage
from nnfuze_tvm.passes import pipeline
from nnfuze_tvm.passes.compress.method import Precision
from nnfuze_tvm.passes.compress.schema import Schema, complaint, schema_of
from nnfuze_tvm.reading.files import parse_json, read_file


class LayerPolicy:
    """What happens to one layer: an attribute for each field of a policy.

    Parameters
    ----------
    **stated
        Values of fields; those that are missing have their defaults. ``bits=8`` is short for ``weights=8`` and
        ``activations=8``.

    Attributes
    ----------
    precision : Precision
        ``weights``, ``activations`` and ``format`` together.

    Raises
    ------
    PolicyError
        If there is no such field or value, or no method takes these weights and activations together.
    """

    precision: Precision

    def __init__(self, **stated: Any) -> None:
        schema = schema_of(pipeline.METHODS)
        try:
            self.stated = schema.entry.model_validate(stated).model_dump(exclude_unset=True)
        except ValidationError as error:
            raise PolicyError(complaint(error, schema.fields)) from None
        values = {**schema.defaults, **schema.expanded(self.stated)}
        self.precision = schema.precision(values)
        self.__dict__.update(values, format=self.precision.format)

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LayerPolicy) and self._values() == other._values()

    def __repr__(self) -> str:
        return f"LayerPolicy({', '.join(f'{name}={value!r}' for name, value in self._values().items())})"

    def _values(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("stated", "precision")}


class Policy:
    """Per-layer compression, by layer name or by pattern (``*``, ``?``, ``[...]`` as in a shell).

    An exact name goes before patterns; of several patterns that match, the one written last decides. Each
    field is looked up on its own, so a pattern may state ``bits`` and the exact name ``keep``; an entry with ``bits``
    states ``weights``, ``activations`` and ``format``.

    Parameters
    ----------
    default : LayerPolicy or dict, optional
        What holds for layers of which nothing else is said.
    layers : dict, optional
        What is stated of layers, by name or pattern: dicts of fields.

    Attributes
    ----------
    default : dict
        What the document states for all layers.
    layers : dict of str to dict
        What it states of layers.

    Raises
    ------
    PolicyError
        If a field or a value is unknown.
    """

    def __init__(
        self, default: LayerPolicy | Mapping[str, Any] | None = None, layers: Mapping[str, Any] | None = None
    ) -> None:
        stated = default.stated if isinstance(default, LayerPolicy) else default
        self._read({"default": dict(stated or {}), "layers": dict(layers or {})}, "policy")

    def _read(self, document: Any, source: str) -> None:
        # Where the document came from, for messages; no part of what the policy says.
        self._source = source
        try:
            checked = self._schema.document.model_validate(document).model_dump(exclude_unset=True)
            self.default: dict[str, Any] = checked.get("default", {})
            self.layers: dict[str, dict[str, Any]] = {
                name: {field: value for field, value in entry.items() if value is not None}
                for name, entry in checked.get("layers", {}).items()
            }
            self._default = self._schema.expanded(self.default, "default")
            self._layers = {name: self._schema.expanded(entry, f"layers.{name}") for name, entry in self.layers.items()}
        except ValidationError as error:
            raise PolicyError(f"{source}: {complaint(error, self._schema.fields)}") from None
        except PolicyError as error:
            raise PolicyError(f"{source}: {error}") from None

    @property
    def _schema(self) -> Schema:
        return schema_of(pipeline.METHODS)

    def __eq__(self, other: object) -> bool:
        defaults = self._schema.defaults
        return isinstance(other, Policy) and (
            {**defaults, **self._default} == {**defaults, **other._default} and self._layers == other._layers
        )

    def __repr__(self) -> str:
        return f"Policy(default={self.default!r}, layers={self.layers!r})"

    @classmethod
    def uniform(cls, **stated: Any) -> Policy:
        """Return the policy that treats every layer alike, for example ``Policy.uniform(keep=0.75, bits=8)``."""
        return cls(default=stated)

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
        policy = cls.__new__(cls)
        policy._read(document, source)
        return policy

    def with_default(self, settings: Mapping[str, Any]) -> Policy:
        """Return a policy whose default is what `method_settings` made of options where this one states nothing."""
        default = {**settings, **self._default}
        document = {
            "default": {field: value for field, value in default.items() if value is not None},
            "layers": self.layers,
        }
        return self.parse(document, self._source)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Policy:
        """Read a policy file: JSON, and lines that begin with ``//``, which are comments.

        Raises
        ------
        PolicyError
            If the file can't be read, is no JSON or is no policy.
        """
        try:
            data = read_file(path)
        except OSError as error:
            raise PolicyError(f"{path}: can't read the policy: {error.strerror}") from None
        try:
            document = parse_json(_without_comments(data), _unique_keys)
        except UnicodeDecodeError:
            raise PolicyError(f"{path}: the policy is not UTF-8 text") from None
        except json.JSONDecodeError as error:
            raise PolicyError(
                f"{path}: not valid JSON: {error.msg} in line {error.lineno}, column {error.colno}"
            ) from None
        except ValueError as error:
            raise PolicyError(f"{path}: not valid JSON: {error}") from None
        return cls.parse(document, str(path))

    def save(self, path: str | os.PathLike[str], comments: Mapping[str, str] | None = None) -> None:
        """Write the policy, all of it or nothing.

        Parameters
        ----------
        path : path
            The file.
        comments : mapping of str to str, optional
            Lines in front of what is stated of layers, by their names.

        Raises
        ------
        PolicyError
            If the directory can't be written.
        """
        target = Path(path)
        text = self._text(comments or {})
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

    def _text(self, comments: Mapping[str, str]) -> str:
        if not comments:
            return json.dumps({"default": self.default, "layers": self.layers}, indent=2) + "\n"
        lines = [
            f"    // {comments[name]}\n" * (name in comments) + f"    {json.dumps(name)}: {json.dumps(entry)}"
            for name, entry in self.layers.items()
        ]
        return f'{{\n  "default": {json.dumps(self.default)},\n  "layers": {{\n' + ",\n".join(lines) + "\n  }\n}\n"

    def for_layer(self, name: str, lineage: Lineage | None = None) -> LayerPolicy:
        """Return what happens to the layer ``name``.

        Parameters
        ----------
        name : str
            The layer's name in the module.
        lineage : Lineage | None
            Where the module's layers come from (``graph.lineage``). A layer that a pass made obeys what is said of the
            layer it was made out of. Where the document speaks of several names of one layer, their values are
            combined field by field: the largest count, and of formats that differ none.

        Raises
        ------
        PolicyError
            If no method takes the layer's weights and activations together.
        """
        stated = {field: self._combined(name, field, lineage) for field in self._schema.fields}
        values = {field: value for field, value in {**self._default, **stated}.items() if value is not None}
        try:
            return LayerPolicy(**values)
        except PolicyError as error:
            raise PolicyError(f"{self._source}: layer {name!r}: {error}") from None

    def states(self, name: str, field: str, lineage: Lineage | None = None) -> bool:
        """Return whether the document gives the layer a value of ``field`` of its own, not just the default."""
        return bool(self._stated(name, field, lineage))

    def validate_layers(self, known: Iterable[str], lineage: Lineage | None = None) -> None:
        """Check that every name and pattern of the document means at least one layer, and what it says of each.

        Raises
        ------
        PolicyError
            With one line that names the unknown layer, the known names nearest to it, and the file; or the layer whose
            weights and activations no method takes together.
        """
        known = list(known)
        lineage = lineage or Lineage()
        dropped = [name for name in lineage.aliases if name not in lineage.origins]
        names = list(dict.fromkeys([*(own for name in known for own in lineage.names(name)), *dropped]))
        for entry in self.layers:
            if entry not in names and not any(fnmatchcase(name, entry) for name in names):
                near = difflib.get_close_matches(entry, names, n=3, cutoff=0.4) or names[:3]
                hint = f"nearest: {', '.join(near)}" if near else "the network has no layers"
                what = "no layer matches the pattern" if _is_pattern(entry) else "unknown layer"
                raise PolicyError(f"{self._source}: {what} {entry!r}; {hint}")
        for name in known:
            self.for_layer(name, lineage)

    def _combined(self, name: str, field: str, lineage: Lineage | None) -> Any:
        values = self._stated(name, field, lineage)
        return self._schema.fields[field].combine(values) if values else self._default.get(field)

    def _stated(self, name: str, field: str, lineage: Lineage | None) -> list[Any]:
        """Return what the document states of a field, for each name of a layer of which it states something."""
        names = [name] if lineage is None else lineage.names(name)
        found = (next(self._matches(own, field), _NOTHING) for own in names)
        return [value for value in found if value is not _NOTHING]

    def _matches(self, name: str, field: str) -> Iterator[Any]:
        exact = self._layers.get(name)
        patterns = [v for k, v in self._layers.items() if k != name and _is_pattern(k) and fnmatchcase(name, k)]
        for entry in [*([exact] if exact is not None else []), *reversed(patterns)]:
            if field in entry:
                yield entry[field]


# Not None, which of a format means the usual one.
_NOTHING = object()


def _without_comments(data: bytes) -> bytes:
    """Return JSON with comments made empty lines, so that the others keep their numbers."""
    return b"\n".join(b"" if line.lstrip().startswith(b"//") else line for line in data.split(b"\n"))


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
