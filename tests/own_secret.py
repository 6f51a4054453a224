"""A secret of the tests' own for trackers and boards; imported before anything asks for it."""

from __future__ import annotations

import atexit
import os
import secrets
import shutil
import tempfile
from pathlib import Path

SECRET = secrets.token_hex(32).encode()

_path = Path(tempfile.mkdtemp(prefix="nnfuze-test-secret-")) / "secret"
_path.touch(0o600)
_path.write_bytes(SECRET)
os.environ["NNFUZE_SECRET_FILE"] = str(_path)
atexit.register(shutil.rmtree, _path.parent, ignore_errors=True)
