"""Whose adapters are their own, what a tenant's agent is called, and what it takes to share. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from cltrain.settings import Section

NAME = r"[a-z0-9](?:[a-z0-9-]{0,38}[a-z0-9])?"
OF = "@"  # support@acme: the agent of the tenant acme

TenantName = Annotated[str, Field(pattern=rf"^{NAME}$")]


class TenantsConfig(Section):
    """Adapters of their own for principals that are known by their API key, beside the shared one."""

    mode: Literal["off", "individual"] = "off"
    principals: tuple[TenantName, ...] = ()  # who has one; none listed: every principal that holds a key
    min_contributors: int = Field(3, ge=2)  # tenants that must have learned a stratum before it may be shared
    share_strictness: float = Field(10.0, ge=1)  # what gate.alpha is divided by for what is shared
    share_needs_yes: bool = True  # of a person, also in mode auto


def agent_of_tenant(shared: str, tenant: str) -> str:
    return f"{shared}{OF}{tenant}"


def shared_of(agent: str) -> str:
    """The shared agent of a tenant's; every other is its own."""
    return agent.partition(OF)[0]


def is_tenants(agent: str) -> bool:
    return OF in agent
