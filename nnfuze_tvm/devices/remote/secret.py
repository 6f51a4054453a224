"""What lets a client, a tracker and a board know each other: a secret in a file that its owner alone can read."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from pathlib import Path

from nnfuze_tvm.errors import DeviceError

# Names the file where no option does.
VARIABLE = "NNFUZE_SECRET_FILE"

# Nobody guesses that many characters, if they were drawn by chance.
_LEAST = 32
_MOST = 4096


def fresh() -> bytes:
    """Return a new random secret, as text."""
    return secrets.token_hex(32).encode()


def where(path: str | os.PathLike[str] | None = None) -> Path:
    """Return the path of the file: the given one, that of the environment variable, or this user's."""
    if path or (path := os.environ.get(VARIABLE)):
        return Path(path)
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "nnfuze" / "secret"


def read(path: str | os.PathLike[str] | None = None) -> bytes:
    """Return the secret in a file; see `where`.

    Raises
    ------
    DeviceError
        If there is no such file, others than its owner can read or write it, or there is too little in it.
    """
    file = where(path)
    try:
        # What isn't a file may keep whoever opens it waiting.
        with open(os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as opened:
            found = os.fstat(opened.fileno())
            content = opened.read(_MOST + 1).strip() if stat.S_ISREG(found.st_mode) else b""
    except FileNotFoundError:
        raise DeviceError(
            f"secret file {file}: there is none; 'nnfuze devices tracker' makes one, which every board and every "
            "client needs a copy of (--secret-file says where)"
        ) from None
    except (OSError, ValueError) as err:
        raise DeviceError(f"secret file {file}: can't be read ({getattr(err, 'strerror', None) or err})") from None
    if found.st_uid != os.geteuid() != 0:
        raise DeviceError(f"secret file {file}: belongs to another user, who knows what is in it")
    if found.st_mode & 0o077:
        raise DeviceError(f"secret file {file}: others can use it; chmod 600 {file}")
    if not _LEAST <= len(content) <= _MOST:
        raise DeviceError(f"secret file {file}: {_LEAST} to {_MOST} random characters are a secret, not {len(content)}")
    return content


def read_or_make(path: str | os.PathLike[str] | None = None) -> bytes:
    """Return the secret in a file, after making the file if there is none.

    Raises
    ------
    DeviceError
        If it can't be made, or see `read`.
    """
    file = where(path)
    if not file.exists():
        draft = file.with_name(f"{file.name}.{secrets.token_hex(4)}")
        try:
            file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with open(handle, "wb") as opened:
                opened.write(fresh() + b"\n")
            # Whoever comes second takes the first one's; nobody sees half of it.
            with contextlib.suppress(FileExistsError):
                os.link(draft, file)
        except (OSError, ValueError) as err:
            raise DeviceError(f"secret file {file}: can't be made ({getattr(err, 'strerror', None) or err})") from None
        finally:
            with contextlib.suppress(OSError, ValueError):
                draft.unlink()
    return read(file)
