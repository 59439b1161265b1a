"""Token rows without padding: segments side by side in buckets of fixed sizes, and branches of one episode as a tree.

A segment is a trie of its branches in depth-first order. The token at place k is seen by the places q with
k <= q < ends[k], its descendants; a single row is a trie with one branch. That one rule, with positions by depth and
each prediction weighted by all branches that make it, gives exactly the loss and the gradients of the branches run one
by one. Common prefixes are found token by token and never assumed. T tokens of a bucket, M predictions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
class Segment:
    """A trie of rows, depth first; all places are relative to its beginning."""

    ids: tuple[int, ...]
    positions: tuple[int, ...]
    ends: tuple[int, ...]  # one past the last descendant
    predictions: tuple[tuple[int, int, float], ...]  # (from which place, which token, weight)
    num_flat: int  # tokens of its rows one by one


def segment(rows: Sequence[Row]) -> Segment:
    """The trie of rows that may share prefixes, in order of first appearance. Raises ValueError without a row."""
    if not rows:
        raise ValueError("a segment needs at least one row")
    ids: list[int] = []
    positions: list[int] = []
    parents: list[int] = []
    weights: list[float] = []
    children: list[dict[int, int]] = [{}]  # of the root, then of each node
    for row in rows:
        node = -1
        for depth, (token, weight) in enumerate(zip(row.ids, row.weights, strict=True)):
            below = children[node + 1].get(token)
            if below is None:
                below = children[node + 1][token] = len(ids)
                ids.append(token)
                positions.append(depth)
                parents.append(node)
                weights.append(0.0)
                children.append({})
            weights[below] += weight
            node = below
    order = _depth_first(children)
    place = {node: i for i, node in enumerate(order)}
    ends = [i + 1 for i in range(len(order))]
    for i in range(len(order) - 1, -1, -1):
        if (parent := parents[order[i]]) >= 0:
            ends[place[parent]] = max(ends[place[parent]], ends[i])
    predictions = [
        (place[parents[node]], ids[node], weights[node]) for node in order if parents[node] >= 0 and weights[node]
    ]
    return Segment(
        tuple(ids[node] for node in order), tuple(positions[node] for node in order), tuple(ends), tuple(predictions),
        sum(len(row.ids) for row in rows),
    )  # fmt: skip


def _depth_first(children: Sequence[dict[int, int]]) -> list[int]:
    order, stack = [], list(reversed(children[0].values()))
    while stack:
        node = stack.pop()
        order.append(node)
        stack += reversed(children[node + 1].values())
    return order


@dataclass(frozen=True, slots=True)
class Packed:
    """Segments in one bucket. What is left over is dead places that see only themselves and weights of zero.

    `starts` are the segments' beginnings, one more at the end of what is used and then the bucket's size as often as
    there is room for further segments: cumulative lengths of a fixed number of segments, most of them empty.
    """

    ids_T: Tensor
    positions_T: Tensor
    ends_T: Tensor
    starts_S: Tensor  # int32
    sources_M: Tensor  # places whose hidden state predicts
    targets_M: Tensor
    weights_M: Tensor  # float32
    num_used: int
    num_flat: int
    is_tree: bool

    @property
    def bucket(self) -> Bucket:
        return Bucket(len(self.ids_T), len(self.sources_M), len(self.starts_S) - 2)


@dataclass(frozen=True, slots=True, order=True)
class Bucket:
    """A shape that batches are padded to: tokens, predictions, segments."""

    num_tokens: int
    num_predictions: int
    num_segments: int


def pack(segments: Sequence[Segment], bucket: Bucket) -> Packed:
    """The segments side by side. Raises ValueError when they do not fit the bucket or predict nothing."""
    used = Bucket(sum(len(one.ids) for one in segments), sum(len(one.predictions) for one in segments), len(segments))
    if not fits(used, bucket):
        raise ValueError(f"{used} does not fit {bucket}: take a larger bucket or fewer rows")
    if not used.num_predictions:
        raise ValueError("no supervised token: every weight is zero, there is nothing to learn from")
    ids: list[int] = []
    positions: list[int] = []
    ends: list[int] = []
    starts = [0]
    predictions: list[tuple[int, int, float]] = []
    for one in segments:
        begin = starts[-1]
        ids += one.ids
        positions += one.positions
        ends += [begin + end for end in one.ends]
        predictions += [(begin + source, target, weight) for source, target, weight in one.predictions]
        starts.append(begin + len(one.ids))
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
        used.num_tokens,
        sum(one.num_flat for one in segments),
        any(end != len(one.ids) for one in segments for end in one.ends),
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
        need = Bucket(len(segments[i].ids), len(segments[i].predictions), 1)
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
            left.num_tokens - need.num_tokens, left.num_predictions - need.num_predictions, left.num_segments - 1
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
    used = Bucket(sum(len(one.ids) for one in segments), sum(len(one.predictions) for one in segments), len(segments))
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
