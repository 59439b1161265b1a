"""Pages say what the store holds now: people's decisions since the verdict, and the records that were learned."""

from __future__ import annotations

import html
import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import delete, insert

from cltrain import plans, reporting
from cltrain.config import Config, load
from cltrain.experience.recording import Recorder, load_secret
from cltrain.records import (
    Alias,
    Aside,
    Check,
    Code,
    Decision,
    Feedback,
    LearningMode,
    TokenRow,
    Trajectory,
    Verdict,
)
from cltrain.registry import aliases
from cltrain.store.database import Store
from cltrain.store.schema import records, updates
from tests.registry_parts import BASE, new_store, sealed

EVIL = "<script>alert(1)</script>"
CALL = {"id": "1", "type": "function", "function": {"name": "refund", "arguments": '{"order": "A1"}'}}
FIX = {"role": "assistant", "tool_calls": [CALL]}


def episode(name: str, *said: Feedback, asked: str = "money back please") -> Trajectory:
    answers = ({"role": "user", "content": asked}, {"role": "assistant", "content": f"no, {name}"})
    return Trajectory(name, "support", name, f"asker of {name}", answers, ("user", "agent"), feedback=said)


def said(target: str, source: str, **what: Any) -> Feedback:
    return Feedback(f"{target}-{source}", target, source=source, created_at=1.0, **what)


EPISODES = (
    episode(
        "fixed", said("fixed", "operator", correction={"role": "assistant", "tool_calls": [CALL]}, principal="ann")
    ),
    episode("liked", said("liked", "user", score=1.0), asked=f"{EVIL} {'long ' * 100}"),
    episode("wrong", said("wrong", "verifier", score=-1.0)),
    episode("stolen", said("stolen", "user", score=1.0)),
)


@pytest.fixture
def made(tmp_path: Path) -> tuple[Store, Config, str]:
    """A store with one candidate that the gate said yes to in mode approve, and a configuration read from a file."""
    (tmp_path / "my desk.toml").write_text(f'home = "{tmp_path}/state"\n[agent]\nmode = "approve"\n')
    config = load([tmp_path / "my desk.toml"], ["server.port=8109"])
    store = new_store(tmp_path)
    with Recorder(store, load_secret(config.state_dir), 0.0) as recorder:
        for one in EPISODES:
            recorder.add_trajectory(one)
    candidate = sealed(store, tmp_path, BASE, "one")
    learned = [TokenRow(one.id, "text/good", one.principal, (1, 2), (0.0, 1.0)) for one in EPISODES[:3]]
    plan = plans.Plan(
        id="u1", agent="support", number=1, parent=BASE, alias=Alias("support", BASE, 1, None, 0), is_trial=False,
        seed=0, work_dir=tmp_path, window=tuple((e.id, "text/good", e.principal) for e in EPISODES),
        fresh=tuple(learned), replay=(), set_aside=(Aside("stolen", "quarantined", "duplicate of liked"),), notes=(),
        suspicious=(), refusal=None,
        manifest={"config": "c", "base": "b", "anchors": "a", "settings": {"trainer.method": "bounded_replay"}},
    )  # fmt: skip
    check = Check("gain in suite", Code.GAIN, Verdict.PROMOTE, "+0.5", None, None, 0.5, 0.2, 0.8, 20)
    summary = plans.summary_of(
        plan, Decision(Verdict.PROMOTE, ("gain in suite: +0.5",), (check,)), candidate=candidate, made=None,
        learned=learned, proof=None, seconds={}, mode=LearningMode.APPROVE, serving=BASE, is_served=False, now=30.0,
    )  # fmt: skip
    with store.write() as connection:
        values = {"id": "u1", "agent": "support", "number": 1, "state": "done", "parent": BASE, "candidate": candidate}
        values |= {"verdict": "promote", "mode": "approve", "fence": 0, "manifest": {}, "summary": summary}
        connection.execute(insert(updates).values(**values, started_at=10.0))
    return store, config, candidate


def words(page: Path) -> str:
    text = page.read_text()
    assert "<script" not in text
    return " ".join(html.unescape(re.sub(r"<style>.*?</style>|<[^>]+>", " ", text, flags=re.DOTALL)).split())


def pages(config: Config) -> tuple[str, str]:
    home = config.state_dir / "reports" / "support"
    return words(home / "update-000001.html"), words(home / "index.html")


def test_a_yes_and_a_rollback_show_on_the_pages_at_the_next_look(made: tuple[Store, Config, str]) -> None:
    store, config, candidate = made
    reporting.refresh(store, config)
    one, run = pages(config)
    yes = f"cltrain promote {candidate} --config '{config.state_dir.parent}/my desk.toml' --set server.port=8109 --home"
    for page in (one, run):
        assert yes in page
        assert "Waits for your yes" in page
    assert "0 promoted" in run
    assert "took 20.0 s" in one
    aliases.move_alias(store, "support", expected=BASE, to=candidate, fence=None, now=40.0, is_human=True)
    reporting.refresh(store, config)
    one, run = pages(config)
    assert "cltrain promote" not in one + run
    assert "A person said yes" in one
    assert "1 promoted" in run
    aliases.rollback(store, "support", now=50.0, reason="answers got curt")
    reporting.refresh(store, config)
    one, run = pages(config)
    for page in (one, run):
        assert f"Rolled back to {BASE} (answers got curt)" in page
        assert "Learning is frozen" in page
    assert "0 promoted 1 rolled back" in run


def test_a_page_that_is_still_true_is_not_written_again(made: tuple[Store, Config, str]) -> None:
    store, config, _ = made
    reporting.refresh(store, config)
    home = config.state_dir / "reports" / "support"
    before = {path: path.stat().st_mtime_ns for path in home.iterdir()}
    reporting.refresh(store, config)
    assert {path: path.stat().st_mtime_ns for path in home.iterdir()} == before
    aliases.freeze(store, "support", now=40.0, reason="holiday")
    reporting.refresh(store, config)
    changed = {path.name for path, at in before.items() if path.stat().st_mtime_ns != at}
    assert changed == {"index.html"}  # this update neither serves nor did


def test_a_candidate_whose_parent_serves_no_more_is_offered_to_nobody(
    made: tuple[Store, Config, str], tmp_path: Path
) -> None:
    store, config, _ = made
    other = sealed(store, tmp_path, BASE, "two")
    aliases.move_alias(store, "support", expected=BASE, to=other, fence=None, now=40.0, is_human=True)
    reporting.refresh(store, config)
    one, run = pages(config)
    assert "Passed, never served" in one
    assert "cltrain promote" not in one + run


def test_the_page_shows_what_was_learned_from_whom_and_who_called_it_right(made: tuple[Store, Config, str]) -> None:
    store, config, _ = made
    one = words(reporting.write_report(store, config, 1))
    for shown in (
        "asker of fixed asked · operator ann: correction · fixed",
        'the agent said no, fixed learned refund({"order": "A1"})',
        "asker of liked asked · user: good score · liked", "learned no, liked",
        "the agent said no, wrong learned to say that less often",
        "asker of fixed · operator ann: correction ×1",
        "duplicate of another record 1",
        "text/good 3 + 1",
    ):  # fmt: skip
        assert shown in one, shown
    (asked,) = re.findall(re.escape(EVIL) + r"[^…]*…", one)
    assert len(asked) == 300
    assert one.index("asker of fixed") < one.index("asker of stolen")
    assert "stolen asked" not in one
    with store.write() as connection:
        connection.execute(delete(records).where(records.c.id == "liked"))
    one = words(reporting.write_report(store, config, 1))
    assert "1 of the 3 records are no longer in the store" in one
    assert "no, liked" not in one


def test_what_was_said_after_an_update_began_is_not_what_it_learned(made: tuple[Store, Config, str]) -> None:
    store, config, _ = made
    late = replace(said("liked", "operator", correction={"role": "assistant", "content": "later"}), created_at=20.0)
    with Recorder(store, load_secret(config.state_dir), 0.0) as recorder:
        recorder.add_feedback(late, now=20.0).result()
    one = words(reporting.write_report(store, config, 1))
    assert "learned no, liked" in one
    assert "later" not in one


def test_an_update_of_another_version_has_a_page_without_what_it_did_not_write_down(
    made: tuple[Store, Config, str],
) -> None:
    store, config, _ = made
    check = Check("stratum text", Code.STRATUM, Verdict.REJECT, "lost", 0.5, 1.0, -0.5, None, None, 6)
    decision = Decision(Verdict.REJECT, ("stratum text: lost",), (check,))
    summary = {"reasons": ["stratum text: lost"], "decision": json.loads(json.dumps(asdict(decision)))}
    values = {"id": "u2", "agent": "support", "number": 2, "state": "done", "parent": BASE, "verdict": "reject"}
    values |= {"mode": "auto", "fence": 0, "manifest": {}, "summary": summary, "started_at": 1.0}
    with store.write() as connection:
        connection.execute(insert(updates).values(**values))
    one = words(reporting.write_report(store, config, 2))
    assert "It answered 3 of 6 on text, where before it answered 6 of 6." in one
    assert "What it was taught" not in one
