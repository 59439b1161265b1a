"""What must hold in a deployment's state whatever was killed when; every check returns the problems that it found."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from sqlalchemy import create_engine, func, select

from cltrain.errors import CltrainError
from cltrain.experience.recording import episode_of, read_trajectories
from cltrain.registry import aliases, decisions, releases
from cltrain.store import schema
from cltrain.store.database import STORE_FILE, Store
from tests.gateway_load import Acknowledged

AGENT = "support"
GONE = ("rejected", "deleted")


def read_only(state: Path) -> Store:
    """The store without a right to write: the checks must not checkpoint what they look at."""
    file = state / STORE_FILE
    return Store(create_engine(f"sqlite:///file:{file}?mode=ro&uri=true"), file)


def lost_or_doubled(store: Store, acknowledged: Acknowledged) -> list[str]:
    """What clients were told is durable: there once, as they sent it."""
    with acknowledged.lock:
        trajectories, said = dict(acknowledged.trajectories), dict(acknowledged.feedback)
        answers = dict(acknowledged.answers)
    with store.read() as connection:
        health = connection.exec_driver_sql("PRAGMA integrity_check").scalar_one()
        if health != "ok":
            return [f"the store is damaged: {health}"]
        ids = Counter(connection.scalars(select(schema.records.c.id)))
        said_about = connection.execute(select(schema.feedback.c.id, schema.feedback.c.target)).all()
        targets = Counter((row.id, row.target) for row in said_about)
        num_generations = connection.scalar(select(func.count()).select_from(schema.generations))
    by_id = {t.id: t for t in read_trajectories(store, AGENT)}
    generated = {g.id: t for t in by_id.values() for g in t.generations}
    problems = [f"record {name} is there {count} times" for name, count in ids.items() if count != 1]
    problems += [f"acknowledged trajectory {name} is lost" for name in trajectories if name not in by_id]
    problems += [
        f"trajectory {name} is not what was sent"
        for name, messages in trajectories.items()
        if name in by_id and list(by_id[name].messages) != messages
    ]
    problems += [
        f"acknowledged feedback {pair} is there {targets[pair]} times" for pair in said.items() if targets[pair] != 1
    ]
    problems += [f"acknowledged answer {record} is lost" for record in answers if record not in generated]
    problems += [
        f"answer {record} is in {generated[record].id}, not in {episode}"
        for record, (episode, _) in answers.items()
        if record in generated and episode_of(generated[record].id) != episode
    ]
    if num_generations != len(generated):
        problems.append(f"{num_generations} generations are stored, {len(generated)} belong to a record")
    return problems


def broken_serving(store: Store, state: Path) -> list[str]:
    """The alias names a sealed release; whatever it ever named was promoted; nothing was learned twice."""
    problems = []
    try:
        entries = decisions.read_decisions(store, AGENT, kind="promote")
        decisions.verify_chain(store)
        serving = releases.get(store, aliases.read_alias(store, AGENT).release)
        for release in releases.list_releases(store, AGENT):
            if release.status != "deleted":
                releases.verify_release(state, release)
    except (CltrainError, OSError) as error:
        return [f"{type(error).__name__}: {error}"]
    if serving.status != "released":
        problems.append(f"{serving.name} serves and is {serving.status}")
    made = updates_of(store)
    for entry in entries:
        makers = [u for u in made if u.candidate == entry.payload["to"]]
        if [(u.state, u.verdict) for u in makers] != [("done", "promote")]:
            found = ", ".join(f"{u.id} {u.state} with verdict {u.verdict}" for u in makers) or "no update at all"
            problems.append(f"{entry.payload['to']} was promoted, but was made by {found}")
    learned: Counter[str] = Counter()
    for release in releases.list_releases(store, AGENT, status="released"):
        learned.update(release.manifest.get("learned", ()))
    twice = [record for record, count in learned.items() if count > 1]
    if twice:
        problems.append(f"{len(twice)} records were learned by two served releases, {twice[0]} among them")
    return problems


def served_without_a_row(store: Store, state: Path, listed: dict[str, str]) -> list[str]:
    """`listed`: what the server has, name -> directory."""
    known = {release.name: releases.release_dir(state, release) for release in releases.list_releases(store, AGENT)}
    return [
        f"the server lists {name} from {root}; sealed is {known.get(name)}"
        for name, root in listed.items()
        if known.get(name) is None or str(known[name]) != root
    ]


def half_done(store: Store, state: Path) -> list[str]:
    """Once nothing runs: every update has its verdict or is gone whole, and left nothing behind."""
    problems = []
    status = {release.name: release.status for release in releases.list_releases(store, AGENT)}
    for update in updates_of(store):
        if (state / "updates" / update.id).exists():
            problems.append(f"{update.id} is {update.state}, and its work directory is still there")
        if update.state == "done":
            said = (update.summary or {}).get("verdict")
            if said != update.verdict or update.verdict not in ("promote", "hold", "reject", "error"):
                problems.append(f"{update.id} is done with verdict {update.verdict}, its summary says {said}")
        elif update.state == "discarded":
            with store.read() as connection:
                reads = schema.update_reads
                num_reads = connection.scalar(select(func.count()).where(reads.c["update"] == update.id)) or 0
                filed = schema.screenings
                num_filed = connection.scalar(select(func.count()).where(filed.c["update"] == update.id)) or 0
            if num_reads or num_filed or status.get(update.candidate, "rejected") not in GONE:
                left = (
                    f"{update.candidate} ({status.get(update.candidate)}), {num_reads} reads, {num_filed} filed records"
                )
                problems.append(f"{update.id} was discarded and left {left}")
        else:
            problems.append(f"{update.id} is still {update.state}")
    waiting = [name for name, said in status.items() if said == "candidate"]
    if waiting:
        problems.append(f"{waiting} are candidates of no update")
    return problems


def updates_of(store: Store) -> list[Any]:
    with store.read() as connection:
        query = select(schema.updates).where(schema.updates.c.agent == AGENT).order_by(schema.updates.c.number)
        return list(connection.execute(query).all())
