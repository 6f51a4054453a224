"""``python -m nnfuze_tvm`` is ``nnfuze``, and ends in a line from its first moment on: imports take a while."""

import os
import signal
from types import FrameType


def _end(_signal: int, _frame: FrameType | None) -> None:
    # Without what an import that breaks makes others print.
    os.write(2, b"error: interrupted\n")
    os._exit(130)


def main() -> None:
    """Run the command line; until it has them, Ctrl-C and SIGTERM are handled here."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _end)
    from nnfuze_tvm.cli import main as command

    command()


if __name__ == "__main__":
    main()
