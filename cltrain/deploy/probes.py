"""Proofs that anybody can repeat: what the trainer's forward gave for a few prompts, kept with the release.

With them a replica is proved without a trainer: by the worker every few minutes, by a person's promotion, after a
restart. The noise between trainer and server is measured on the bare base each time. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass

from sqlalchemy import delete, insert, select

from cltrain.deploy.proof import NotProvedError, Probe, Proof, Scorer, distance, prove
from cltrain.store.database import Store
from cltrain.store.schema import probes

MAX_NOISE = 4.0  # times the table's: above it the server's base is another one, or of another dtype


@dataclass(frozen=True, slots=True)
class Probes:
    """Prompts with their answers, and each answer's log-probs (nats) by the trainer's own forward."""

    pairs: tuple[Probe, ...]  # prompt ids, completion ids
    expected: tuple[tuple[float, ...], ...]  # of the release
    before: tuple[tuple[float, ...], ...]  # of what it must be told from
    bare: tuple[tuple[float, ...], ...]  # of the bare base
    was: str  # the name of what it must be told from
    noise: float  # nats that two forwards of the same weights may differ by, at least


def prove_on(client: Scorer, name: str, base_name: str, kept: Probes) -> Proof:
    """`proof.prove` on one server, within twice the noise that the bare base shows there, or `kept.noise`.

    Raises NotProvedError also when the base itself answers with other weights than the trainer's.
    """
    allowed = kept.noise
    if name != base_name:
        seen = distance(client.score_many(base_name, kept.pairs), kept.bare)
        if not seen <= MAX_NOISE * kept.noise:
            raise NotProvedError(
                f"{name} is not proved: the bare base ({base_name}) itself is {seen:.3g} nats from the trainer's, "
                f"above {MAX_NOISE * kept.noise:.3g}: another base, or another dtype than base.dtype"
            )
        allowed = max(allowed, 2 * seen)
    return prove(client, name, kept.was, kept.pairs, kept.expected, kept.before, allowed)


def keep(store: Store, release: str, made: Probes, now: float) -> None:
    """Write them down for every later proof of the release; those that were there go."""
    with store.write() as connection:
        connection.execute(delete(probes).where(probes.c.release == release))
        connection.execute(insert(probes).values(release=release, content=asdict(made), created_at=now))


def forget(store: Store, release: str) -> None:
    """Its files are gone: nothing is left to prove."""
    with store.write() as connection:
        connection.execute(delete(probes).where(probes.c.release == release))


def kept_of(store: Store, release: str) -> Probes | None:
    """None for the bare base and for a release that nobody made any for yet."""
    with store.read() as connection:
        content = connection.scalar(select(probes.c.content).where(probes.c.release == release))
    if content is None:
        return None
    pairs = tuple((tuple(prompt), tuple(completion)) for prompt, completion in content["pairs"])
    values = {name: tuple(map(tuple, content[name])) for name in ("expected", "before", "bare")}
    return Probes(pairs=pairs, was=content["was"], noise=content["noise"], **values)


def without(store: Store, names: Collection[str]) -> list[str]:
    """Which of these releases have none."""
    with store.read() as connection:
        known = set(connection.scalars(select(probes.c.release).where(probes.c.release.in_(list(names)))))
    return [name for name in names if name not in known]
