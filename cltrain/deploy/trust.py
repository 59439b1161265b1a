"""Which releases may be loaded: those that are as they were sealed and, where keys are trusted, signed by one of them.
Hashes are taken again only when a file changed. No torch."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from cltrain.deploy.residents import Wanted
from cltrain.errors import ConfigError, DataError
from cltrain.models.signature import check_sealed

Stamp = tuple[tuple[str, int, int, int], ...]  # path, bytes, and when content and inode changed, ns

log = logging.getLogger(__name__)


def bar_untrusted(wanted: Wanted, trusted: Sequence[Path]) -> Wanted:
    """The same, without the leave to load what is not as it was sealed, or signed by none of the keys.

    A server that holds such a release keeps it, and one that lost it is ready without it.
    """
    keys, stamp_of_keys = tuple(trusted), _stamp(trusted)
    barred = set()
    for name, directory in wanted.directories.items():
        try:
            reason = _why_not(directory, keys, _stamp(directory.glob("*")), stamp_of_keys)
        except (ConfigError, OSError) as error:  # a key or a disk that cannot be read now: looked at again each time
            reason = str(error)
        if reason is not None:
            _complain(name, reason)
            barred.add(name)
    return replace(wanted, needed=wanted.needed - barred, barred=frozenset(barred))


@lru_cache(maxsize=256)
def _why_not(directory: Path, trusted: tuple[Path, ...], _files: Stamp, _keys: Stamp) -> str | None:
    try:
        check_sealed(directory, trusted)
    except DataError as error:
        return str(error)
    return None


@lru_cache(maxsize=256)
def _complain(release: str, reason: str) -> None:
    """Once per release and reason, not at every look."""
    log.warning("%s is not loaded: %s", release, reason)


def _stamp(files: Iterable[Path]) -> Stamp:
    found = [(file, file.expanduser().stat()) for file in sorted(files) if file.expanduser().exists()]
    return tuple((str(file), s.st_size, s.st_mtime_ns, s.st_ctime_ns) for file, s in found)
