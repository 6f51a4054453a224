"""What a policy means, as a table."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from nnfuze_tvm.jobs.policies import LayerFacts, telling


def render_policy(facts: Sequence[LayerFacts]) -> Table:
    """Return a table with a row for each layer: its cost as it is, and what is done to any of them."""
    table = Table()
    table.add_column("layer", overflow="fold")
    fields = telling(facts)
    for title in ("MACs", "KB", "channels", *fields):
        table.add_column(title, justify="right")
    for each in facts:
        stays = "–" if each.channels is None else "{} of {}".format(*each.channels)
        said = [each.values[name] for name in fields]
        values = [f"{value:g}" if isinstance(value, float) else str(value) for value in said]
        table.add_row(each.name, f"{each.macs / 1e6:.3g} M", f"{each.bytes / 1e3:.3g}", stays, *values)
    return table
