"""Releases: adapters with a name. Sealed once, named by content, never written again.

Sealing stages a copy, syncs it, renames it into place and only then writes the row, so there is no row without its
directory; a directory without row is a leftover of a crash, which nothing serves and the next sealing removes.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Row, func, insert, select, union, update

from cltrain.errors import ConflictError, DataError
from cltrain.models.digest import ADAPTER_FILES, MANIFEST, MEMORY_FILE, SIGNATURE, adapter_digest
from cltrain.models.signature import sign
from cltrain.records import Release
from cltrain.registry.decisions import append
from cltrain.store.database import Store
from cltrain.store.schema import agents, aliases, records, releases, rollouts, set_aside

# rejected and held never reach released: a held candidate is judged again as candidate first
TRANSITIONS: dict[str, frozenset[str]] = {
    "candidate": frozenset({"released", "rejected", "held", "deleted"}),
    "held": frozenset({"candidate", "rejected", "deleted"}),
    "rejected": frozenset({"deleted"}),
    "released": frozenset({"rolled_back", "deleted"}),
    "rolled_back": frozenset({"released", "deleted"}),
    "deleted": frozenset(),
}


def file_digests(directory: Path) -> dict[str, str]:
    """sha256 hex of each file, as the manifest lists them."""
    digests = {}
    for name in _files_of(directory):
        with (directory / name).open("rb") as file:
            digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def _files_of(directory: Path) -> tuple[str, ...]:
    return (*ADAPTER_FILES, MEMORY_FILE) if (directory / MEMORY_FILE).is_file() else ADAPTER_FILES


def release_name(agent: str, number: int, digest: str) -> str:
    return f"{agent}-v{number:06d}-{digest[:12]}"


def seal(
    store: Store,
    state_dir: Path,
    agent: str,
    candidate_dir: Path,
    parent: str,
    manifest: dict[str, Any],
    *,
    now: float,
    key: Path | None = None,
) -> Release:
    """Give the adapter in `candidate_dir` a name and a read-only home; returns it with status candidate.

    `parent` is the release that the candidate was trained from. The same bytes with the same parent give the same
    release back, so a sealing that a crash interrupted is simply called again. The manifest is kept in the row and,
    with the file hashes under "files", in manifest.json beside the adapter; `key` signs that file. Raises DataError for
    an incomplete candidate or an unknown parent, ConflictError when the number was taken meanwhile.
    """
    digest = adapter_digest(candidate_dir)
    home = state_dir / "releases" / agent
    _make_directory(home)
    with _locked(home / ".lock"):
        with store.read() as connection:
            if connection.execute(select(releases.c.name).where(releases.c.name == parent)).first() is None:
                raise DataError(f"the candidate's parent {parent} is not a release of this deployment")
            known = _find(connection, agent, digest, parent)
            last = connection.execute(select(func.max(releases.c.number)).where(releases.c.agent == agent)).scalar()
        if known is not None:
            verify_release(state_dir, known)
            return known
        number = int(last or 0) + 1
        name = release_name(agent, number, digest)
        identity = {"name": name, "agent": agent, "number": number, "digest": digest, "parent": parent}
        full = {**manifest, **identity, "files": file_digests(candidate_dir)}
        _remove_orphans(store, home, agent)
        _place(candidate_dir, home, name, full, key)
        verify_release(state_dir, Release(name, agent, number, digest, parent, f"releases/{agent}/{name}", "candidate"))
        with store.write() as connection:
            _insert(connection, name, agent, number, digest, parent, f"releases/{agent}/{name}", "candidate", full, now)
            append(connection, agent, "seal", {"release": name, "parent": parent, "digest": digest}, now)
    return get(store, name)


def ensure_base_release(store: Store, agent: str, base_digest: str, *, now: float) -> Release:
    """The bare base as release 0, with the alias on it when the agent is new. Safe to call at every start.

    Raises DataError when the agent has already learned on another base.
    """
    name = release_name(agent, 0, base_digest)
    with store.write() as connection:
        row = connection.execute(select(releases).where(releases.c.agent == agent, releases.c.number == 0)).first()
        if row is not None and row.digest != base_digest:
            raise DataError(
                f"{agent} learns on base {row.digest[:12]}, and this base is {base_digest[:12]}: adapters do not carry "
                "over. Point base.path at the old base or choose another agent.name"
            )
        if row is None:
            _insert(connection, name, agent, 0, base_digest, None, None, "released", {}, now)
            append(connection, agent, "base", {"release": name, "digest": base_digest}, now)
        if connection.execute(select(aliases.c.agent).where(aliases.c.agent == agent)).first() is None:
            connection.execute(
                insert(aliases).values(
                    agent=agent, release=name, anchor=name, high_water=name, version=1, fence=0, changed_at=now
                )
            )
    return get(store, name)


def get(store: Store, name: str) -> Release:
    """Raises DataError for a name that was never sealed."""
    with store.read() as connection:
        return get_in(connection, name)


def find(store: Store, agent: str, start: str) -> Release:
    """The agent's release of that name, or the only one whose name begins so. Raises DataError for none or several."""
    named = (releases.c.agent == agent) & releases.c.name.startswith(start, autoescape=True)
    with store.read() as connection:
        found = [_release(row) for row in connection.execute(select(releases).where(named).order_by(releases.c.number))]
    if exact := [release for release in found if release.name == start]:
        return exact[0]
    if len(found) > 1:
        raise DataError(f"{start} may be {', '.join(release.name for release in found[:3])}: say more of the name")
    if not found:
        raise DataError(f"there is no release {start} of {agent}: `cltrain status` lists the newest")
    return found[0]


def other_agents(store: Store, agent: str) -> list[str]:
    """Whom the store knows where it has nothing of this agent: no release, record, switch or line set aside."""
    with store.read() as connection:
        own = set_aside.c.source.startswith(f"{agent}/", autoescape=True)
        if connection.execute(select(set_aside.c.id).where(own).limit(1)).first() is not None:
            return []
        for table in (releases, agents, records):
            if connection.execute(select(table.c.agent).where(table.c.agent == agent).limit(1)).first() is not None:
                return []
        known = union(*(select(table.c.agent) for table in (releases, agents, records)))
        return sorted(connection.scalars(known))


def get_in(connection: Connection, name: str) -> Release:
    row = connection.execute(select(releases).where(releases.c.name == name)).first()
    if row is None:
        raise DataError(f"there is no release {name}: `cltrain status` lists the newest")
    return _release(row)


def list_releases(store: Store, agent: str, *, status: str | None = None) -> list[Release]:
    """Every release of an agent in order of number, the bare base first."""
    query = select(releases).where(releases.c.agent == agent).order_by(releases.c.number)
    if status is not None:
        query = query.where(releases.c.status == status)
    with store.read() as connection:
        return [_release(row) for row in connection.execute(query)]


def release_dir(state_dir: Path, release: Release) -> Path | None:
    """Where the adapter's files are; None for the bare base."""
    return None if release.path is None else (state_dir / release.path).absolute()


def set_status(store: Store, name: str, status: str, *, now: float, reason: str = "") -> Release:
    """Move a release along candidate -> rejected | held | ..., logged. Raises ConflictError for a forbidden step.

    What serves is never chosen here: `released` and `rolled_back` come from `move_alias` and `rollback`.
    """
    with store.write() as connection:
        if status in ("released", "rolled_back"):
            raise ConflictError(f"{name}: only moving the alias makes a release {status}")
        if status == "deleted":
            _refuse_in_use(connection, name)
        change_status(connection, name, status, now=now, reason=reason)
    return get(store, name)


def change_status(connection: Connection, name: str, status: str, *, now: float, reason: str = "") -> None:
    """One allowed step of `TRANSITIONS` inside the caller's transaction; the same status again changes nothing."""
    release = get_in(connection, name)
    if release.status == status:
        return
    if status not in TRANSITIONS[release.status]:
        raise ConflictError(f"{name} is {release.status} and cannot become {status}")
    connection.execute(update(releases).where(releases.c.name == name).values(status=status))
    payload = {"release": name, "from": release.status, "to": status, "reason": reason}
    append(connection, release.agent, "status", payload, now)


def retire(connection: Connection, name: str, status: str, *, now: float, reason: str) -> None:
    """`change_status` to rejected or held for a candidate; one that a human let serve meanwhile stays as it is."""
    if get_in(connection, name).status not in ("released", "rolled_back"):
        change_status(connection, name, status, now=now, reason=reason)


def delete_release(store: Store, state_dir: Path, name: str, *, now: float) -> None:
    """Delete an adapter's files. Raises ConflictError for the bare base and for what the alias still refers to.

    The row says deleted before the first file goes, so a crash leaves a leftover and never a row whose files are gone.
    The caller makes sure that no server lists it any more.
    """
    release = set_status(store, name, "deleted", now=now)
    directory = release_dir(state_dir, release)
    if directory is not None:
        _remove_tree(directory)


def verify_release(state_dir: Path, release: Release) -> None:
    """Raise DataError unless the sealed files are exactly those that were named."""
    if release.status == "deleted":
        raise DataError(f"{release.name} was not kept on disk: only its manifest and the log of decisions remain")
    directory = release_dir(state_dir, release)
    if directory is not None and adapter_digest(directory) != release.digest:
        raise DataError(f"{directory} was changed after it was sealed: restore it or delete the release")


def _remove_orphans(store: Store, home: Path, agent: str) -> None:
    """What interrupted sealings and deletions left: directories that no live row names."""
    with store.read() as connection:
        query = select(releases.c.name).where(releases.c.agent == agent, releases.c.status != "deleted")
        live = set(connection.execute(query).scalars())
    for orphan in sorted(path for path in home.iterdir() if path.is_dir() and path.name not in live):
        _remove_tree(orphan)


def _place(candidate_dir: Path, home: Path, name: str, manifest: dict[str, Any], key: Path | None) -> None:
    staging = home / f".staging-{name}"
    staging.mkdir()
    files = _files_of(candidate_dir)
    for file in files:
        shutil.copyfile(candidate_dir / file, staging / file)
    written = json.dumps(manifest, sort_keys=True, indent=1).encode() + b"\n"
    (staging / MANIFEST).write_bytes(written)
    if key is not None:
        (staging / SIGNATURE).write_bytes(sign(written, key))
    for file in (*files, MANIFEST, *([] if key is None else [SIGNATURE])):
        _sync(staging / file)
        (staging / file).chmod(0o444)
    staging.chmod(0o555)
    _sync(staging)
    staging.rename(home / name)
    _sync(home)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _make_directory(path: Path) -> None:
    if not path.is_dir():
        _make_directory(path.parent)
        path.mkdir(exist_ok=True)
        _sync(path.parent)


def _remove_tree(directory: Path) -> None:
    if directory.is_dir():
        directory.chmod(0o755)
        shutil.rmtree(directory)
        _sync(directory.parent)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One sealing at a time per agent and machine; the lock goes with the process that holds it."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _refuse_in_use(connection: Connection, name: str) -> None:
    if get_in(connection, name).path is None:
        raise ConflictError(f"{name} is the bare base and stays")
    for row in connection.execute(select(aliases)):
        for role in ("release", "previous", "anchor", "high_water"):
            if getattr(row, role) == name:
                raise ConflictError(f"{name} is the {role} of {row.agent} and stays")
    tried = select(rollouts.c.agent).where(rollouts.c.release == name, rollouts.c.state == "open")
    if (agent := connection.scalar(tried)) is not None:
        raise ConflictError(f"{name} is being tried for {agent} and stays")


def _find(connection: Connection, agent: str, digest: str, parent: str) -> Release | None:
    query = select(releases).where(
        releases.c.agent == agent,
        releases.c.digest == digest,
        releases.c.parent == parent,
        releases.c.status != "deleted",
    )
    row = connection.execute(query).first()
    return None if row is None else _release(row)


def _insert(
    connection: Connection,
    name: str,
    agent: str,
    number: int,
    digest: str,
    parent: str | None,
    path: str | None,
    status: str,
    manifest: dict[str, Any],
    now: float,
) -> None:
    taken = select(releases.c.name).where(releases.c.agent == agent, releases.c.number == number)
    holder = connection.execute(taken).scalar()
    if holder is not None:
        raise ConflictError(f"{holder} took number {number} of {agent} meanwhile: seal again")
    connection.execute(
        insert(releases).values(
            name=name,
            agent=agent,
            number=number,
            digest=digest,
            parent=parent,
            path=path,
            status=status,
            manifest=manifest,
            created_at=now,
        )
    )


def _release(row: Row) -> Release:
    return Release(
        row.name, row.agent, row.number, row.digest, row.parent, row.path, row.status, row.created_at, row.manifest
    )
