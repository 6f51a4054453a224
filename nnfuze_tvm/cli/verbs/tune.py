"""``nnfuze tune``: a tuning job begun, or gone on with."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Any

import typer

from nnfuze_tvm.cli.console import out, progress
from nnfuze_tvm.cli.options import (
    A_TRIAL,
    AsJson,
    Boards,
    Calibration,
    Compression,
    Inputs,
    Optimize,
    Target,
    Threads,
    WorkDir,
    check_files,
)

POSITION = 1


def command(
    models: Annotated[
        list[str] | None,
        typer.Argument(help="ONNX files; without them the job in --work-dir goes on.", show_default=False),
    ] = None,
    *,
    work_dir: WorkDir = None,
    target: Target = "host",
    optimize: Optimize = "speed",
    calibration: Calibration = None,
    compression: Compression,
    inputs: Inputs,
    trials: Annotated[int | None, typer.Option(help=f"Tuning trials per kernel, {A_TRIAL}; 64 for a new job.")] = None,
    boards: Boards,
    threads: Threads = 1,
    as_json: AsJson = False,
) -> None:
    """Tune the kernels of the merged network; `compile --work-dir` uses what was found.

    Interrupted, it goes on where it stopped: nnfuze tune --work-dir DIR

    All boards under the key measure at the same time. One that goes away costs the run that was on it, which is made up
    for; one that comes (back) is used.
    """
    if models:
        check_files(models, inputs, calibration=calibration)
    with progress() as announce:
        from nnfuze_tvm.jobs.tune import tune

        # A job that goes on keeps what it was begun with.
        fields: dict[str, Any] = {"trials": trials, **boards}
        fields = {name: value for name, value in fields.items() if value not in (None, False)}
        if models:
            fields |= {
                "target": target,
                "optimize": optimize,
                "calibration": calibration,
                "threads": threads,
                **compression,
                **inputs,
            }
        tune(models, work_dir=work_dir, announce=announce, progress=not as_json, **fields)
    from nnfuze_tvm.jobs import fleet, tuning

    assert work_dir is not None
    devices = fleet.usage(tuning.read_journal(work_dir))
    if as_json:
        print(json.dumps({"work_dir": work_dir, "devices": [asdict(one) for one in devices]}, indent=1))
        return
    from nnfuze_tvm.report.table import render_devices

    out().print(render_devices(devices))
    out().print(f"tuning records: {work_dir}", highlight=False)
