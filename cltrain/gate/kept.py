"""Numbers measured once per release and question, kept in the store: incumbent and base are never asked twice."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from sqlalchemy import delete, insert, select

from cltrain.store.database import Store
from cltrain.store.schema import item_scores

Measure = Callable[[Sequence[int]], Sequence[float]]
"""Indices of what is not known yet -> a finite number for each."""


def kept(store: Store, release: str, keys: Sequence[str], measure: Measure) -> list[float]:
    """The number of every key, measured only where the store does not know it. Raises ValueError for a gap or a number
    that is not finite; nothing is kept then."""
    known = read_kept(store, release, keys)
    missing = [index for index, key in enumerate(keys) if key not in known]
    if missing:
        values = measure(missing)
        if len(values) != len(missing) or not all(math.isfinite(value) for value in values):
            raise ValueError(f"{release}: {len(missing)} numbers were asked for, and these came back: {values[:5]} ...")
        new = {keys[index]: float(value) for index, value in zip(missing, values, strict=True)}
        keep(store, release, new)
        known |= new
    return [known[key] for key in keys]


def read_kept(store: Store, release: str, keys: Sequence[str]) -> dict[str, float]:
    """Those of the keys that the store knows."""
    query = select(item_scores).where(item_scores.c.release == release, item_scores.c.item.in_(keys))
    with store.read() as connection:
        return {row.item: row.score for row in connection.execute(query)}


def keep(store: Store, release: str, values: Mapping[str, float]) -> None:
    """Write numbers down, in the place of older ones."""
    if not values:
        return
    rows = [{"release": release, "item": key, "score": value} for key, value in values.items()]
    with store.write() as connection:
        connection.execute(
            delete(item_scores).where(item_scores.c.release == release, item_scores.c.item.in_(list(values)))
        )
        connection.execute(insert(item_scores), rows)
