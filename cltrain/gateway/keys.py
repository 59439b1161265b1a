"""API keys: who may ask for what. `keys.json` in the state directory holds salted hashes, readable by its owner only.

A file and no table: a request is checked and a key is revoked while the store is down, and a copy of the store that
is handed on holds nothing to guess keys from. A key is 256 random bits, so one round of SHA-256 is hash enough.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import json
import logging
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from cltrain.errors import ConfigError, DataError
from cltrain.gateway.errors import Refusal

Scope = Literal["infer", "feedback", "admin"]
SCOPES: tuple[str, ...] = get_args(Scope)
FILE = "keys.json"
PREFIX = "clt-"
MAX_PRINCIPAL = 256
NOBODY = "0" * 32  # the salt that an unknown key is hashed with: refusing one takes as long as refusing a known one

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Key:
    """What is kept of a key: enough to know it again, not enough to use it."""

    id: str
    principal: str
    scopes: tuple[str, ...]
    salt: str
    digest: str
    created_at: float
    revoked_at: float | None = None


class KeyRing:
    """The keys of a state directory as the file has them now: what changed there counts at the next request.

    Once there was a key every request needs one, also when all are revoked or the file is gone.
    """

    def __init__(self, state_dir: Path, *, is_needed: bool = False) -> None:
        self._state_dir = state_dir
        self._is_needed = is_needed
        self._seen: tuple[int, int, int] | None = None
        self._keys: tuple[Key, ...] = ()

    def find(self, presented: str | None) -> Key | None:
        """Whose key it is; None where no key is needed. Raises Refusal: 401, or 503 when the file cannot be read."""
        try:
            self._look()
        except (DataError, OSError) as error:
            log.error("no key can be checked: %s", error)
            raise Refusal(503, "keys cannot be checked now", kind="api_error", code="keys_unreadable") from None
        if not self._is_needed:
            return None
        if presented is None:
            message = "an API key is needed: send `Authorization: Bearer KEY` or `x-api-key: KEY`"
            raise Refusal(401, message, code="missing_api_key")
        name, secret = _parts(presented)
        known = next((key for key in self._keys if key.id == name), None)
        is_same = hmac.compare_digest(
            _digest(known.salt if known else NOBODY, secret), known.digest if known else _digest(NOBODY, "")
        )
        if known is None or not is_same or known.revoked_at is not None:
            raise Refusal(401, "the API key is wrong, or was revoked", code="invalid_api_key")
        return known

    def _look(self) -> None:
        try:
            found = os.stat(self._state_dir / FILE)
        except FileNotFoundError:
            self._seen, self._keys = None, ()
            return
        seen = (found.st_mtime_ns, found.st_ino, found.st_size)
        if seen != self._seen:
            self._is_needed = True  # also while the file cannot be read
            self._seen, self._keys = None, ()
            self._keys = read_keys(self._state_dir)
            self._seen = seen


def read_keys(state_dir: Path) -> tuple[Key, ...]:
    """Every key, revoked ones too, oldest first. Raises DataError when the file is damaged."""
    path = state_dir / FILE
    try:
        rows = json.loads(path.read_text())["keys"]
        found = tuple(Key(**{**row, "scopes": tuple(row["scopes"])}) for row in rows)
        for key in found:
            bytes.fromhex(key.salt + key.digest)
        return found
    except FileNotFoundError:
        return ()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} cannot be read ({error}): restore it, or delete it and add the keys again") from None


def add_key(state_dir: Path, principal: str, scopes: Sequence[str], *, now: float) -> tuple[Key, str]:
    """(what is kept, the key itself: shown once). Raises ConfigError for a name or a scope that cannot be."""
    if not 0 < len(principal) <= MAX_PRINCIPAL or not principal.isprintable():
        raise ConfigError(f"a principal has 1 to {MAX_PRINCIPAL} printable characters; got {principal!r}")
    if unknown := sorted(set(scopes) - set(SCOPES)):
        raise ConfigError(f"there is no scope {unknown[0]!r}: choose from {', '.join(SCOPES)}")
    if not scopes:
        raise ConfigError(f"a key needs at least one scope of {', '.join(SCOPES)}")
    secret, salt = secrets.token_urlsafe(32), secrets.token_hex(16)
    chosen = tuple(scope for scope in SCOPES if scope in scopes)
    with _changing(state_dir) as keys:
        key = Key(_fresh_id(keys), principal, chosen, salt, _digest(salt, secret), now)
        keys.append(key)
    return key, f"{PREFIX}{key.id}-{secret}"


def revoke_key(state_dir: Path, name: str, *, now: float) -> Key:
    """Raises DataError when there is no such key. Revoking twice keeps the first time."""
    with _changing(state_dir) as keys:
        position = next((i for i, key in enumerate(keys) if key.id == name), None)
        if position is None:
            raise DataError(f"there is no key {name!r}: `cltrain keys list` has their ids")
        if keys[position].revoked_at is None:
            keys[position] = replace(keys[position], revoked_at=now)
        return keys[position]


@contextmanager
def _changing(state_dir: Path) -> Iterator[list[Key]]:
    """The list to change; written and synced as a whole when the block ends. One at a time on a machine. DataError when
    it cannot be written."""
    directory: int | None = None
    try:
        state_dir.mkdir(parents=True, exist_ok=True)
        directory = os.open(state_dir, os.O_RDONLY)
        fcntl.flock(directory, fcntl.LOCK_EX)
        keys = list(read_keys(state_dir))
        yield keys
        draft = state_dir / f"{FILE}.new"
        draft.unlink(missing_ok=True)
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            json.dump({"keys": [asdict(key) for key in keys]}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, state_dir / FILE)
        os.fsync(directory)
    except OSError as error:
        raise DataError(f"{state_dir / FILE} cannot be written: {error.strerror}") from None
    finally:
        if directory is not None:
            os.close(directory)


def _fresh_id(keys: Sequence[Key]) -> str:
    taken = {key.id for key in keys}
    while (name := secrets.token_hex(4)) in taken:
        pass
    return name


def _parts(presented: str) -> tuple[str, str]:
    name, _, secret = presented.removeprefix(PREFIX).partition("-")
    return name, secret


def _digest(salt: str, secret: str) -> str:
    return hashlib.sha256(bytes.fromhex(salt) + secret.encode("utf-8", "surrogateescape")).hexdigest()
