"""Which rows fill which slot of which step: pure functions of (seed, step, slot), so an update can resume anywhere and
be replayed without a record. Imports no torch.

Within a pool every row is used once before any is used twice, in an order hashed anew for every pass.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from cltrain.records import TokenRow


@dataclass(frozen=True, slots=True)
class Draw:
    """The row of one slot: `pool` is "fresh", "replay" or "anchor", `index` a place in that pool."""

    slot: int
    pool: str
    index: int


class Draws:
    """The plan of one update. Independent of the order in which rows are handed in."""

    def __init__(self, seed: int, fresh: Sequence[TokenRow], replay: Sequence[TokenRow], num_anchors: int) -> None:
        self.seed = seed
        self.fresh, self.replay, self.num_anchors = fresh, replay, num_anchors
        self._orders: dict[tuple[str, int], list[int]] = {}
        self._keys = {"fresh": _names(fresh), "replay": _names(replay), "anchor": [str(i) for i in range(num_anchors)]}
        self._strata: dict[str, list[int]] = {}
        for i, row in enumerate(replay):
            self._strata.setdefault(row.stratum, []).append(i)

    def batch(self, step: int, batch_size: int, replay_share: float) -> list[Draw]:
        """The draws of one step: fresh slots first, then replay slots, a stratum each in turn while it lasts."""
        num_replay = min(round(batch_size * replay_share), batch_size - 1) if self.replay else 0
        num_fresh = batch_size - num_replay
        draws = [Draw(slot, "fresh", self._pick("fresh", step * num_fresh + slot)) for slot in range(num_fresh)]
        return draws + [Draw(num_fresh + i, "replay", self._replayed(step * num_replay + i)) for i in range(num_replay)]

    def anchors(self, step: int, num_rows: int) -> list[int]:
        """Anchor rows of one step, without repeats inside it when there are enough."""
        num_rows = min(num_rows, self.num_anchors)
        return [self._pick("anchor", step * num_rows + slot) for slot in range(num_rows)]

    def _replayed(self, count: int) -> int:
        """Strata take turns while they last: a stratum of one record, often a mislabelled one, is heard once a pass and
        not as often as a full one."""
        again, place = divmod(count, len(self.replay))
        order = self._orders.get(("replay", again))
        if order is None:
            keys = self._keys["replay"]
            ranked: list[tuple[int, bytes, int]] = []
            for stratum, members in self._strata.items():
                shuffled = sorted(members, key=lambda i: _hash(self.seed, f"replay\0{stratum}", again, keys[i]))
                ranked += [
                    (turn, _hash(self.seed, "turn", again, f"{turn} {stratum}"), i) for turn, i in enumerate(shuffled)
                ]
            order = self._orders[("replay", again)] = [i for _, _, i in sorted(ranked)]
        return order[place]

    def _pick(self, pool: str, count: int) -> int:
        """The `count`-th draw from a pool: a new hashed order after each pass through all of it."""
        keys = self._keys[pool]
        again, place = divmod(count, len(keys))
        order = self._orders.get((pool, again))
        if order is None:
            order = sorted(range(len(keys)), key=lambda i: _hash(self.seed, f"{pool}\0", again, keys[i]))
            self._orders[(pool, again)] = order
        return order[place]


def _names(rows: Sequence[TokenRow]) -> list[str]:
    """One name per row: its record and content. Identical rows share a name and are interchangeable."""
    return [f"{row.record}\0{hashlib.sha256(repr(row).encode()).hexdigest()}" for row in rows]


def _hash(seed: int, pool: str, count: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed}\0{pool}\0{count}\0{name}".encode()).digest()
