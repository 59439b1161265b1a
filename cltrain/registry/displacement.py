"""How far what serves has moved lately: the sum of the steps of everything that was promoted."""

from __future__ import annotations

from sqlalchemy import select

from cltrain.store.database import Store
from cltrain.store.schema import decisions, releases

DAY_S = 86_400.0


def moved_since(store: Store, agent: str, since: float) -> float:
    """Sum of step_frobenius (max over modules of ||dW - dW_parent||_F / ||W0||_F) of the promotions after `since`.

    A release that was promoted twice counts twice; going back counts nothing, because it is never refused.
    """
    entries = select(decisions.c.payload).where(
        decisions.c.agent == agent, decisions.c.kind == "promote", decisions.c.at > since
    )
    with store.read() as connection:
        names = [payload["to"] for payload in connection.execute(entries).scalars()]
        query = select(releases.c.name, releases.c.manifest).where(releases.c.name.in_(names))
        steps = {
            row.name: float(row.manifest.get("bounds", {}).get("step_frobenius", 0.0))
            for row in connection.execute(query)
        }
    return sum(steps.get(name, 0.0) for name in names)
