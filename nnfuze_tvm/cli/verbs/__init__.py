"""One file per verb; see `nnfuze_tvm.cli`."""
