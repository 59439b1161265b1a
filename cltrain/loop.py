"""One update, from the incumbent to a verdict: read this file first. Stages meet here and nowhere else.

`run_update` fixes what will be read and writes it down (plans.py); `finish` trains, seals, checks, loads, proves,
judges and concludes. A crash anywhere leaves a plan that `finish` carries on with, or that is discarded whole.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from cltrain import culprits, plans, sharing, staleness, unfinished
from cltrain.deploy import probes, proof, readiness
from cltrain.errors import ConflictError, guarded
from cltrain.experience import window
from cltrain.experience.buffer import doubtful, replay_examples
from cltrain.experience.screens import screen, within_shares
from cltrain.gate.decision import moves_high_water
from cltrain.models.adapter import read_adapter
from cltrain.models.base import Base
from cltrain.models.chat import render_rows
from cltrain.models.forward import check_row
from cltrain.models.scoring import token_log_probs
from cltrain.plans import Plan
from cltrain.records import (
    Alias,
    Aside,
    Candidate,
    Code,
    Decision,
    Example,
    LearningMode,
    Release,
    TokenRow,
    Verdict,
)
from cltrain.registry import aliases, releases, rollouts
from cltrain.registry.lease import require_fence
from cltrain.registry.tenants import incumbent
from cltrain.rooms import (
    Rooms,
    adapter_of,
    day_is_spent,
    memory_of,
    prove,
    required_ready,
    spent_today,
    tidy_server,
    under,
)
from cltrain.trainer.update import UpdateDiscarded, check_continues, train_update

MOST_OF_A_DAY = 0.98  # of the day's displacement: what is left is not worth an update

log = logging.getLogger(__name__)


@dataclass
class Attempt:
    """One training and judging: what was learned, what it made, what the gate said, how long each step took."""

    learned: Sequence[TokenRow]
    decision: Decision
    candidate: Candidate | None = None
    release: Release | None = None
    proof: proof.Proof | None = None
    doubtful: frozenset[str] = frozenset()  # records that the candidate learned, and would not repeat
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[step] = self.seconds.get(step, 0.0) + time.perf_counter() - started


def run_update(
    rooms: Rooms,
    *,
    is_trial: bool = False,
    upto: int | None = None,
    is_filtered: bool = True,
    request: int | None = None,
) -> dict[str, Any]:
    """Learn once from what is waiting; what serves changes only if the gate says so. Returns what the report shows.

    `upto`: only records with seq at most this. A trial is judged like any other and thrown away; `is_filtered` False
    leaves verification, quotas and trigger scan out, to see what the gate alone says. `request`: the one that asked.
    """
    alias = aliases.read_alias(rooms.store, rooms.agent)
    parent = incumbent(rooms.store, rooms.agent, alias.release)
    check_continues(adapter_of(rooms, parent), rooms.config.adapter)
    waiting = window.next_window(
        rooms.store, rooms.agent, rooms.config.experience, learn_from=rooms.config.agent.learn_from,
        tools_allowed=rooms.config.agent.tools_allowed, now=rooms.clock(), upto=upto,
        objectives=rooms.config.trainer.objectives,
    )  # fmt: skip
    if waiting.num_missing:
        return window.nothing_to_learn(rooms.store, rooms.agent, parent, waiting)
    plan = make_plan(
        rooms, alias, parent, waiting.examples, is_trial=is_trial, is_filtered=is_filtered, request=request
    )
    return finish(rooms, plan)


def run_share(rooms: Rooms, *, strata: Sequence[str] = (), request: int | None = None) -> dict[str, Any]:
    """Propose to the shared agent what enough of its tenants learned alike (see sharing.py); as `run_update`."""
    alias = aliases.read_alias(rooms.store, rooms.agent)
    check_continues(adapter_of(rooms, alias.release), rooms.config.adapter)
    proposal = sharing.propose(rooms.store, rooms.config, alias.release, strata)
    if len(proposal.examples) < (least := rooms.config.experience.min_window):
        return sharing.not_proposed(rooms.agent, alias.release, proposal, least)
    for reason in proposal.refused:
        rooms.on_progress(f"not proposed: {reason}")
    strict = under(rooms, sharing.stricter(rooms.config))
    plan = make_plan(
        strict, alias, alias.release, proposal.examples, aside=proposal.set_aside, shared=proposal.contributors,
        request=request,
    )  # fmt: skip
    return finish(rooms, plan)


def make_plan(
    rooms: Rooms,
    alias: Alias,
    parent: str,
    examples: Sequence[Example],
    *,
    aside: Sequence[Aside] = (),
    shared: Mapping[str, Sequence[str]] | None = None,
    is_trial: bool = False,
    is_filtered: bool = True,
    request: int | None = None,
) -> Plan:
    """Screen, settle and render a window, choose what is rehearsed beside it, and write all of it down."""
    config, now = rooms.config.experience, rooms.clock()
    config = config.model_copy(update={"filter": config.filter and is_filtered})
    screened = screen(examples, config, tools_allowed=rooms.config.agent.tools_allowed)
    settled, useless = staleness.settle(rooms.store, rooms.config, rooms.base, parent, screened.kept)
    rows, unusable = render(rooms.base, settled)
    fresh, surplus = within_shares(rows, config)  # last: shares of what is really learned
    if shared:
        fresh, few = sharing.by_enough(fresh, rooms.config.tenants.min_contributors)
        surplus = [*surplus, *few]
    learned_before: Sequence[Example] = ()
    if "sft" in rooms.config.trainer.objectives.use:  # by which all replay is learned
        learned_before = replay_examples(
            rooms.store, rooms.agent, config, rooms.secret, learn_from=rooms.config.agent.learn_from,
            tools_allowed=rooms.config.agent.tools_allowed,
        )  # fmt: skip
        learned_before = [*learned_before, *sharing.rehearsed(rooms.store, rooms.config, parent, rooms.secret)]
    replay, _ = render(rooms.base, [*learned_before, *rooms.rehearsal])
    return plans.open_plan(
        rooms.store, rooms.config, alias, releases.get(rooms.store, parent), examples=examples,
        fresh=fresh, replay=replay, suspicious=screened.suspicious, refusal=screened.reason,
        set_aside=[*aside, *screened.set_aside, *useless, *unusable, *surplus],
        notes=[(example.record, note) for example in settled for note in example.notes],
        base_digest=rooms.base.digest, anchors_digest=rooms.anchors_digest, fence=rooms.fence, is_trial=is_trial,
        request=request, shared=shared, now=now,
    )  # fmt: skip


def finish(rooms: Rooms, plan: Plan) -> dict[str, Any]:
    """Carry a plan, new or interrupted, to its conclusion; what tenants propose by stricter rules."""
    if plan.shared:
        rooms = under(rooms, sharing.stricter(rooms.config))
    if plan.refusal is not None:
        return conclude(rooms, plan, Attempt((), _of_window(Verdict.REJECT, f"window refused: {plan.refusal}")))
    if not plan.fresh:
        missing = rooms.config.experience.min_window
        reason = f"every record of the window was set aside; {missing} usable ones are missing"
        return conclude(rooms, plan, Attempt((), _of_window(Verdict.HOLD, reason, missing)))
    if spent_today(rooms) >= rooms.config.bounds.day_frobenius * MOST_OF_A_DAY:
        return conclude(rooms, plan, Attempt(plan.fresh, _of_window(Verdict.HOLD, day_is_spent(rooms))))
    attempt = try_update(rooms, plan, plan.fresh, number=1, said=unfinished.rejection_of(rooms.store, plan))
    codes = attempt.decision.codes
    is_rejected = attempt.decision.verdict is Verdict.REJECT and attempt.release is not None
    if is_rejected and Code.CANARY in codes and not plan.is_trial:
        plan = culprits.scrubbed(rooms, plan)
    if (is_rejected or Code.TRAINING in codes) and rooms.config.gate.filter_and_retry and not plan.is_trial:
        plan, attempt = second_attempt(rooms, plan, attempt)
    return conclude(rooms, plan, attempt)


def second_attempt(rooms: Rooms, plan: Plan, first: Attempt) -> tuple[Plan, Attempt]:
    """A window that was rejected, or on which training broke down, once more: without what looks bad in it and on items
    not used yet.

    Returns what to conclude, with the records that it set aside. What fails here leaves the first answer as it was.
    """
    if first.release is not None:
        unfinished.note_rejection(rooms.store, plan, first.decision)  # a crash from here on must keep the items used
        reason = first.decision.reasons[0][:300]
        releases.set_status(rooms.store, first.release.name, "rejected", now=rooms.clock(), reason=reason)
    try:
        calmer, left_out = culprits.without_most_surprising(rooms, plan, first.learned, first.candidate)
    except Exception:  # out of memory, a file that went away: the first attempt stands
        log.warning("update %d: there is no second attempt", plan.number, exc_info=True)
        return plan, first
    kept, surplus = within_shares(calmer, rooms.config.experience)
    if plan.shared:
        kept, few = sharing.by_enough(kept, rooms.config.tenants.min_contributors)
        surplus = [*surplus, *few]
    if not kept:
        return plan, first
    failed = "rejected" if first.release is not None else "training broke down"
    rooms.on_progress(f"update {plan.number}: {failed}; once more on {len(kept)} of {len(plan.fresh)} records")
    again = try_update(rooms, plan, kept, number=2, used_before=first.decision.items_used)
    if again.decision.verdict is Verdict.ERROR:
        if again.release is not None:
            reason = again.decision.reasons[0][:300]
            releases.set_status(rooms.store, again.release.name, "rejected", now=rooms.clock(), reason=reason)
        return plan, first
    return replace(plan, set_aside=(*plan.set_aside, *left_out, *surplus)), again


def try_update(
    rooms: Rooms,
    plan: Plan,
    fresh: Sequence[TokenRow],
    *,
    number: int,
    used_before: Sequence[str] = (),
    said: Decision | None = None,
) -> Attempt:
    """Train on `fresh`, then seal, check, load, prove and judge. Whatever fails on the way is verdict error.

    `said`: what the gate said of this attempt before an interruption; it is not asked again.
    """
    attempt = Attempt(fresh, _failed("never judged"))
    try:
        incumbent = adapter_of(rooms, plan.parent)
        with attempt.timed("train"):
            attempt.candidate = train_update(
                rooms.base, incumbent=incumbent, adapter=rooms.config.adapter, fresh=fresh, replay=plan.replay,
                anchors=rooms.anchors, trainer=rooms.config.trainer, bounds=rooms.config.tightest_bounds,
                health=rooms.config.health, memory=memory_of(rooms, plan.parent, incumbent),
                spent_today=spent_today(rooms), of_base=rooms.of_base, seed=plan.seed + number,
                work_dir=plan.work_dir / str(number),
                on_step=lambda step, _: rooms.on_progress(f"update {plan.number}: trained {step + 1} steps"),
            )  # fmt: skip
        if not attempt.candidate.bounds.holds:  # only a method without bounds can get here
            broken = ", ".join(attempt.candidate.bounds.broken)
            attempt.decision = _failed(f"it broke {broken}, and nothing shrank it", Code.INTEGRITY)
            return attempt
        with attempt.timed("seal"):
            manifest = plans.manifest_of(plan, attempt.candidate, number, fresh)
            attempt.release = releases.seal(
                rooms.store, rooms.config.state_dir, rooms.agent, Path(attempt.candidate.path), plan.parent, manifest,
                now=rooms.clock(), key=rooms.config.signing.key,
            )  # fmt: skip
            plans.judging(rooms.store, plan, attempt.release.name)
            directory = releases.release_dir(rooms.config.state_dir, attempt.release)
            assert directory is not None
            if said is not None:
                attempt.decision = said
                return attempt
            if attempt.release.status == "rejected":  # before an interruption: nothing is judged until it passes
                why = f"{attempt.release.name} was rejected before"
                attempt.decision = Decision(Verdict.REJECT, (why,), (), codes=(Code.WINDOW,))
                return attempt
            if (unsound := rooms.evidence.unsound(directory)) is not None:
                attempt.decision = unsound
                return attempt
        with attempt.timed("load"):
            with rooms.server_lock:
                tidy_server(rooms)
                is_rolling = rooms.config.rollout.kind == "rolling"
                load = rooms.server.load_on_first if is_rolling else rooms.server.load
                load(attempt.release.name, directory)
        with attempt.timed("prove"):
            exported = read_adapter(directory)
            attempt.proof = prove(rooms, attempt.release.name, exported, incumbent, fresh, plan.parent)
            score, share = partial(token_log_probs, rooms.base, exported), rooms.config.experience.max_doubtful_share
            attempt.doubtful = doubtful(fresh, plan.replay, plan.taught, score, share)
        with attempt.timed("gate"):
            kl = attempt.candidate.bounds.drift_kl
            attempt.decision = rooms.evidence.judge(
                attempt.release.name, plan.parent, taught=plan.taught, suspicious=plan.suspicious, base_kl=kl,
                seed=plan.seed + number, used_before=used_before, is_retry=number > 1,
            )  # fmt: skip
        if is_rolling and _may_serve(rooms, plan, attempt):
            kept = probes.kept_of(rooms.store, attempt.release.name)
            assert kept is not None, "`prove` kept them"
            with attempt.timed("roll"), rooms.server_lock:
                rooms.server.roll(attempt.release.name, directory, kept)
    except UpdateDiscarded as error:
        attempt.decision = _failed(f"{type(error).__name__}: {error}", Code.TRAINING)
    except Exception as error:  # memory, torch, disk, server: an update that cannot be judged is an answer
        log.warning("update %d was not judged", plan.number, exc_info=True)
        attempt.decision = _failed(f"{type(error).__name__}: {error}")
    return attempt


def conclude(rooms: Rooms, plan: Plan, attempt: Attempt) -> dict[str, Any]:
    """Make the verdict true, whole or not at all: move the alias or not, file the window's records, write the report's
    facts. One transaction, so that no crash leaves a release serving whose update never got its verdict."""
    try:
        is_passed = _may_serve(rooms, plan, attempt)
        summary = _conclude(rooms, plan, attempt, attempt.decision, is_passed=is_passed)
    except ConflictError as error:  # rolled back, frozen or taken over meanwhile
        decision = replace(_failed(f"discarded: {error}"), checks=attempt.decision.checks)
        summary = _conclude(rooms, plan, attempt, decision, is_passed=False)
    shutil.rmtree(plan.work_dir, ignore_errors=True)
    return summary


def _may_serve(rooms: Rooms, plan: Plan, attempt: Attempt) -> bool:
    is_auto = rooms.config.agent.mode is LearningMode.AUTO
    return attempt.decision.verdict is Verdict.PROMOTE and is_auto and not plan.is_trial


def _conclude(rooms: Rooms, plan: Plan, attempt: Attempt, decision: Decision, *, is_passed: bool) -> dict[str, Any]:
    mode, now, begun = rooms.config.agent.mode, rooms.clock(), time.perf_counter()
    rollout = rooms.config.rollout
    is_tried = is_passed and rollout.is_tried
    is_served = is_passed and not is_tried
    with rooms.store.write() as connection:
        require_fence(connection, rooms.agent, rooms.fence)  # who lost the lease concludes nothing
        name = attempt.release.name if attempt.release else plans.noted_candidate(connection, plan)
        if is_passed and name is not None and len(rooms.server.urls) > 1:  # they had time to go away and come back
            readiness.require_ready(connection, rooms.server.urls, name, required_ready(rooms))
        if is_tried:
            assert name is not None
            rollouts.start_in(
                connection, plan.alias, release=name, update_id=plan.id, settings=rollout.model_dump(mode="json"),
                raises_high_water=moves_high_water(decision), fence=rooms.fence, now=now,
            )  # fmt: skip
        elif is_served:
            assert name is not None
            aliases.move_alias_in(
                connection, rooms.agent, expected=plan.alias, to=name, fence=rooms.fence, now=now,
                raises_high_water=moves_high_water(decision),
            )  # fmt: skip
            attempt.seconds["swap"] = time.perf_counter() - begun  # less the commit that also files the update
        elif name is not None and (plan.is_trial or decision.verdict is not Verdict.PROMOTE):
            is_held = decision.verdict is Verdict.HOLD and not plan.is_trial
            status, reason = "held" if is_held else "rejected", decision.reasons[0][:300]
            releases.retire(connection, name, status, now=now, reason=reason)
        summary = plans.summary_of(
            plan, decision, candidate=name, made=attempt.candidate,
            learned=attempt.learned, proof=attempt.proof.verdict if attempt.proof else None, seconds=attempt.seconds,
            mode=mode, serving=aliases.serving_in(connection, rooms.agent), doubtful=attempt.doubtful,
            is_served=is_served, now=now,
        )  # fmt: skip
        if is_tried:
            begins = f"{decision.reasons[0]} (tried as {rollout.kind} at {rollout.weights[0]:g} first)"
            summary |= {"reasons": [begins, *decision.reasons[1:]], "reason": begins}
        plans.close_plan(
            connection, plan, attempt.candidate, summary, decision, learned=attempt.learned, is_served=is_served,
            now=now,
        )  # fmt: skip
    return summary


def _of_window(verdict: Verdict, reason: str, num_missing: int = 0) -> Decision:
    return Decision(verdict, (reason,), (), num_missing, codes=(Code.WINDOW,))


def _failed(reason: str, code: Code = Code.OUTAGE) -> Decision:
    return Decision(Verdict.ERROR, (reason,), (), codes=(code,))


def render(base: Base, examples: Sequence[Example]) -> tuple[list[TokenRow], list[Aside]]:
    """Token rows of the examples, and those that the base cannot take."""

    def rendered(example: Example) -> tuple[TokenRow, ...]:
        made = render_rows(base.tokenizer, base.context, example)
        for row in made:
            check_row(base, row)
        return made

    rows: list[TokenRow] = []
    unusable: list[Aside] = []
    for example in examples:
        found = guarded(rendered, example)
        if isinstance(found, str):
            unusable.append(Aside(example.record, "unusable", f"unusable: {found}"))
        else:
            rows += found
    return rows, unusable
