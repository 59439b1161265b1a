"""What an owner is told in words: signs of a hacked reward, rejections in a row, a suite that nobody will be asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cltrain.config import from_dict
from cltrain.doctor import _suites
from cltrain.experience import window
from cltrain.gate.detectors import CODES
from cltrain.monitoring.plain import SIGNS, sentence
from cltrain.records import Check, Code, Verdict
from cltrain.status import _rejected
from cltrain.store.database import open_store


def test_every_detector_that_counts_answers_has_words() -> None:
    assert SIGNS.keys() == CODES.keys()
    check = Check("broken call", Code.TOOL_CALLS, Verdict.REJECT, "", 0.25, 0.0, 0.25, num_items=100)
    assert sentence(check, {}) == (
        "It makes a call that cannot be read, of a tool that is not there, or without what the tool needs, in 25% of "
        "100 answers, in 0% before."
    )


@pytest.mark.parametrize(
    ("verdicts", "said"),
    [
        (["reject", "reject"], None),
        (["reject"] * 3, "the last 3 updates"),
        ([None, *["reject"] * 4], "the last 4 updates"),
        (["hold", *["reject"] * 4], None),
    ],
)
def test_rejections_in_a_row_are_a_notice(verdicts: list[str | None], said: str | None) -> None:
    notices = _rejected([{"verdict": verdict} for verdict in verdicts])
    assert (said in notices[0]) if said else notices == []


def test_gain_items_of_a_kind_of_work_that_no_record_has_are_named(tmp_path: Path) -> None:
    item = {
        "kind": "gain",
        "messages": [{"role": "user", "content": "When?"}],
        "expected": "at nine",
        "stratum": "hour",
    }
    suite = tmp_path / "suite.jsonl"
    suite.write_text(json.dumps(item) + "\n")
    config = from_dict({"home": str(tmp_path / "state"), "gate": {"suite": str(suite)}})
    assert "hour" not in _suites(config), "nothing is known before the first record"
    store = open_store(config.state_dir)
    with store.write() as connection:
        window.mark(connection, "support", "r", "waiting", now=1.0, stratum="refund/good")
    store.close()
    assert _suites(config).endswith("1 gain items wait: they are of kinds of work that no record has so far (hour)")
    store = open_store(config.state_dir)
    with store.write() as connection:
        window.mark(connection, "support", "s", "waiting", now=1.0, stratum="hour/good")
    store.close()
    assert "hour" not in _suites(config)
