"""What can go wrong for a user: one line that says what, where and what to do."""

import tvm_ffi


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
