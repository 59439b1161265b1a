"""What answers for a tenant: a release of its own, and until it has one, whatever the shared agent serves.

Its alias then stands at its own release 0 and is moved by its own updates only, which begin from the shared release: so
what a tenant learns is compared with what it was served, and a rollback of all of it leads back there.
"""

from __future__ import annotations

from sqlalchemy import Connection, select, update

from cltrain.config_tenants import is_tenants, shared_of
from cltrain.store.database import Store
from cltrain.store.families import of_tenants
from cltrain.store.schema import agents, aliases, releases

BARE = select(releases.c.name).where(releases.c.number == 0)


def tenants_in(connection: Connection, shared: str) -> list[str]:
    """The tenants' agents that were set up so far, by name."""
    ours = select(aliases.c.agent).where(of_tenants(aliases.c.agent, shared)).order_by(aliases.c.agent)
    return list(connection.scalars(ours))


def learning_in(connection: Connection, shared: str) -> list[str]:
    """Those of them that are not frozen."""
    is_frozen = select(agents.c.agent).where(agents.c.is_frozen)
    frozen = set(connection.scalars(is_frozen))
    return [agent for agent in tenants_in(connection, shared) if agent not in frozen]


def incumbent(store: Store, agent: str, serving: str) -> str:
    """`incumbent_in` in a transaction of its own."""
    with store.read() as connection:
        return incumbent_in(connection, agent, serving)


def incumbent_in(connection: Connection, agent: str, serving: str) -> str:
    """Which release answers for the agent, whose alias points at `serving`."""
    if not is_tenants(agent) or connection.scalar(BARE.where(releases.c.name == serving)) is None:
        return serving
    shared = select(aliases.c.release).where(aliases.c.agent == shared_of(agent), aliases.c.release.not_in(BARE))
    return connection.scalar(shared) or serving


def outdate_followers(connection: Connection, shared: str) -> None:
    """What answers for tenants without a release of their own is another from now on: their updates under way, which
    compare with the one before, lose their compare-and-swap."""
    follows = of_tenants(aliases.c.agent, shared) & aliases.c.release.in_(BARE)
    connection.execute(update(aliases).where(follows).values(version=aliases.c.version + 1))
