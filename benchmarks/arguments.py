"""What the benchmarks' command lines have in common."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from rich.console import Console


def parser_of(program: str, about: str | None) -> argparse.ArgumentParser:
    """Return the parser of a module's command line, which its docstring describes: the rest of it stands at the end."""
    assert about
    summary, _, more = about.partition("\n\n")
    form = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(program, description=summary, epilog=more, formatter_class=form)


def names(known: Sequence[str] = ()) -> Callable[[str], list[str]]:
    """Return a parser of ``a,b,c``, names that must be among ``known`` if that is given."""

    def parse(value: str) -> list[str]:
        found = [name.strip() for name in value.split(",")]
        for name in found:
            if not name or (known and name not in known):
                raise argparse.ArgumentTypeError(f"{name!r}: use {', '.join(known)}" if known else "an empty name")
        return list(dict.fromkeys(found))

    return parse


def at_least(least: int) -> Callable[[str], int]:
    """Return a parser of whole numbers from ``least`` on."""

    def parse(value: str) -> int:
        try:
            number = int(value)
        except ValueError:
            number = least - 1
        if number < least:
            raise argparse.ArgumentTypeError(f"{value!r}: give a whole number from {least}")
        return number

    return parse


def output_console() -> Console:
    """Return where tables go; where nothing is known about the width (a file, a pipe), nothing is cut off."""
    return Console() if sys.stdout.isatty() or "COLUMNS" in os.environ else Console(width=200)
