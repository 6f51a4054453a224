"""One schedule rule per operator family: every module here with a ``RULE`` is one."""

import pkgutil
from importlib import import_module

from nnfuze_tvm.schedules.rule import Rule


def _read() -> tuple[Rule, ...]:
    modules = [import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__)]
    found: list[Rule] = [module.RULE for module in modules if hasattr(module, "RULE")]
    return tuple(sorted(found, key=lambda rule: rule.order))


RULES = _read()
"""The rules in the order in which they are asked; the last one, the fallback, takes every kernel."""
