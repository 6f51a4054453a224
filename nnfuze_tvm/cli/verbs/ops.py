"""``nnfuze ops``: the operators, and what is done with each."""

from __future__ import annotations

import json
from dataclasses import asdict

from nnfuze_tvm.cli.console import out
from nnfuze_tvm.cli.options import AsJson

POSITION = 8
EXAMPLES = """
Examples:

[bold]nnfuze ops[/bold]
All operators as a table.

[bold]nnfuze ops --json[/bold]
The same for programs.
"""


def command(*, as_json: AsJson = False) -> None:
    """List the operators: their precisions, what pruning and merging do with them, and what schedules them."""
    from nnfuze_tvm.analysis.operators import operators

    records = operators()
    if as_json:
        print(json.dumps([asdict(record) for record in records], indent=1))
        return
    from nnfuze_tvm.report.operators import render_operators

    for part in render_operators(records):
        out().print(part, highlight=False)
