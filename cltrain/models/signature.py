"""Ed25519 signatures over a release's manifest, which names the sha256 of every file: one signature covers them all.

Keys are PEM files as `openssl genpkey -algorithm ed25519` and `openssl pkey -pubout` write them. Needs `cryptography`
(`pip install cltrain[sign]`), which is imported only where keys are configured.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cltrain.errors import ConfigError, DataError
from cltrain.models.digest import MANIFEST, SIGNATURE, check_manifest

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey


def sign(manifest: bytes, key: Path) -> bytes:
    """64 bytes. Raises ConfigError for a file that holds no Ed25519 private key."""
    return _private(key).sign(manifest)


class NotSignedError(DataError):
    """Nobody signed it, as before a key was configured; nothing says that anything in it was changed."""


def check_sealed(directory: Path, trusted: Sequence[Path]) -> dict[str, Any]:
    """The manifest, once every file is as it was sealed and, where keys are trusted, one of them signed it. Raises
    DataError otherwise."""
    if trusted:
        return check_signature(directory, trusted)
    if not (directory / MANIFEST).is_file():
        raise DataError(f"{directory} has no {MANIFEST}: nothing says what was sealed in it")
    return check_manifest(directory, (directory / MANIFEST).read_bytes())


def check_signature(directory: Path, trusted: Sequence[Path]) -> dict[str, Any]:
    """The manifest. Raises DataError unless one of the keys signed it and the directory is as it says;
    NotSignedError where there is no signature, ConfigError for a bad key file.

    A key file may hold a public key or the private one that it belongs to.
    """
    keys = [_public(file) for file in trusted]  # says what to install where that is missing
    from cryptography.exceptions import InvalidSignature

    for name, kind in ((MANIFEST, DataError), (SIGNATURE, NotSignedError)):
        if not (directory / name).is_file():
            raise kind(f"{directory} is not signed: it has no {name}")
    manifest, signature = ((directory / name).read_bytes() for name in (MANIFEST, SIGNATURE))

    def is_by(key: Ed25519PublicKey) -> bool:
        try:
            key.verify(signature, manifest)
        except InvalidSignature:
            return False
        return True

    if not any(map(is_by, keys)):
        raise DataError(
            f"{directory / SIGNATURE} is by none of the {len(keys)} keys in signing.trusted and signing.key"
        )
    return check_manifest(directory, manifest)


def _private(file: Path) -> Ed25519PrivateKey:
    key = _loaded(file)
    if hasattr(key, "sign"):
        return key
    raise ConfigError(f"signing.key = {str(file)!r} is a public key: signing takes the private one")


def _public(file: Path) -> Ed25519PublicKey:
    key = _loaded(file)
    return key.public_key() if hasattr(key, "sign") else key


def _loaded(file: Path) -> Any:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
    except ImportError:
        raise ConfigError("signing needs the package cryptography: pip install 'cltrain[sign]'") from None
    try:
        raw = file.expanduser().read_bytes()
        is_private = b"PRIVATE KEY" in raw
        key = (
            serialization.load_pem_private_key(raw, password=None)
            if is_private
            else serialization.load_pem_public_key(raw)
        )
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"signing: {str(file)!r} cannot be read as a PEM key without a password: {error}") from None
    if not isinstance(key, Ed25519PrivateKey | Ed25519PublicKey):
        raise ConfigError(f"signing: {str(file)!r} is no Ed25519 key: openssl genpkey -algorithm ed25519 makes one")
    return key
