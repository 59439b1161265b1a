"""The demo as a stranger runs it, on a seed that nobody tuned: every promise of its last table."""

from __future__ import annotations

import json

import pytest

from scripts.bench_demo import broken_promises, run_seed

SEED = 4
MAX_SECONDS = 360


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_demo_keeps_every_promise(tmp_path):
    summary = run_seed(SEED, tmp_path / "out")
    assert broken_promises(summary) == [], json.dumps({k: summary[k] for k in ("cltrain", "naive")}, indent=2)
    assert summary["seconds"] <= MAX_SECONDS
    pages = tmp_path / "out" / "state" / "reports" / "support"
    assert (pages / "index.html").exists()
    assert len(list(pages.glob("update-*.html"))) >= summary["cltrain"]["updates"]
    assert list((tmp_path / "out" / "state").glob("wandb/**/*.wandb"))


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
