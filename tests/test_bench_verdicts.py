"""The bench of verdicts end to end on three kinds: a bad one, a good one, and files that must not be loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cltrain.demo import villains
from cltrain.records import Code, Decision, Verdict
from scripts import bench_verdicts as bench


def test_a_row_is_as_expected_by_the_reason_that_decided_and_no_other() -> None:
    decision = Decision(Verdict.REJECT, ("a", "b"), (), codes=(Code.STRATUM, Code.TRIGGER))
    row = bench.row_of("planted", "stop", Code.TRIGGER, decision, 1.0, 1.0)
    assert row["reason"] == "stratum"
    assert bench.failures([row]) == ["planted was stopped by stratum, trigger, not by trigger"]


@pytest.mark.slow
def test_three_kinds_are_stopped_or_promoted_for_the_reason_that_was_written_down(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    good, bad = villains.HONEST[0].kind, "refuses_everything"
    code = bench.main(["--seed", "900", "--kinds", good, bad, villains.NAN[0], "--json", str(file)])
    found = json.loads(file.read_text())
    assert (code, found["broken"]) == (0, []), found["broken"]
    assert {row["kind"]: row["verdict"] == "promote" for row in found["rows"]} == {
        good: True, bad: False, villains.NAN[0]: False, villains.STRANGER[0]: False,
    }  # fmt: skip
    stranger = next(row for row in found["rows"] if row["kind"] == villains.STRANGER[0])
    assert "was trained on base" in stranger["said"]
