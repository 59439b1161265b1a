"""The candidate of an agent that is tried on live traffic now, as a condition on rows: there is at most one."""

from __future__ import annotations

from typing import Any

from sqlalchemy import ColumnElement

from cltrain.store.schema import rollouts


def is_open(agent: Any) -> ColumnElement[bool]:
    """`agent`: its name, or a parameter that stands for it."""
    return (rollouts.c.agent == agent) & (rollouts.c.state == "open")
