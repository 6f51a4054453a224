"""``python -m tests.hostile [PATTERN …]``: run the cases whose names hold a pattern, and print how they end."""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import onnx

from tests.hostile import arrays, documents, doors, harness, networks, options
from tests.hostile.harness import Case
from tests.tiny_networks import classifier


def all_cases(folder: Path) -> Iterator[Case]:
    """Make all input files below a folder, and give the cases that read them."""
    from nnfuze_tvm import cli

    model, bundle = folder / "net.onnx", folder / "bundle"
    onnx.save(classifier(), model)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        assert cli.run(["compile", str(model), "-o", str(bundle), "--no-compare"]) == 0
    for kind in (arrays, networks, documents, options, doors):
        place = folder / kind.__name__.rpartition(".")[2]
        place.mkdir()
        yield from kind.cases(place, bundle, model)


def main() -> None:
    """Run cases."""
    parser = argparse.ArgumentParser()
    parser.add_argument("patterns", nargs="*")
    parser.add_argument("--part", default="0-0/1", help="which of so many: 0-2/8 is three cases of eight")
    parser.add_argument("--verbose", action="store_true", help="print those that end well, too")
    given = parser.parse_args()
    harness.import_everything()
    with tempfile.TemporaryDirectory(prefix="hostile-") as folder:
        found = all_cases(Path(folder))
        chosen = [case for case in found if not given.patterns or any(word in case.name for word in given.patterns)]
        first, last, parts = map(int, re.split("[-/]", given.part))
        chosen = [case for number, case in enumerate(chosen) if first <= number % parts <= last]
        faults, seconds = 0, 0.0
        for outcome in harness.run(chosen, Path(folder)):
            faults += bool(outcome.faults)
            seconds += outcome.seconds
            if outcome.faults or given.verbose:
                print(f"{outcome.case.name!a} ({outcome.seconds:.1f} s): {'; '.join(outcome.faults) or 'fine'}")
                lines = [line for line in outcome.errors.splitlines() if not line.startswith("nnfuze: ")]
                print("   ", "\n    ".join(ascii(line)[:400] for line in lines[-3:]), flush=True)
        print(f"{len(chosen)} cases, {faults} with faults, {seconds:.0f} s of processor time")
    sys.exit(faults > 0)


main()
