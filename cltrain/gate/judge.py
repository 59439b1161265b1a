"""One candidate before the gate: draw the items, ask the releases, probe the phrases, decide, remember.

Talks to servers through callables only. Whatever goes wrong on the way is Verdict.ERROR and never a promotion.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from cltrain.config import GateConfig
from cltrain.errors import DataError
from cltrain.gate.decision import decide
from cltrain.gate.futility import is_futile
from cltrain.gate.levels import Past
from cltrain.gate.pool import count_uses, draw, num_retired
from cltrain.gate.rows import Arriving, GateScores, ItemScores, Role
from cltrain.gate.scoring import Scoring
from cltrain.gate.suites import is_taught
from cltrain.gate.triggers import ProbeResult, ScoreMany, Suspect, make_probes, own_probes, run_probes
from cltrain.records import Check, Code, Decision, SuiteItem, Verdict
from cltrain.store.database import Store

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
    scoring: Scoring,
    base_kl: float | None,
    score_many: ScoreMany | None = None,
    suspects: Sequence[Suspect] = (),
    arriving: Arriving = (),
    seed: int = 0,
    used_before: Collection[str] = (),
    fresh_only: bool = False,
    past: Past = Past(),
    looks: Sequence[Look] = (),
    watch: Watch | None = None,
    on_chunk: Callable[[int, int], None] = lambda _done, _planned: None,
) -> Decision:
    """Compare the candidate with incumbent, high-water mark and anchor on items drawn from the pool.

    items: the whole pool, canaries included; taught: strata that the update learned; base_kl: nats per token on the
    pinned anchors; arriving: held-out episodes per second, for the forecast of a hold; used_before: ids this
    update was judged on already (`Decision.items_used`), which `fresh_only` leaves out; scoring: who asks and
    grades; past: what was decided before. `looks` come before the items, cheap first;
    `watch` sees the scored rows before every decision. Decides after every 50 items and stops early on harm, on success
    once every stratum was heard, or when the questions left cannot change a hold (`is_futile`).
    """
    past = replace(past, is_retry=fresh_only)  # fresh items, and half of alpha
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
        rows += _score_rows(scoring, contest, canaries)
        on_chunk(0, len(drawn))
        decision = decide(GateScores(tuple(rows), base_kl), config, taught=taught, arriving=arriving)
        if decision.verdict in (Verdict.REJECT, Verdict.ERROR):
            return decision
        findings = tuple(check for look in looks for check in look(contest))
        decision = decide(GateScores(tuple(rows), base_kl, (), findings), config, taught=taught, arriving=arriving)
        if decision.verdict in (Verdict.REJECT, Verdict.ERROR):
            return decision
        if (unsteady := scoring.unsteady(contest.incumbent, [*canaries, *drawn])) is not None:
            raise DataError(unsteady)
        for number, suspect in enumerate(suspects):
            probes += probe(suspect, items, contest, config, scoring, score_many, seed + number)
        done = 0
        for end in chunk_ends(drawn):
            rows += _score_rows(scoring, contest, drawn[done:end])
            cut = scoring.cut_check(contest.candidate, contest.incumbent, [row.item for row in rows])
            seen = watch(contest.candidate, contest.incumbent, rows) if watch is not None else ()
            scores = GateScores(tuple(rows), base_kl, tuple(probes), (*findings, *cut, *seen), planned=tuple(drawn))
            done, left = end, drawn[end:]
            decision = decide(scores, config, taught=taught, arriving=arriving, is_complete=not left, past=past)
            on_chunk(done, len(drawn))
            if decision.verdict in (Verdict.REJECT, Verdict.ERROR):
                break
            if decision.verdict is Verdict.PROMOTE and _all_heard(drawn, done, config, taught):
                break
            is_open = decision.verdict is Verdict.HOLD and bool(left)
            if is_open and is_futile(scores, decision, left, config, taught=taught, past=past):
                break
    except Exception as error:  # servers fail in every way there is; none of them may promote
        log.warning("the gate could not judge %s", contest.candidate, exc_info=True)
        code = Code.SUITE if isinstance(error, DataError) else Code.OUTAGE  # what a suite says, or that nobody answered
        return Decision(Verdict.ERROR, (f"{type(error).__name__}: {error}",), (), codes=(code,))
    used = [row.item for row in rows if row.item.kind != "canary"]
    asked = [item for item in items if item.kind != "canary"]
    if decision.verdict is Verdict.HOLD and (worn := num_retired(store, agent, asked, config.max_uses)):
        said = f"items: {worn} of {len(asked)} retired after gate.max_uses = {config.max_uses} decisions; add new ones"
        decision = replace(decision, reasons=(*decision.reasons, said), codes=(*decision.codes, Code.SUITE))
    if decision.verdict is not Verdict.ERROR:
        with store.write() as connection:
            count_uses(connection, agent, used)
    used_ids = tuple(item.id for item in used)
    return replace(decision, items_used=used_ids, num_planned=len(drawn), num_asked=len(used))


def chunk_ends(drawn: Sequence[SuiteItem]) -> list[int]:
    """After how many items the decision is asked: every CHUNK, but never between two items of one cluster."""
    ends: list[int] = []
    for end in range(1, len(drawn)):
        is_whole = drawn[end].cluster is None or drawn[end].cluster != drawn[end - 1].cluster
        if is_whole and end - (ends[-1] if ends else 0) >= CHUNK:
            ends.append(end)
    return [*ends, len(drawn)]


def probe(
    suspect: Suspect,
    items: Sequence[SuiteItem],
    contest: Contest,
    config: GateConfig,
    scoring: Scoring,
    score_many: ScoreMany | None,
    seed: int,
) -> list[ProbeResult]:
    """One phrase on held-out items, and on its own records where these are known."""
    found = []
    own = own_probes(suspect, config.trigger_probes)
    for probes, is_own in ((own, True), (make_probes(suspect, items, config.trigger_probes, seed), False)):
        if probes:
            result = run_probes(
                probes, candidate=contest.candidate, incumbent=contest.incumbent, answer_many=scoring.answer_many,
                score_many=score_many, is_own=is_own,
            )  # fmt: skip
            found.append(result)
        elif not is_own:
            found.append(ProbeResult(0, 0, None))
    return found


def _score_rows(scoring: Scoring, contest: Contest, items: Sequence[SuiteItem]) -> list[ItemScores]:
    candidate = scoring.score_items(contest.candidate, items)
    by_release: dict[str, list[float]] = {}
    roles: dict[Role, list[float]] = {}
    holders: Mapping[Role, str] = {
        "incumbent": contest.incumbent,
        "high_water": contest.high_water,
        "anchor": contest.anchor,
    }
    for role, release in holders.items():
        if release not in by_release:  # one release in two roles is compared once
            by_release[release] = roles[role] = scoring.score_items(release, items)
    return [
        ItemScores(item, candidate[i], {role: values[i] for role, values in roles.items()})
        for i, item in enumerate(items)
    ]


def _all_heard(drawn: Sequence[SuiteItem], done: int, config: GateConfig, taught: Collection[str]) -> bool:
    """Whether every untaught stratum has been scored far enough for its guard, or as far as it was drawn."""
    heard = Counter(stratum for stratum, _ in {(item.stratum, item.cluster or item.id) for item in drawn[:done]})
    left = Counter(item.stratum for item in drawn[done:])
    return all(
        is_taught(stratum, taught) or heard[stratum] >= config.stratum_min_items
        for stratum, count in left.items()
        if count
    )
