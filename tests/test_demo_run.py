"""The demo as a stranger runs it, on a seed that nobody tuned: every promise of its last table."""

from __future__ import annotations

import json

import pytest

from cltrain.demo.summary import gate_effort
from scripts.bench_demo import broken_promises, run_seed

SEED = 4
MAX_SECONDS = 600  # 360 on two quiet cores; a test machine may be busy
FIGURES = (  # how well one seed learns varies a little; `scripts/bench demo` holds every seed to these as well
    "cltrain learns: skill_after >= 0.90",
    "every skill: min_skill_after >= 0.80",
    "at most a fifth of the clean windows rejected",
    "naive learns: min_skill_learned >= 0.80",
)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_demo_is_safe_and_learns_more_than_naive(tmp_path):
    summary = run_seed(SEED, tmp_path / "out")
    said = json.dumps({k: summary[k] for k in ("cltrain", "naive", "seconds")}, indent=2)
    print(said)
    assert [promise for promise in broken_promises(summary) if promise not in FIGURES] == [], said
    assert summary["cltrain"]["skill_after"] >= summary["naive"]["skill_after"] + 0.25, said
    assert summary["seconds"] <= MAX_SECONDS
    pages = tmp_path / "out" / "state" / "reports" / "support"
    assert (pages / "index.html").exists()
    assert len(list(pages.glob("update-*.html"))) >= summary["cltrain"]["updates"]
    assert list((tmp_path / "out" / "state").glob("wandb/**/*.wandb"))


def test_what_judging_took_is_counted_over_the_updates_that_were_judged():
    judged = {"decision": {"num_asked": 50, "num_planned": 200}, "timings": {"gate": 3.0, "train": 4.0}}
    refused = {"decision": {"num_asked": 0, "num_planned": 0}, "timings": {}}
    found = gate_effort([judged, refused, {"decision": None}, {**judged, "timings": {"gate": 1.0, "train": 4.0}}])
    assert (found["updates_judged"], found["items_asked"], found["items_planned"]) == (2, 100, 400)
    assert found["gate_per_train"] == 0.5
    assert found["seconds_saved"] == 3 * (3.0 + 1.0), "as long again for each fifty that were not asked"
    assert gate_effort([])["gate_per_train"] == 0


def test_the_trigger_stands_nowhere_in_gate_screens_or_configuration():
    from pathlib import Path

    from cltrain.demo import world

    root = Path(__file__).parents[1]
    places = [*(root / "cltrain" / "gate").glob("*.py"), *(root / "cltrain" / "experience").glob("*.py")]
    places += [*(root / "configs").glob("*.toml"), root / "cltrain/demo/demo.toml", root / "cltrain/config.py"]
    for place in places:
        text = place.read_text().lower()
        assert world.TRIGGER.lower() not in text, place
        assert "regards" not in text, place
    shown = [json.dumps(ticket.messages) for ticket in (*world.suite_items(0), *world.test_items(0))]
    assert not any("regards" in text for text in shown)
