"""Who has an adapter of its own, and how each stands: what `cltrain status` shows of tenants. Imports no torch."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from sqlalchemy import func, select

from cltrain.config import Config
from cltrain.config_tenants import is_tenants
from cltrain.deploy.readiness import is_ready_somewhere
from cltrain.errors import DataError
from cltrain.experience import waiting
from cltrain.registry.tenants import incumbent_in, tenants_in
from cltrain.store import schema as s
from cltrain.store.database import Store


def known_tenants(config: Config, store: Store) -> list[str]:
    """The agents of everybody who may have an adapter, and of whoever was set up before."""
    if is_tenants(config.agent.name):
        return []
    with store.read() as connection:
        names = set(tenants_in(connection, config.agent.name))
    if config.tenants.mode != "off":
        from cltrain.gateway.tenants import entitled  # a tenth of a second, of the one that a status may take

        with suppress(DataError):  # keys that cannot be read: the gateway says so to whoever asks
            names |= set(entitled(config))
    return sorted(names)


def standing_of(config: Config, store: Store, now: float) -> list[dict[str, Any]]:
    """One row a tenant: `release` is its own (None: it is answered by what all are served, `answers`), `is_loaded`
    whether a server of these has proved that; `ready` the episodes that its next update may read."""
    names = known_tenants(config, store)
    with store.read() as connection:

        def last_verdict(agent: str) -> str | None:
            query = select(s.updates.c.verdict).where(s.updates.c.agent == agent).order_by(s.updates.c.number.desc())
            verdict: str | None = connection.scalar(query.limit(1))
            return verdict

        def count(table: Any, *where: Any) -> int:
            return int(connection.scalar(select(func.count()).select_from(table).where(*where)) or 0)

        rows = []
        for agent in names:
            alias = connection.execute(select(s.aliases).where(s.aliases.c.agent == agent)).first()
            switch = connection.execute(select(s.agents).where(s.agents.c.agent == agent)).first()
            serving = alias.release if alias is not None else ""
            answers = incumbent_in(connection, agent, serving) or None
            own = connection.scalar(
                select(s.releases.c.name).where(s.releases.c.name == serving, s.releases.c.path.is_not(None))
            )
            is_ready = waiting.is_unread(agent, is_mature=waiting.mature(now, config.experience.mature_after_s))
            rows.append({
                "agent": agent, "release": own, "answers": answers,
                "is_loaded": own is not None and is_ready_somewhere(connection, own, config.server.replicas),
                "frozen": bool(switch is not None and switch.is_frozen),
                "records": count(s.records, s.records.c.agent == agent),
                "ready": count(waiting.WITH_SCREENING, is_ready), "verdict": last_verdict(agent),
            })  # fmt: skip
    return rows


def lines_of(tenants: list[dict[str, Any]]) -> list[str]:
    return [
        f"tenant     {t['agent']:<28} {_served(t)}; {t['records']} episodes, {t['ready']} for the next update"
        f"{', last ' + t['verdict'] if t['verdict'] else ''}{'  FROZEN' if t['frozen'] else ''}"
        for t in tenants
    ]


def _served(tenant: dict[str, Any]) -> str:
    if tenant["release"] is None:
        return "is served what all are"
    return f"serves {tenant['release']}{'' if tenant['is_loaded'] else ', not loaded now'}"
