"""What a compilation achieved, stage by stage: as a record, as JSON, as a table and as one HTML page."""

from nnfuze_tvm.report.html import render_html
from nnfuze_tvm.report.record import Budget, Check, KernelTime, LayerUse, Report, Stage, TaskQuality
from nnfuze_tvm.report.table import render_kernels, render_manifest, render_table
from nnfuze_tvm.report.text import left_in_float, no_gain, within_budget

__all__ = [
    "Budget",
    "Check",
    "KernelTime",
    "LayerUse",
    "Report",
    "Stage",
    "TaskQuality",
    "left_in_float",
    "no_gain",
    "render_html",
    "render_kernels",
    "render_manifest",
    "render_table",
    "within_budget",
]
