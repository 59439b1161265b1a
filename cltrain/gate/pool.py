"""The pool of questions: drawn in rotation, counted, retired before they are worn out.

Canaries are not drawn: all of them are asked at every gate, they test one thing and estimate nothing.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict, deque
from collections.abc import Collection, Iterable, Iterator, Sequence

from sqlalchemy import Connection, insert, select, update

from cltrain.gate.suites import is_taught, item_key
from cltrain.records import SuiteItem
from cltrain.store.database import Store
from cltrain.store.schema import item_uses


def draw(
    store: Store,
    agent: str,
    items: Sequence[SuiteItem],
    count: int,
    *,
    taught: Collection[str],
    max_uses: int,
    seed: int,
    exclude: Collection[str] = (),
) -> list[SuiteItem]:
    """Up to `count` items that are no canaries: least used first, half of them about what is being taught.

    Strata take turns, so a rare one is heard. Left out are items used `max_uses` times and the ids in `exclude`. The
    order is random by `seed`, items of one cluster behind each other: evidence may be looked at after any part of it.
    """
    uses = num_uses(store, agent)
    pools: dict[bool, dict[str, list[tuple[int, str, SuiteItem]]]] = {True: defaultdict(list), False: defaultdict(list)}
    for item in items:
        key = item_key(item)
        if item.kind == "canary" or item.id in exclude or uses.get(key, 0) >= max_uses:
            continue
        pools[is_taught(item.stratum, taught)][item.stratum].append((uses.get(key, 0), _shuffle(seed, key), item))
    queues = [_in_turn(pools[True]), _in_turn(pools[False])]
    drawn: list[SuiteItem] = []
    while queues and len(drawn) < count:
        queue = queues.pop(0)
        turn = next(queue, None)
        if turn is not None:
            drawn.append(turn)
            queues.append(queue)
    return sorted(drawn, key=lambda item: (_shuffle(seed, "order " + (item.cluster or item_key(item))), item.id))


def num_uses(store: Store, agent: str) -> dict[str, int]:
    """How many decisions each item (by `item_key`) took part in."""
    with store.read() as connection:
        rows = connection.execute(select(item_uses).where(item_uses.c.agent == agent))
        return {row.item: row.uses for row in rows}


def num_retired(store: Store, agent: str, items: Iterable[SuiteItem], max_uses: int) -> int:
    """How many of these items took part in `max_uses` decisions and are drawn no more."""
    uses = num_uses(store, agent)
    return sum(uses.get(item_key(item), 0) >= max_uses for item in items)


def count_uses(connection: Connection, agent: str, items: Iterable[SuiteItem]) -> None:
    """Each of these items took part in one more decision."""
    for key in {item_key(item) for item in items}:
        here = (item_uses.c.agent == agent) & (item_uses.c.item == key)
        changed = connection.execute(update(item_uses).where(here).values(uses=item_uses.c.uses + 1))
        if changed.rowcount == 0:
            connection.execute(insert(item_uses).values(agent=agent, item=key, uses=1))


def _in_turn(strata: dict[str, list[tuple[int, str, SuiteItem]]]) -> Iterator[SuiteItem]:
    turns = deque(deque(sorted(strata[name], key=lambda row: row[:2])) for name in sorted(strata))
    while turns:
        stratum = turns.popleft()
        yield stratum.popleft()[2]
        if stratum:
            turns.append(stratum)


def _shuffle(seed: int, key: str) -> str:
    return hashlib.sha256(f"{seed} {key}".encode()).hexdigest()
