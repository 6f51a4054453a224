"""The compression methods' options as the command line takes them.

The methods are passes, so knowing their options means importing TVM, which takes seconds. ``--help`` and a mistyped
option shall not wait for it: what the methods' files declare is kept in the user's cache, and is read anew when one of
these files has changed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import tempfile
import typing
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

_PIPELINE = "nnfuze_tvm.passes.pipeline"
_PASSES = Path(__file__).parent.parent / "passes"
_TYPES: dict[str, type] = {"str": str, "int": int, "float": float, "bool": bool}


@dataclass(frozen=True)
class MethodOption:
    """An option: its name in Python, the type that its text becomes, and what ``--help`` says."""

    name: str
    type: str
    default: Any
    help: str
    metavar: str | None

    @property
    def python_type(self) -> Any:
        """The type of its value, which may be None."""
        return _TYPES[self.type] | None


def method_options() -> list[MethodOption]:
    """Return the options that the methods bring; that a value is allowed is the request's to check."""
    if _PIPELINE in sys.modules:
        # Methods may have been added since.
        return _declared()
    path = _cache()
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        found = [MethodOption(**fields) for fields in json.loads(path.read_text(encoding="utf-8"))]
        if all(option.python_type for option in found):
            return found
    options = _declared()
    with contextlib.suppress(OSError, TypeError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as file:
            json.dump([asdict(option) for option in options], file)
        os.replace(file.name, path)
    return options


def _declared() -> list[MethodOption]:
    from nnfuze_tvm.passes import pipeline
    from nnfuze_tvm.passes.compress import method_settings

    return [
        MethodOption(option.name, _plain(option.type), option.default, option.help, option.metavar)
        for option in method_settings.options(pipeline.METHODS).values()
    ]


def _plain(kind: Any) -> str:
    while typing.get_origin(kind) is Annotated:
        kind = typing.get_args(kind)[0]
    kind = type(typing.get_args(kind)[0]) if typing.get_origin(kind) is Literal else kind
    return str(kind.__name__)


def _cache() -> Path:
    """Return the file for what the methods' files declare as they are now."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nnfuze" / "options"
    return base / f"{_digest([_PASSES / 'pipeline.py', *sorted(_PASSES.rglob('compress/**/*.py'))])}.json"


def _digest(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for file in [Path(__file__), *files]:
        digest.update(f"{file} ".encode() + file.read_bytes())
    return digest.hexdigest()[:16]
