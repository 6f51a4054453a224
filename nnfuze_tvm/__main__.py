"""``python -m nnfuze_tvm`` is ``nnfuze``."""

import sys

from nnfuze_tvm.cli import main

sys.exit(main())
