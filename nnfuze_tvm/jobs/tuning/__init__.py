"""Tuning kernels: candidates of every one measured on devices over RPC, and kept in a job's directory."""

from nnfuze_tvm.jobs.tuning.directory import Trial, has_records, load_database, read_journal
from nnfuze_tvm.jobs.tuning.tune_kernels import tune_kernels

__all__ = ["Trial", "has_records", "load_database", "read_journal", "tune_kernels"]
