"""As whom a tracker or a server runs: not as root, where that can be helped."""

from __future__ import annotations

import encodings.ascii
import encodings.idna  # noqa: F401  Python reads these late, where another user may not
import os
import pwd

from nnfuze_tvm.devices.remote.door import say
from nnfuze_tvm.errors import DeviceError


def become(user: str | None) -> None:
    """Give up root's rights for those of a user; without one, warn where this process has root's.

    Raises
    ------
    DeviceError
        If there is no such user, or this process may not.
    """
    if user is None:
        if os.geteuid() == 0:
            say("running as root, and so does what clients send here; --user NAME runs it as somebody else")
        return
    try:
        entry = pwd.getpwnam(user)
        if entry.pw_uid != os.geteuid():
            os.initgroups(entry.pw_name, entry.pw_gid)
            os.setgid(entry.pw_gid)
            os.setuid(entry.pw_uid)
    except KeyError:
        raise DeviceError(f"--user {user}: there is no such user") from None
    except OSError as err:
        raise DeviceError(f"--user {user}: only root may run as others ({err.strerror})") from None
    os.environ.update(HOME=entry.pw_dir, USER=entry.pw_name, LOGNAME=entry.pw_name)
