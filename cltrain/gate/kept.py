"""Numbers measured once per release and question, kept in the store: incumbent and base are never asked twice."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from sqlalchemy import Connection, Table, delete, insert, select

from cltrain.store.database import Store
from cltrain.store.schema import item_scores

PART = 500  # keys looked up in one query

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


def read_kept(store: Store, release: str, keys: Sequence[str], table: Table = item_scores) -> dict[str, float]:
    """Those of the keys that the store knows, from a table of (release, item, number)."""
    found: dict[str, float] = {}
    with store.read() as connection:
        for start in range(0, len(keys), PART):
            here = (table.c.release == release) & table.c.item.in_(keys[start : start + PART])
            found |= {row.item: row[2] for row in connection.execute(select(table).where(here))}
    return found


def keep(store: Store, release: str, values: Mapping[str, float]) -> None:
    """Write numbers down, in the place of older ones."""
    with store.write() as connection:
        keep_in(connection, release, values)


def keep_in(connection: Connection, release: str, values: Mapping[str, float], table: Table = item_scores) -> None:
    """As `keep`, inside the caller's write transaction and in any table of (release, item, number)."""
    if values:
        name = table.columns.keys()[2]
        connection.execute(delete(table).where(table.c.release == release, table.c.item.in_(list(values))))
        connection.execute(
            insert(table), [{"release": release, "item": key, name: value} for key, value in values.items()]
        )
