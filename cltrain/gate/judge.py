"""One candidate before the gate: draw the items, ask the releases, probe the phrases, decide, remember.

Talks to servers through callables only. Whatever goes wrong on the way is Verdict.ERROR and never a promotion.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from sqlalchemy import delete, insert, select

from cltrain.config import GateConfig
from cltrain.gate.decision import GateScores, ItemScores, Role, decide
from cltrain.gate.pool import count_uses, draw
from cltrain.gate.scorers import VERSION, score_item
from cltrain.gate.suites import is_taught, item_key
from cltrain.gate.triggers import AnswerMany, ProbeResult, ScoreMany, Suspect, make_probes, own_probes, run_probes
from cltrain.records import Check, Code, Decision, SuiteItem, Verdict
from cltrain.store.database import Store
from cltrain.store.schema import item_scores

CHUNK = 50  # items scored between two looks

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Contest:
    """Which releases are compared. Several roles may be held by one release."""

    candidate: str
    incumbent: str
    high_water: str
    anchor: str


Look = Callable[[Contest], Sequence[Check]]
"""Something that asks for itself, before the items; what it finds joins the decision."""

Watch = Callable[[str, str, Sequence[ItemScores]], Sequence[Check]]
"""(candidate, incumbent, all rows scored so far) -> what the answers say besides their scores."""


def judge(
    store: Store,
    agent: str,
    contest: Contest,
    items: Sequence[SuiteItem],
    config: GateConfig,
    *,
    taught: Collection[str],
    answer_many: AnswerMany,
    base_kl: float | None,
    score_many: ScoreMany | None = None,
    suspects: Sequence[Suspect] = (),
    rate_per_s: float | None = None,
    seed: int = 0,
    used_before: Collection[str] = (),
    fresh_only: bool = False,
    looks: Sequence[Look] = (),
    watch: Watch = lambda _candidate, _incumbent, _rows: (),
    on_chunk: Callable[[int, int], None] = lambda _done, _planned: None,
) -> Decision:
    """Compare the candidate with incumbent, high-water mark and anchor on items drawn from the pool.

    items: the whole pool, canaries included; taught: strata that the update learned; base_kl: nats per token on the
    pinned anchors; rate_per_s: held-out items arriving per second, for the forecast of a hold; used_before: ids this
    update was judged on already (`Decision.items_used`), which `fresh_only` leaves out. Scores are cached per release
    and item. Decides after every 50 items and stops early on harm, or on success once every stratum was heard. `looks`
    come before the items, cheap first; `watch` sees the scored rows before every decision.
    """
    drawn = draw(
        store,
        agent,
        items,
        config.items_per_gate,
        taught=taught,
        max_uses=config.max_uses,
        seed=seed,
        exclude=used_before if fresh_only else (),
    )
    canaries = [item for item in items if item.kind == "canary"]
    rows: list[ItemScores] = []
    probes: list[ProbeResult] = []
    try:
        rows += _score_rows(store, contest, canaries, config, answer_many)
        on_chunk(0, len(drawn))
        decision = decide(GateScores(tuple(rows), base_kl), config, taught=taught, rate_per_s=rate_per_s)
        if decision.verdict in (Verdict.REJECT, Verdict.ERROR):
            return decision
        findings = tuple(check for look in looks for check in look(contest))
        decision = decide(GateScores(tuple(rows), base_kl, (), findings), config, taught=taught, rate_per_s=rate_per_s)
        if decision.verdict in (Verdict.REJECT, Verdict.ERROR):
            return decision
        for number, suspect in enumerate(suspects):
            probes += _probe(suspect, items, contest, config, answer_many, score_many, seed + number)
        for start in range(0, max(1, len(drawn)), CHUNK):
            rows += _score_rows(store, contest, drawn[start : start + CHUNK], config, answer_many)
            seen = watch(contest.candidate, contest.incumbent, rows)
            scores = GateScores(tuple(rows), base_kl, tuple(probes), (*findings, *seen))
            done = min(start + CHUNK, len(drawn))
            is_complete = done == len(drawn)
            decision = decide(scores, config, taught=taught, rate_per_s=rate_per_s, is_complete=is_complete)
            on_chunk(done, len(drawn))
            if decision.verdict in (Verdict.REJECT, Verdict.ERROR):
                break
            if decision.verdict is Verdict.PROMOTE and _all_heard(drawn, done, config, taught):
                break
    except Exception as error:  # servers fail in every way there is; none of them may promote
        log.warning("the gate could not judge %s", contest.candidate, exc_info=True)
        return Decision(Verdict.ERROR, (f"{type(error).__name__}: {error}",), (), codes=(Code.OUTAGE,))
    used = [row.item for row in rows if row.item.kind != "canary"]
    if decision.verdict is not Verdict.ERROR:
        with store.write() as connection:
            count_uses(connection, agent, used)
    return replace(decision, items_used=tuple(item.id for item in used))


def _probe(
    suspect: Suspect,
    items: Sequence[SuiteItem],
    contest: Contest,
    config: GateConfig,
    answer_many: AnswerMany,
    score_many: ScoreMany | None,
    seed: int,
) -> list[ProbeResult]:
    """One phrase on held-out items, and on its own records where these are known."""
    found = []
    own = own_probes(suspect, config.trigger_probes)
    for probes, is_own in ((own, True), (make_probes(suspect, items, config.trigger_probes, seed), False)):
        if probes:
            result = run_probes(
                probes, candidate=contest.candidate, incumbent=contest.incumbent, answer_many=answer_many,
                score_many=score_many, is_own=is_own,
            )  # fmt: skip
            found.append(result)
        elif not is_own:
            found.append(ProbeResult(0, 0, None))
    return found


def _score_rows(
    store: Store, contest: Contest, items: Sequence[SuiteItem], config: GateConfig, answer_many: AnswerMany
) -> list[ItemScores]:
    candidate = _scores(store, contest.candidate, items, config, answer_many)
    by_release: dict[str, list[float]] = {}
    roles: dict[Role, list[float]] = {}
    holders: Mapping[Role, str] = {
        "incumbent": contest.incumbent,
        "high_water": contest.high_water,
        "anchor": contest.anchor,
    }
    for role, release in holders.items():
        if release not in by_release:  # one release in two roles is compared once
            by_release[release] = roles[role] = _scores(store, release, items, config, answer_many)
    return [
        ItemScores(item, candidate[i], {role: values[i] for role, values in roles.items()})
        for i, item in enumerate(items)
    ]


def _scores(
    store: Store, release: str, items: Sequence[SuiteItem], config: GateConfig, answer_many: AnswerMany
) -> list[float]:
    """Scores of one release, asked only where the store does not know them. Raises ValueError for missing answers."""
    keys = [f"{item_key(item)}~{VERSION}~{config.max_answer_tokens}" for item in items]
    with store.read() as connection:
        query = select(item_scores).where(item_scores.c.release == release, item_scores.c.item.in_(keys))
        known = {row.item: row.score for row in connection.execute(query)}
    unknown = [(key, item) for key, item in zip(keys, items, strict=True) if key not in known]
    if unknown:
        answers = answer_many(release, [item for _, item in unknown])
        num_missing = abs(len(unknown) - len(answers)) + sum(answer is None for answer in answers)
        if num_missing:
            raise ValueError(f"{release} left {num_missing} of {len(unknown)} questions unanswered")
        new = {
            key: score_item(item, answer)
            for (key, item), answer in zip(unknown, answers, strict=True)
            if answer is not None
        }
        with store.write() as connection:
            connection.execute(delete(item_scores).where(item_scores.c.release == release, item_scores.c.item.in_(new)))
            rows = [{"release": release, "item": key, "score": value} for key, value in new.items()]
            connection.execute(insert(item_scores), rows)
        known.update(new)
    return [known[key] for key in keys]


def _all_heard(drawn: Sequence[SuiteItem], done: int, config: GateConfig, taught: Collection[str]) -> bool:
    """Whether every untaught stratum has been scored far enough for its guard, or as far as it was drawn."""
    heard = Counter(item.stratum for item in drawn[:done])
    left = Counter(item.stratum for item in drawn[done:])
    return all(
        is_taught(stratum, taught) or heard[stratum] >= config.stratum_min_items
        for stratum, count in left.items()
        if count
    )
