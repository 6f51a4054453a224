"""What can go wrong for a user: one line that says what, where and what to do."""

import tvm_ffi

LONGEST_LINE = 300


def escaped(text: str) -> str:
    """Return a text with what terminals would obey written as Python writes it."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def printable(text: str, longest: int = LONGEST_LINE) -> str:
    """Return a text as one line for terminals: what they would obey is escaped, and too much is cut out in the middle.

    Parameters
    ----------
    text : str
        Perhaps from a file, and anything.
    longest : int
        How many characters the line may have.
    """
    if len(text) > 4 * longest:
        # Not much more than what will be left is looked at.
        text = f"{text[: 2 * longest]} … {text[-2 * longest :]}"
    line = escaped(" ".join(text.split()))
    if len(line) <= longest:
        return line
    half = (longest - 3) // 2
    return f"{line[:half]} … {line[-half:]}"


def first_line(error: object) -> str:
    """Return the first line of an error's text that isn't empty."""
    return _lines(error)[0]


def last_line(error: object) -> str:
    """Return the last one: that of TVM's errors says what happened, those before it by which ways it came."""
    return _lines(error)[-1]


def _lines(error: object) -> list[str]:
    return [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]


class NNFuzeError(Exception):
    """Base of every error that a user can cause and mend.

    The message is one line; the command line prints it and exits with ``exit_code``.
    """

    exit_code = 2


class ModelError(NNFuzeError):
    """A model file can't be read or holds something that is not supported."""


class InputError(NNFuzeError):
    """Data, shapes or options that do not fit the networks."""


class PolicyError(NNFuzeError):
    """A compression policy that is malformed or names unknown layers."""


class DeviceError(NNFuzeError):
    """A target, tracker, board or toolchain that is missing or does not answer."""


class BundleError(NNFuzeError):
    """A bundle that is damaged, unwritable or made for another machine."""


class CheckError(NNFuzeError):
    """What was built doesn't compute what the networks compute that were given: a fault of this package."""

    exit_code = 1


# A pass runs behind TVM's C++ pass manager, which rebuilds exceptions by name: without this, what a pass
# raises would arrive as a RuntimeError.
for _error in (NNFuzeError, ModelError, InputError, PolicyError, DeviceError, BundleError, CheckError):
    tvm_ffi.register_error(f"{__name__}.{_error.__name__}", _error)
