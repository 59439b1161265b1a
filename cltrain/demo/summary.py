"""What the demo says at its end: summary.json and the last table, from the store's own records."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from sqlalchemy import select

from cltrain.api import Deployment
from cltrain.demo import world
from cltrain.experience.examples import accepted
from cltrain.experience.recording import read_trajectories
from cltrain.registry import decisions, releases
from cltrain.store import schema

if TYPE_CHECKING:
    from cltrain.demo.run import Stream, WindowLog

Exam = dict[str, Any]


def served_releases(deployment: Deployment) -> dict[str, str | None]:
    """Every release that ever served, in order, with its directory (None: the bare base)."""
    agent, store = deployment.agent, deployment.store
    base = releases.list_releases(store, agent)[0].name
    names = [base, *(entry.payload["to"] for entry in decisions.read_decisions(store, agent, kind="promote"))]
    found: dict[str, str | None] = {}
    for name in names:
        directory = releases.release_dir(deployment.config.state_dir, releases.get(store, name))
        found[name] = str(directory) if directory else None
    return found


def describe_update(update: dict[str, Any]) -> str:
    """One line: the verdict, the first reason, how far the adapter moved and what was kept of the window."""
    bounds = update.get("bounds")
    moved = f", KL to base {bounds['drift_kl']:.4f}, kept {bounds['shrink']:.0%} of the step" if bounds else ""
    records = f"{update.get('num_kept', 0)} of {update.get('num_window', 0)} records learned from"
    return f"update {update.get('number') or '-'}: {update['verdict']} ({records}{moved}) {update['reasons'][0]}"


def build(stream: Stream, exams: dict[str, Exam], naive: Exam, *, seconds: float) -> dict[str, Any]:
    """The object of summary.json: both learners on the same stream, judged by the same exam."""
    before, after = next(iter(exams.values())), list(exams.values())[-1]
    updates = [log.update for log in stream.logs]
    verdicts = [u["verdict"] for u in updates]
    clean = [log for log in stream.logs if log.window.kind == "clean"]
    bad = [log for log in stream.logs if log.window.kind != "clean"]
    swaps = [u["swap_ms"] for u in updates if u.get("swap_ms") is not None]
    wrong = _wrongly_learned(stream)
    effort = gate_effort(updates)
    return {
        "cltrain": {
            "requests": stream.desk.requests,
            "failed_requests": stream.desk.failed,
            "swaps": len(swaps),
            "swap_ms_p50": round(median(swaps), 1) if swaps else None,
            "updates": len(updates),
            "promoted": verdicts.count("promote"),
            "shrunk": sum((u.get("bounds") or {}).get("shrink", 1.0) < 1.0 for u in updates),
            "held": verdicts.count("hold"),
            "rejected": verdicts.count("reject"),
            "errors": verdicts.count("error"),
            "clean_windows": len(clean),
            "clean_windows_rejected": sum(_is_rejected(log) for log in clean),
            "bad_windows": len(bad),
            "bad_windows_caught": sum(not wrong & log.bad_tickets.keys() for log in bad),
            "unfiltered_poison_verdict": stream.trial.get("verdict"),
            "unfiltered_poison_reason": (stream.trial.get("reasons") or [None])[0],
            "gate_per_train": effort["gate_per_train"],
            **_skills(before, after),
            "base_kl": round(after["base_kl"], 4),
            "attack_success_rate": round(max(exam["attack_success_rate"] for exam in exams.values()), 4),
        },
        "naive": {
            "skill_before": _skills(before, naive)["skill_before"],
            "min_skill_learned": round(min(stream.learned.values()), 4),
            **{key: value for key, value in _skills(before, naive).items() if key != "skill_before"},
            "base_kl": round(naive["base_kl"], 4),
            "attack_success_rate": round(naive["attack_success_rate"], 4),
        },
        "seconds": round(seconds, 1),
        "gate": effort,
        "seed": stream.seed,
        "windows": [_window_row(log) for log in stream.logs],
        "trial": stream.trial,
        "releases": exams,
        "naive_skill_learned": stream.learned,
        "naive_skills": naive["skills"],
        "failures": stream.desk.failures[:20],
    }


def gate_effort(updates: Sequence[dict[str, Any]]) -> dict[str, float]:
    """What judging took beside training, over the updates that were judged on items."""
    judged = [update for update in updates if update.get("decision") and update["decision"]["num_asked"]]
    asked, planned = (sum(update["decision"][key] for update in judged) for key in ("num_asked", "num_planned"))
    gate, train = (sum(update["timings"][key] for update in judged) for key in ("gate", "train"))
    saved = sum(
        update["timings"]["gate"] * (update["decision"]["num_planned"] / update["decision"]["num_asked"] - 1)
        for update in judged
    )
    return {
        "updates_judged": len(judged), "items_planned": planned, "items_asked": asked,
        "gate_seconds": round(gate, 1), "train_seconds": round(train, 1), "seconds_saved": round(saved, 1),
        "gate_per_train": round(gate / train, 3) if train else 0.0,
    }  # fmt: skip


def _skills(before: Exam, after: Exam) -> dict[str, float]:
    new_before = [before["skills"][skill] for skill in world.NEW_SKILLS]
    new_after = [after["skills"][skill] for skill in world.NEW_SKILLS]
    known = [after["skills"][skill] for skill in world.BASE_SKILLS]
    return {
        "skill_before": round(sum(new_before) / len(new_before), 4),
        "skill_after": round(sum(new_after) / len(new_after), 4),
        "min_skill_after": round(min(new_after), 4),
        "retained_after": round(sum(known) / len(known), 4),
    }


def _is_rejected(log: WindowLog) -> bool:
    return log.update["verdict"] == "reject" or bool(log.update.get("is_refused")) or bool(log.update.get("suspicious"))


def _wrongly_learned(stream: Stream) -> set[str]:
    """Records of the stream that taught an adapter that served something wrong: they filled a slot of a promoted
    update, and what they taught was not the right call, or what they taught against was. (A junk ticket whose own
    answer was right teaches no harm, nor does a bad score on a wrong answer.)"""
    deployment, s = stream.deployment, schema
    query = (
        select(s.update_reads.c.record)
        .join(s.updates, s.updates.c.id == s.update_reads.c["update"])
        .where(s.updates.c.agent == deployment.agent, s.updates.c.verdict == "promote", s.updates.c.mode != "trial")
    )
    with deployment.store.read() as connection:
        read = set(connection.execute(query).scalars())
    tickets = {record: ticket for log in stream.logs for record, ticket in log.bad_tickets.items() if record in read}
    wrong = set()
    for trajectory in read_trajectories(deployment.store, deployment.agent, records_in=list(tickets)):
        example = accepted(trajectory, learn_from=deployment.config.agent.learn_from, tools_allowed=None)
        ticket = tickets[trajectory.id]
        if isinstance(example, str):  # nothing in it is said to be right: it was learned as what not to say
            said = next(message for message in trajectory.messages if message["role"] == "assistant")
            is_wrong = world.check(ticket, said)
        else:
            is_wrong = not world.check(ticket, example.messages[example.targets[0]])
        if is_wrong:
            wrong.add(trajectory.id)
    return wrong


def _window_row(log: WindowLog) -> dict[str, Any]:
    return {
        "phase": log.window.phase,
        "skill": log.window.skill,
        "kind": log.window.kind,
        "solved": round(log.success, 4),
        "tickets": len(log.records),
        "bad_records": len(log.bad_tickets),
        "update": {key: value for key, value in log.update.items() if key not in {"checks", "window"}},
    }


def print_table(result: dict[str, Any], out: Path, deployment: Deployment) -> None:
    """The last table, and where to look further."""
    from rich.console import Console
    from rich.table import Table

    ours, naive = result["cltrain"], result["naive"]
    table = Table(title=f"after {len(result['windows'])} windows, {result['seconds']:.0f} s")
    for column, justify in (("", "left"), ("cltrain", "right"), ("naive", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    rows = [
        ("new skills before, exact success", "skill_before"),
        ("new skills after", "skill_after"),
        ("worst new skill after", "min_skill_after"),
        ("worst new skill right after its phase", "min_skill_learned"),
        ("what the base knew, after", "retained_after"),
        ("KL to the base, nats per token", "base_kl"),
        ("attack success, worst adapter that served", "attack_success_rate"),
    ]
    for label, key in rows:
        table.add_row(label, *(f"{side[key]:.3f}" if key in side else "-" for side in (ours, naive)))
    console = Console()
    console.print(table)
    verdicts = ", ".join(f"{ours[key]} {key}" for key in ("promoted", "held", "rejected", "errors"))
    console.print(
        f"{ours['requests']} requests, {ours['failed_requests']} failed; {ours['swaps']} swaps under traffic, "
        f"median {ours['swap_ms_p50']} ms; {ours['updates']} updates: {verdicts}"
    )
    console.print(
        f"{ours['bad_windows_caught']} of {ours['bad_windows']} bad windows caught, "
        f"{ours['clean_windows_rejected']} of {ours['clean_windows']} clean ones rejected; "
        f"to an unfiltered poisoned window the gate says {ours['unfiltered_poison_verdict']}"
    )
    effort = result["gate"]
    console.print(
        f"the gate asked {effort['items_asked']} of {effort['items_planned']} items, which saved about "
        f"{effort['seconds_saved']:.0f} s, and took {effort['gate_per_train']:.2f} x the time of training"
    )
    console.print(f"summary  {out / 'summary.json'}", soft_wrap=True)
    console.print(f"report   {deployment.report()}", soft_wrap=True)
    console.print(f"look     cltrain status --config {out / 'demo.toml'}", soft_wrap=True)
