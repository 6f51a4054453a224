"""``python -m nnfuze_tvm`` is ``nnfuze``."""

from nnfuze_tvm.cli import main

main()
