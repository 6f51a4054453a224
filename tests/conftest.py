"""What all tests have in common: repeatable examples, slow tests on request, nothing of who starts them."""

from __future__ import annotations

import os
import signal

import pytest
from hypothesis import HealthCheck, settings

from tests import own_secret  # noqa: F401

# The same few examples every time, and a slow machine is no failure.
settings.register_profile(
    "repeatable",
    derandomize=True,
    deadline=None,
    max_examples=20,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("thorough", settings.get_profile("repeatable"), max_examples=100)
settings.load_profile("repeatable")

# A shell's background jobs ignore interrupts, and whatever they start does, too; some tests interrupt what they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

# What changes how many threads kernels get, and how output looks.
for name in ("COLUMNS", "FORCE_COLOR", "LINES", "NO_COLOR", "OMP_NUM_THREADS", "TVM_BIND_THREADS", "TVM_NUM_THREADS"):
    os.environ.pop(name, None)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="also the tests that are slow and find little more")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--all"):
        settings.load_profile("thorough")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--all"):
        slow = {item for item in items if item.get_closest_marker("slow")}
        config.hook.pytest_deselected(items=list(slow))
        items[:] = [item for item in items if item not in slow]
