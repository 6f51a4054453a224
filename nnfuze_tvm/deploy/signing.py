"""Who made a bundle: a signature of its manifest, which has the checksums of everything else."""

from __future__ import annotations

import base64
import os
from pathlib import Path
from typing import Any

from nnfuze_tvm.errors import BundleError, InputError
from nnfuze_tvm.reading.files import read_file

SIGNATURE = "manifest.sig"

# What is signed begins with this: a signature of a manifest is one of nothing else.
_PREFIX = b"nnfuze bundle manifest\n"


def sign(directory: Path, manifest: bytes, key: str | os.PathLike[str]) -> Path:
    """Write the signature of a manifest's bytes beside it; return where.

    Parameters
    ----------
    directory : Path
        The bundle.
    manifest : bytes
        Its manifest as it was read and checked.
    key : path
        An Ed25519 private key as PEM without a password.

    Raises
    ------
    InputError
        If the key isn't such.
    BundleError
        If the signature can't be written.
    """
    signed = _key(key, private=True).sign(_PREFIX + manifest)
    path, new = directory / SIGNATURE, directory / f".{SIGNATURE}.new"
    try:
        new.write_bytes(base64.b64encode(signed) + b"\n")
        os.replace(new, path)
    except OSError as error:
        raise BundleError(f"{path}: can't be written ({error.strerror})") from None
    return path


def verify(directory: Path, manifest: bytes, key: str | os.PathLike[str]) -> None:
    """Check that the holder of a key signed a manifest.

    Parameters
    ----------
    directory : Path
        The bundle.
    manifest : bytes
        Its manifest as it was read.
    key : path
        The Ed25519 public key as PEM.

    Raises
    ------
    InputError
        If the key isn't such.
    BundleError
        If the bundle isn't signed, or not with that key.
    """
    public = _key(key, private=False)
    from cryptography.exceptions import InvalidSignature

    try:
        signature = base64.b64decode(read_file(directory / SIGNATURE), validate=False)
        public.verify(signature, _PREFIX + manifest)
    except FileNotFoundError:
        raise BundleError(
            f"{directory}: not signed; sign it with `nnfuze bundle sign`, or load it without --trust"
        ) from None
    except (OSError, ValueError, InvalidSignature):
        raise BundleError(f"{directory}: not signed with the key of {key}, or changed since; don't load it") from None


def _key(path: str | os.PathLike[str], *, private: bool) -> Any:
    try:
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
        from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key
    except ImportError:
        raise InputError("signatures need the package cryptography: pip install 'nnfuze-tvm[sign]'") from None
    kind = Ed25519PrivateKey if private else Ed25519PublicKey
    try:
        data = read_file(path)
        key = load_pem_private_key(data, None) if private else load_pem_public_key(data)
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror})") from None
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, kind):
        command = "openssl genpkey -algorithm ed25519" if private else "openssl pkey -in KEY -pubout"
        what = "private key without a password" if private else "public key"
        raise InputError(f"{path}: no Ed25519 {what} as PEM; make one with `{command}`")
    return key
