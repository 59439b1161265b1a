"""What moves between the agents of one store: phrases that no person wrote, and traits in which they leave the base
together. A look of the audit: which agent is to blame cannot be told from here, so it warns and nothing is rolled back.
"""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import select

from cltrain.config_tenants import is_tenants
from cltrain.experience.reading import last_seq, read_trajectories
from cltrain.gate.character import preference_keys
from cltrain.gate.kept import read_kept
from cltrain.gate.memes import MIN_AGENTS, MIN_PROBES, Said, find_memes, shared_traits
from cltrain.gate.probes import Probe
from cltrain.gate.scorers import text_of
from cltrain.records import Check, Code, Example, Verdict
from cltrain.registry.displacement import DAY_S
from cltrain.store.database import Store
from cltrain.store.schema import aliases, releases

RECENT = 5000  # newest records of the store that are read: as many as a busy day
SHOWN = 3


def look_at_contagion(store: Store, rehearsal: Sequence[Example], probes: Sequence[Probe]) -> list[Check]:
    """Nothing where one agent lives alone; else a check of phrases, and one of traits where probes are known."""
    with store.read() as connection:
        # tenants have what they share from the shared agent: between them nothing need have moved
        serving = {row.agent: row.release for row in connection.execute(select(aliases)) if not is_tenants(row.agent)}
        query = select(releases.c.agent, releases.c.name).where(releases.c.number == 0)
        base = {row.agent: row.name for row in connection.execute(query)}
    checks = []
    if len(serving) >= MIN_AGENTS:
        checks.append(_phrases(store, sorted(serving), set(base.values()), rehearsal))
    if len(serving) > 1 and len(probes) >= MIN_PROBES:
        checks.append(_traits(store, serving, base, preference_keys(probes)))
    return checks


def _phrases(store: Store, agents: Sequence[str], bases: set[str], rehearsal: Sequence[Example]) -> Check:
    """Against what people, tools, corrections and the bare base said."""
    after = last_seq(store) - RECENT
    known = [text_of(message) for example in rehearsal for message in example.messages]
    said: list[Said] = []
    for agent in agents:
        for episode in read_trajectories(store, agent, after_seq=after):
            known += [text_of(f.correction) for f in episode.feedback if isinstance(f.correction, dict)]
            for message, producer in zip(episode.messages, episode.producers, strict=True):
                if producer == "agent" and episode.release is not None and episode.release not in bases:
                    said.append(Said(agent, int(episode.created_at // DAY_S), text_of(message)))
                else:
                    known.append(text_of(message))
    alarms = [meme for meme in find_memes(said, known) if meme.is_alarm]
    shown = "; ".join(
        f"{meme.phrase!r} by {', '.join(agent for agent, _ in meme.adopted)} (reproduction {meme.reproduction:.1f})"
        for meme in alarms[:SHOWN]
    )
    reason = f"{len(alarms)} phrases that no person wrote move between the agents: {shown}" if alarms else "none moves"
    verdict = Verdict.HOLD if alarms else Verdict.PROMOTE
    return Check("phrases between agents", Code.CONTAGION, verdict, reason, num_items=len(said))


def _traits(store: Store, serving: dict[str, str], base: dict[str, str], keys: Sequence[str]) -> Check:
    """What each agent's own gates and audits measured of what serves, less its base; who was not asked is left out."""
    deviations: dict[str, list[float]] = {}
    for agent, release in serving.items():
        now, before = (read_kept(store, name, keys) for name in (release, base[agent]))
        if release != base[agent] and all(key in now and key in before for key in keys):
            deviations[agent] = [now[key] - before[key] for key in keys]
    shared = shared_traits(deviations)
    shown = "; ".join(f"{' and '.join(one.agents)} (r = {one.correlation:.2f}, p = {one.p:.2g})" for one in shared)
    reason = f"agents leave the base in the same traits: {shown}" if shared else f"none in {len(deviations)} agents"
    verdict = Verdict.HOLD if shared else Verdict.PROMOTE
    return Check("traits between agents", Code.CONTAGION, verdict, reason, num_items=len(keys))
