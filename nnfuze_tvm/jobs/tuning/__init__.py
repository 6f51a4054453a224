"""Tuning jobs: candidates of every kernel measured on devices over RPC, and kept in a directory."""

from nnfuze_tvm.jobs.tuning.job import load_database, tune
from nnfuze_tvm.jobs.tuning.journal import Trial, read_journal
from nnfuze_tvm.jobs.tuning.usage import Usage, usage

__all__ = ["Trial", "Usage", "load_database", "read_journal", "tune", "usage"]
