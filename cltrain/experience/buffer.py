"""The replay buffer: per stratum the k records with the smallest keyed hash, of those that were learned and verified
and that the adapter which had just learned their stratum agrees with.

No principal has more than its quota of the k slots. Uniform within a principal, whatever the order of arrival; deleting
a record touches its own slot only, and the next one moves up. What has no slot stays in the store: nothing is evicted.
"""

from __future__ import annotations

import hashlib
import hmac
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from sqlalchemy import select as query

from cltrain.config import ExperienceConfig
from cltrain.errors import guarded
from cltrain.experience.examples import POOLED, example_of
from cltrain.experience.reading import read_trajectories
from cltrain.experience.verify import verify
from cltrain.records import Example, TokenRow, Trajectory, is_claim
from cltrain.store.database import Store
from cltrain.store.schema import records, screenings, updates

SURE = 0.5  # above it greedy decoding is certain to write the token


def select(strata: Mapping[str, Iterable[str]], k: int, key: bytes) -> dict[str, list[str]]:
    """The k record ids of each stratum with the smallest HMAC under `key`, smallest first, in whatever order given."""
    return {
        stratum: sorted(set(ids), key=lambda record: (_hash(key, record), record))[:k]
        for stratum, ids in strata.items()
    }


def doubtful(
    fresh: Sequence[TokenRow],
    replay: Sequence[TokenRow],
    taught: Collection[str],
    log_probs_of: Callable[[Sequence[TokenRow]], Sequence[Sequence[float]]],
    max_share: float,
) -> frozenset[str]:
    """The records that an adapter which has just learned `fresh` would not repeat: probably mislabelled, and not to be
    rehearsed, or no longer.

    Not repeated is what has a token that the adapter (`log_probs_of`) gives less than SURE. Each stratum of `fresh` is
    judged together with what is rehearsed of it. Where more than `max_share` of it is not repeated, the adapter does
    not know that work yet, and nothing of it is doubted. What was rehearsed is only doubted in the strata `taught` just
    now: elsewhere, what is forgotten would look the same.
    """
    strata = {row.stratum for row in fresh}
    rows = [row for row in (*fresh, *replay) if row.stratum in strata and is_claim(row)]
    worst = [min(values, default=0.0) for values in (log_probs_of(rows) if rows else ())]
    unsure = [row for row, value in zip(rows, worst, strict=True) if value < math.log(SURE)]
    sizes, num_unsure = (Counter(row.stratum for row in its) for its in (rows, unsure))
    new = {row.record for row in fresh}
    return frozenset(
        row.record
        for row in unsure
        if num_unsure[row.stratum] <= max_share * sizes[row.stratum] and (row.record in new or row.stratum in taught)
    )


def replay_examples(
    store: Store,
    agent: str,
    config: ExperienceConfig,
    secret: bytes,
    *,
    learn_from: Sequence[str],
    tools_allowed: Sequence[str] | None,
) -> list[Example]:
    """What may be rehearsed: records with screening `replay` (their update was promoted) that still pass `verify`.

    At most `buffer_per_stratum` of each stratum; strata with fewer than `rare_stratum` records share `other`. Each is
    as it was when learned: feedback that came after its update began does not change it. Order: stratum, then hash.

    A principal has at most floor(principal_quota * buffer_per_stratum) slots of a stratum or of `other`, at least 1,
    also where nobody else would take the rest: a stratum that one principal alone taught is rehearsed with that many
    records and its other slots stay free. So a flood buys no more than these slots, however long it goes on. The
    owner's rehearsal episodes are not among these records and know no quota.
    """
    principals, strata, learned_at = _admitted(store, agent)
    pooled: dict[str, list[str]] = {}
    for stratum, ids in strata.items():
        pooled.setdefault(stratum if len(ids) >= config.rare_stratum else POOLED, []).extend(ids)
    num_slots = config.buffer_per_stratum
    cap = max(1, int(config.principal_quota * num_slots))
    chosen: list[Example] = []
    for stratum, ids in sorted(select(pooled, max(map(len, pooled.values()), default=0), secret).items()):
        kept: list[Example] = []
        seen: Counter[str] = Counter()
        while len(kept) < num_slots:  # one that no longer qualifies gives its slot to the next
            ids = [record for record in ids if seen[principals[record]] < cap]
            batch, ids = ids[:num_slots], ids[num_slots:]
            if not batch:
                break
            examples = _rebuilt(store, agent, batch, learned_at, learn_from, tools_allowed)
            for record in batch:
                if record in examples and seen[principals[record]] < cap and len(kept) < num_slots:
                    seen[principals[record]] += 1
                    kept.append(replace(examples[record], stratum=stratum))
        chosen += kept
    return chosen


def learned_examples(
    store: Store,
    agent: str,
    records_in: Collection[str],
    *,
    learn_from: Sequence[str],
    tools_allowed: Sequence[str] | None,
) -> list[Example]:
    """Those of these records that the agent may rehearse, in the order given, each as it was when it was learned."""
    _, strata, learned_at = _admitted(store, agent)
    admitted = {record for ids in strata.values() for record in ids}
    ids = [record for record in records_in if record in admitted]
    found = _rebuilt(store, agent, ids, learned_at, learn_from, tools_allowed)
    return [found[record] for record in ids if record in found]


def _admitted(store: Store, agent: str) -> tuple[dict[str, str], dict[str, list[str]], dict[str, float]]:
    """Each record's principal, the records of each stratum, and until when feedback on each counts."""
    columns = (screenings.c.record, screenings.c.stratum, screenings.c.changed_at, records.c.principal)
    joined = screenings.join(records, records.c.id == screenings.c.record)
    joined = joined.outerjoin(updates, updates.c.id == screenings.c["update"])
    rows = query(*columns, updates.c.started_at).select_from(joined)
    principals: dict[str, str] = {}
    strata: dict[str, list[str]] = {}
    learned_at: dict[str, float] = {}
    with store.read() as connection:
        for row in connection.execute(rows.where(screenings.c.agent == agent, screenings.c.status == "replay")):
            principals[row.record] = row.principal
            strata.setdefault(row.stratum or POOLED, []).append(row.record)
            learned_at[row.record] = row.changed_at if row.started_at is None else row.started_at
    return principals, strata, learned_at


def _rebuilt(
    store: Store,
    agent: str,
    ids: Sequence[str],
    learned_at: Mapping[str, float],
    learn_from: Sequence[str],
    tools_allowed: Sequence[str] | None,
) -> dict[str, Example]:
    def rebuilt(trajectory: Trajectory) -> Example | str:
        known = tuple(f for f in trajectory.feedback if f.created_at <= learned_at[trajectory.id])
        example = example_of(replace(trajectory, feedback=known), learn_from=learn_from, tools_allowed=tools_allowed)
        return example if isinstance(example, str) else verify(example, tools_allowed=tools_allowed) or example

    found = {t.id: guarded(rebuilt, t) for t in read_trajectories(store, agent, records_in=ids)}
    return {record: example for record, example in found.items() if isinstance(example, Example)}


def _hash(key: bytes, record: str) -> bytes:
    return hmac.new(key, b"replay/" + record.encode(), hashlib.sha256).digest()
