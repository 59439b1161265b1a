"""The sealed vault: items that no gate ever draws, asked about what serves once in `gate.vault_days`, one bit out.

A pool that thousands of decisions were made on reads high, because what serves was chosen on it. The vault was never
chosen on, and stays so: scores do not leave it.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sqlalchemy import insert, select, update

from cltrain.config import GateConfig
from cltrain.errors import DataError
from cltrain.gate.stats import Plan, e_value, means
from cltrain.records import SuiteItem
from cltrain.store.database import Store
from cltrain.store.schema import vault_openings

DAY_S = 86_400.0

ScoreItems = Callable[[str, Sequence[SuiteItem]], Sequence[float]]
"""The scores of a release on these items, each in [0, 1]; raises where one cannot be measured."""


@dataclass(frozen=True, slots=True)
class Opening:
    """What the vault said. `has_lost` None: it stays shut until `next_at` (seconds since the epoch)."""

    has_lost: bool | None
    next_at: float


def split_vault(items: Sequence[SuiteItem], secret: bytes, share: float) -> tuple[list[SuiteItem], list[SuiteItem]]:
    """The items that gates may draw, and the sealed ones: a `share` by HMAC of the deployment's secret over the cluster
    (an episode is sealed whole) or the id, so that nobody who writes items chooses. Canaries are never sealed."""
    pools: tuple[list[SuiteItem], list[SuiteItem]] = ([], [])
    for item in items:
        digest = hmac.new(secret, f"vault {item.cluster or item.id}".encode(), hashlib.sha256).digest()
        is_sealed = item.kind != "canary" and int.from_bytes(digest[:8], "big") < share * 2**64
        pools[is_sealed].append(item)
    return pools


def open_vault(
    store: Store,
    agent: str,
    sealed: Sequence[SuiteItem],
    config: GateConfig,
    *,
    incumbent: str,
    base: str,
    score_items: ScoreItems,
    now: float,
) -> Opening:
    """Ask the sealed items once: is the incumbent worse than the base by more than `gate.margin`, at level alpha?

    For `cltrain audit`. incumbent, base: releases; sealed: the second half of `split_vault`. The opening is written
    down before anything is asked, so that one that fails midway is spent too. Raises DataError for an empty vault, and
    whatever `score_items` raises. Do not cache these scores beside those of the pool, nor show them.
    """
    if not sealed:
        raise DataError("the vault is empty: set gate.vault_share above 0 (0.2 of at least 1,000 items is a start)")
    wait_s = config.vault_days * DAY_S
    here = vault_openings.c.agent == agent
    with store.write() as connection:
        last = connection.execute(select(vault_openings.c.at).where(here).order_by(vault_openings.c.at.desc())).scalar()
        if last is not None and now < last + wait_s:
            return Opening(None, last + wait_s)
        connection.execute(insert(vault_openings).values(agent=agent, release=incumbent, at=now))
    ours, theirs = score_items(incumbent, sealed), score_items(base, sealed)
    lost = [b - a for a, b in zip(ours, theirs, strict=True)]
    if len(lost) != len(sealed) or not all(-1 <= d <= 1 for d in lost):
        raise DataError(f"the vault has {len(sealed)} items and got {len(lost)} scores, or some outside [0, 1]")
    losses = means(lost, [item.cluster for item in sealed])
    has_lost = e_value(losses, config.margin, Plan(len(losses), config.alpha)) >= 1 / config.alpha
    with store.write() as connection:
        connection.execute(update(vault_openings).where(here, vault_openings.c.at == now).values(has_lost=has_lost))
    return Opening(has_lost, now + wait_s)
