"""A shared agent and those of its tenants, as a condition on rows."""

from __future__ import annotations

from sqlalchemy import ColumnElement, or_

from cltrain.config_tenants import OF


def of_tenants(agent: ColumnElement[str], shared: str) -> ColumnElement[bool]:
    return agent.startswith(f"{shared}{OF}", autoescape=True)


def of_family(agent: ColumnElement[str], shared: str) -> ColumnElement[bool]:
    return or_(agent == shared, of_tenants(agent, shared))
