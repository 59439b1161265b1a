"""Whose request it is: a tenant's, where its principal is known from an API key and may have an adapter of its own.

Nothing that a client can write (a header, the field `user`, the model's name) makes it another's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from sqlalchemy import Connection, bindparam, select

from cltrain.config import Config
from cltrain.config_tenants import NAME, agent_of_tenant, is_tenants
from cltrain.deploy.readiness import is_ready_somewhere
from cltrain.gateway.keys import Key, read_keys
from cltrain.store.schema import aliases

ALIAS = select(aliases.c.release).where(aliases.c.agent == bindparam("agent"))


def agent_for(config: Config, key: Key | None) -> str:
    """Whose record a request with this key makes: the tenant's agent, or the shared one."""
    if key is None or not _has_own(config, key.principal):
        return config.agent.name
    return agent_of_tenant(config.agent.name, key.principal)


def entitled(config: Config) -> list[str]:
    """The agents of all who may have an adapter of their own. A principal whose name cannot be one has none. Raises
    DataError when the keys cannot be read."""
    if config.tenants.mode == "off":
        return []
    holders = {key.principal for key in read_keys(config.state_dir) if key.revoked_at is None}
    return [agent_of_tenant(config.agent.name, name) for name in sorted(holders) if _has_own(config, name)]


def serving(connection: Connection, shared: str, agent: str, urls: Sequence[str]) -> str | None:
    """What answers new episodes: a tenant's own release once a server has proved it, else what the shared agent serves;
    None where nothing was released yet."""
    if is_tenants(agent):  # its bare base is nowhere proved under a name of its own: who has no more is answered as all
        own: str | None = connection.scalar(ALIAS, {"agent": agent})
        if own is not None and is_ready_somewhere(connection, own, urls):
            return own
    release: str | None = connection.scalar(ALIAS, {"agent": shared})
    return release


def _has_own(config: Config, principal: str) -> bool:
    tenants = config.tenants
    if tenants.mode == "off" or is_tenants(config.agent.name) or re.fullmatch(NAME, principal) is None:
        return False
    return not tenants.principals or principal in tenants.principals
