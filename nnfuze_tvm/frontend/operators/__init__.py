"""How ONNX nodes become Relax expressions where TVM's importer has no way, or a wrong one: one file per family.

A file in this folder has ``CONVERTERS``: a mapping from ONNX operators (``domain.operator`` outside the default domain)
to a `node.Converter` each. An operator without one is left to TVM's importer.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType

from nnfuze_tvm.frontend.operators.node import Converter


def _read() -> dict[str, Converter]:
    found: dict[str, Converter] = {}
    for module in sorted(info.name for info in pkgutil.iter_modules(__path__)):
        family = getattr(import_module(f"{__name__}.{module}"), "CONVERTERS", {})
        twice = found.keys() & family.keys()
        assert not twice, f"two families have {', '.join(sorted(twice))}"
        found.update(family)
    return found


CONVERTERS: Mapping[str, Converter] = MappingProxyType(_read())
"""All converters by operator."""
