"""Token rows without padding: segments side by side in buckets of fixed sizes, and branches of one episode as a tree.

A segment is a trie of its branches in depth-first order. The token at place k is seen by the places q with
k <= q < ends[k], its descendants; a single row is a trie with one branch. That one rule, with positions by depth and
each prediction weighted by all branches that make it, gives exactly the loss and the gradients of the branches run one
by one. Common prefixes are found token by token and never assumed. T tokens of a bucket, M predictions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence. `weights[t]` weighs the loss of predicting token t from those before it; the first has none."""

    ids: tuple[int, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.ids or len(self.ids) != len(self.weights):
            raise ValueError(f"a row needs ids and a weight for each; got {len(self.ids)} and {len(self.weights)}")


@dataclass(frozen=True, slots=True)
class Chain:
    """Places `begin` to `end` of a trie, each the only child of the one before; `above`, from the root on, are the
    chains that its tokens see beside their own."""

    begin: int
    end: int
    above: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Segment:
    """A trie of rows, depth first; all places are relative to its beginning."""

    ids: tuple[int, ...]
    positions: tuple[int, ...]
    ends: tuple[int, ...]  # one past the last descendant
    predictions: tuple[tuple[int, int, float], ...]  # (from which place, which token, weight)
    chains: tuple[Chain, ...]
    paths: tuple[tuple[int, ...], ...]  # of each row: the chains that it is made of, the last one perhaps in part
    num_flat: int  # tokens of its rows one by one

    @property
    def size(self) -> Bucket:
        """What it takes of a bucket; of segments one for each trie, if its rows do not all begin alike."""
        return Bucket(len(self.ids), len(self.predictions), sum(not chain.above for chain in self.chains))

    def places(self, row: int) -> list[int]:
        """Where the tokens of a row lie, in order (and those behind them in its last chain)."""
        return [place for i in self.paths[row] for place in range(self.chains[i].begin, self.chains[i].end)]


def segment(rows: Sequence[Row], min_shared: int = 1) -> Segment:
    """The trie of rows that may share prefixes, in order of first appearance. Raises ValueError without a row.

    Rows part only behind `min_shared` tokens of their own branch: a shorter common beginning is there several times.
    """
    if not rows:
        raise ValueError("a segment needs at least one row")
    ids: list[int] = []
    positions: list[int] = []
    chains: list[Chain] = []
    paths: list[tuple[int, ...]] = [()] * len(rows)
    # Rows that are equal up to `depth`, of which the chains `above` hold `begin` tokens.
    left: list[tuple[list[int], int, int, tuple[int, ...]]] = [
        (members, 0, 0, ()) for members in reversed(_by_token(rows, range(len(rows)), 0))
    ]
    while left:
        members, begin, depth, above = left.pop()
        longest = max(members, key=lambda i: len(rows[i].ids))
        parting = min(_parting(rows[longest].ids, rows[i].ids, depth) for i in members)
        is_leaf = parting == len(rows[longest].ids)
        if is_leaf or parting - begin >= min_shared:
            chains.append(Chain(len(ids), len(ids) + parting - begin, above))
            ids += rows[longest].ids[begin:parting]
            positions += range(begin, parting)
            begin, above = parting, (*above, len(chains) - 1)
            for i in members:
                paths[i] = above
            members = [i for i in members if len(rows[i].ids) > parting]
        ended = [([i], begin, parting, above) for i in members if len(rows[i].ids) <= parting]
        going_on = _by_token(rows, [i for i in members if len(rows[i].ids) > parting], parting)
        left += reversed([*ended, *((group, begin, parting, above) for group in going_on)])
    return Segment(
        tuple(ids), tuple(positions), tuple(_ends(chains)), _predictions(rows, chains, paths), tuple(chains),
        tuple(paths), sum(len(row.ids) for row in rows),
    )  # fmt: skip


def _by_token(rows: Sequence[Row], members: Sequence[int], depth: int) -> list[list[int]]:
    groups: dict[int, list[int]] = {}
    for i in members:
        groups.setdefault(rows[i].ids[depth], []).append(i)
    return list(groups.values())


def _parting(long: tuple[int, ...], other: tuple[int, ...], depth: int) -> int:
    """The first place from `depth` on where both have a token and not the same; the length of `long` without one."""
    if long[depth : len(other)] == other[depth:]:
        return len(long)
    low, high = depth, len(other)  # equal below low, not equal up to high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if long[low:middle] == other[low:middle] else (low, middle)
    return low


def _ends(chains: Sequence[Chain]) -> list[int]:
    last = [chain.end for chain in chains]
    for i in range(len(chains) - 1, -1, -1):
        if chains[i].above:
            last[chains[i].above[-1]] = max(last[chains[i].above[-1]], last[i])
    return [end for chain, end in zip(chains, last, strict=True) for _ in range(chain.begin, chain.end)]


def _predictions(
    rows: Sequence[Row], chains: Sequence[Chain], paths: Sequence[tuple[int, ...]]
) -> tuple[tuple[int, int, float], ...]:
    """In the order of the places of what is predicted."""
    found: dict[int, tuple[int, int, float]] = {}
    for row, path in zip(rows, paths, strict=True):
        places = [place for i in path for place in range(chains[i].begin, chains[i].end)]
        for t in range(1, len(row.ids)):
            if row.weights[t]:
                before = found[places[t]][2] if places[t] in found else 0.0
                found[places[t]] = (places[t - 1], row.ids[t], before + row.weights[t])
    return tuple(found[place] for place in sorted(found))


@dataclass(frozen=True, slots=True)
class Packed:
    """Segments in one bucket. What is left over is dead places that no other sees, and weights of zero.

    `starts` are the tries' beginnings, one more at the end of what is used and then the bucket's size as often as
    there is room for further segments: cumulative lengths of a fixed number of segments, most of them empty.
    """

    ids_T: Tensor
    positions_T: Tensor
    ends_T: Tensor
    starts_S: Tensor  # int32
    sources_M: Tensor  # places whose hidden state predicts
    targets_M: Tensor
    weights_M: Tensor  # float32
    chains: tuple[Chain, ...]  # the dead places are the last one
    num_used: int
    num_flat: int
    is_tree: bool

    @property
    def bucket(self) -> Bucket:
        return Bucket(len(self.ids_T), len(self.sources_M), len(self.starts_S) - 2)

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        sizes = [chain.end - chain.begin for chain in self.chains]
        used = [(i, *chain.above) for i, chain in enumerate(self.chains) if chain.begin < self.num_used]
        return max(sum(sizes[i] for i in row) for row in used)


@dataclass(frozen=True, slots=True, order=True)
class Bucket:
    """A shape that batches are padded to: tokens, predictions, segments."""

    num_tokens: int
    num_predictions: int
    num_segments: int


def pack(segments: Sequence[Segment], bucket: Bucket) -> Packed:
    """The segments side by side. Raises ValueError when they do not fit the bucket or predict nothing."""
    used = _total(segments)
    if not fits(used, bucket):
        raise ValueError(f"{used} does not fit {bucket}: take a larger bucket or fewer rows")
    if not used.num_predictions:
        raise ValueError("no supervised token: every weight is zero, there is nothing to learn from")
    ids: list[int] = []
    positions: list[int] = []
    ends: list[int] = []
    chains: list[Chain] = []
    predictions: list[tuple[int, int, float]] = []
    for one in segments:
        begin, num_chains = len(ids), len(chains)
        ids += one.ids
        positions += one.positions
        ends += [begin + end for end in one.ends]
        predictions += [(begin + source, target, weight) for source, target, weight in one.predictions]
        chains += [
            Chain(begin + chain.begin, begin + chain.end, tuple(num_chains + i for i in chain.above))
            for chain in one.chains
        ]
    is_tree = any(chain.above for chain in chains)
    starts = [*(chain.begin for chain in chains if not chain.above), len(ids)]
    if len(ids) < bucket.num_tokens:
        chains.append(Chain(len(ids), bucket.num_tokens, ()))
    num_dead = bucket.num_tokens - len(ids)
    ends += range(len(ids) + 1, bucket.num_tokens + 1)
    starts += [bucket.num_tokens] * (bucket.num_segments + 2 - len(starts))
    predictions += [(0, 0, 0.0)] * (bucket.num_predictions - len(predictions))
    sources, targets, weights = zip(*predictions, strict=True)
    return Packed(
        torch.tensor([*ids, *[0] * num_dead]),
        torch.tensor([*positions, *[0] * num_dead]),
        torch.tensor(ends),
        torch.tensor(starts, dtype=torch.int32),
        torch.tensor(sources),
        torch.tensor(targets),
        torch.tensor(weights, dtype=torch.float32),
        tuple(chains),
        used.num_tokens,
        sum(one.num_flat for one in segments),
        is_tree,
    )


def _total(segments: Sequence[Segment]) -> Bucket:
    sizes = [one.size for one in segments]
    return Bucket(
        sum(size.num_tokens for size in sizes),
        sum(size.num_predictions for size in sizes),
        sum(size.num_segments for size in sizes),
    )


def fits(used: Bucket, bucket: Bucket) -> bool:
    return (
        used.num_tokens <= bucket.num_tokens
        and used.num_predictions <= bucket.num_predictions
        and used.num_segments <= bucket.num_segments
    )


def pack_all(segments: Sequence[Segment], buckets: Sequence[Bucket]) -> list[Packed]:
    """All segments in as few of the largest bucket as first-fit by falling length finds, each then cut to the smallest
    bucket that holds it. Raises ValueError for a segment that no bucket holds, and where nothing is predicted."""
    largest = max(buckets)
    bins: list[list[int]] = []
    room: list[Bucket] = []
    for i in sorted(range(len(segments)), key=lambda i: (-len(segments[i].ids), i)):
        need = segments[i].size
        if not fits(need, largest):
            raise ValueError(
                f"segment {i} has {need.num_tokens} tokens and {need.num_predictions} predictions; the largest bucket "
                f"takes {largest.num_tokens} and {largest.num_predictions}: add a bucket or shorten the row"
            )
        chosen = next((b for b, left in enumerate(room) if fits(need, left)), len(bins))
        if chosen == len(bins):
            bins.append([])
            room.append(largest)
        bins[chosen].append(i)
        left = room[chosen]
        room[chosen] = Bucket(
            left.num_tokens - need.num_tokens,
            left.num_predictions - need.num_predictions,
            left.num_segments - need.num_segments,
        )
    packed = []
    for members in bins:
        chosen_segments = [segments[i] for i in sorted(members)]
        if any(one.predictions for one in chosen_segments):
            packed.append(pack(chosen_segments, smallest_bucket(chosen_segments, buckets)))
    if not packed:
        raise ValueError("no supervised token: every weight is zero, there is nothing to learn from")
    return packed


def smallest_bucket(segments: Sequence[Segment], buckets: Sequence[Bucket]) -> Bucket:
    """The smallest bucket that holds these segments together. Raises ValueError when none does."""
    used = _total(segments)
    for bucket in sorted(buckets):
        if fits(used, bucket):
            return bucket
    raise ValueError(f"{used} fits no bucket (the largest is {max(buckets)}): add a bucket or take fewer rows")


def ratios(packed: Sequence[Packed]) -> dict[str, float]:
    """Tokens of the rows one by one over those of the tries (`ratio_tree`), and the part of the buckets that is used
    (`fill`)."""
    num_used = sum(one.num_used for one in packed)
    return {
        "ratio_tree": sum(one.num_flat for one in packed) / num_used,
        "fill": num_used / sum(len(one.ids_T) for one in packed),
    }


def moved(packed: Packed, device: torch.device) -> Packed:
    """A copy of a bucket's tensors on a device."""
    values = {field.name: getattr(packed, field.name) for field in fields(packed)}
    tensors: Any = {name: x.to(device, copy=True) for name, x in values.items() if isinstance(x, Tensor)}
    return replace(packed, **tensors)
