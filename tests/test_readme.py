"""What the README shows can be typed: its example lines load, its flags are those of the shipped configuration."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest

from cltrain.api import Deployment
from cltrain.audit import OUTCOMES
from cltrain.config import from_dict
from cltrain.deploy.readiness import HELD
from cltrain.experience.ingest import read_rehearsal
from cltrain.experience.window import STATUSES
from cltrain.gate.suites import load_suite
from cltrain.records import Verdict
from cltrain.registry.releases import TRANSITIONS
from cltrain.status import lines_of
from tests.command import promoted_home

REPO = Path(__file__).parent.parent
README = (REPO / "README.md").read_text()


@pytest.fixture
def line_of(tmp_path: Path):
    """A file that holds the example line under `# NAME: ...`."""

    def write(name: str) -> Path:
        (line,) = re.findall(rf"^# {re.escape(name)}: .*\n(.*)", README, re.MULTILINE)
        (tmp_path / "one.jsonl").write_text(f"{line}\n")
        return tmp_path / "one.jsonl"

    return write


def test_every_example_line_is_one_that_is_read(line_of, tmp_path: Path) -> None:
    deployment = Deployment(from_dict({"home": str(tmp_path / "state")}))
    report = deployment.import_file(line_of("cltrain import"), producer="agent")
    assert (report["num_imported"], report["num_positive"], report["num_fitting"]) == (1, 1, 1)
    (item,) = load_suite(line_of("gate.suite"))
    assert (item.kind, item.stratum) == ("gain", "refund")
    (example,) = read_rehearsal(line_of("experience.rehearsal"))
    assert example.targets == (1,)
    line = json.loads(line_of("trainer.anchors").read_text())
    assert set(line) == {"text"}


def test_every_word_of_a_status_is_explained(tmp_path: Path) -> None:
    promoted_home(tmp_path)
    shown = Deployment(from_dict({"home": str(tmp_path)})).status()
    metric = {"metric": "faults", "harm": 1.0, "no_harm": 1.0}
    tried = {"kind": "canary", "release": "r", "weight": 0.05, "step": 1, "steps": 2, "since": 0.0, "metrics": [metric]}
    tenant = {"agent": "support@acme", "release": None, "records": 1, "ready": 0, "verdict": "hold", "frozen": True}
    update = {"number": 1, "verdict": "hold", "state": "done", "candidate": "r", "reason": "too little"}
    whole = {
        "frozen": True, "notices": ["look"], "awaits": ["r"], "sinks": {"wandb": 1}, "tenants": [tenant],
        "tried": {**tried, "episodes": {"incumbent": 1, "candidate": 1}}, "why": {"unusable": "u", "quarantined": "q"},
        "items": {"asked": 2, "retired": 1}, "updates": [update],
    }  # fmt: skip
    assert set(whole) <= set(shown)
    rows = {line.split()[0] for line in lines_of({**shown, **whole})} - {"agent"}
    assert len(rows) == 19, "a row for everything that can be shown"
    words = {
        *rows, "anchor", "FROZEN", *STATUSES, *TRANSITIONS, *Verdict, *(word for _, word in OUTCOMES), "training",
        "judging", "up", "down", "unwell", "ready", "absent", "unseen", "out", "loading", *HELD,
    } - {"proved"}  # fmt: skip  # what proved the release is ready
    (table,) = re.findall(r"^\| `cltrain status` says .*?\n\n", README, re.MULTILINE | re.DOTALL)
    assert sorted(word for word in words if f"`{word}`" not in table) == []


def test_vllm_is_started_with_the_same_flags_everywhere() -> None:
    flags = r"--max-lora-rank \d+ --max-loras \d+ --max-cpu-loras \d+"
    (shown,), (shipped,) = (re.findall(flags, text) for text in (README, (REPO / "configs/vllm.toml").read_text()))
    assert shown == shipped


def test_the_settings_of_tenants_that_are_shown_are_those_there_are() -> None:
    (shown,) = re.findall(r"^```\n(\[tenants\]\n.*?)^```$", README, re.MULTILINE | re.DOTALL)
    values = tomllib.loads(shown)
    config = from_dict(values)
    assert set(values["tenants"]) == set(type(config.tenants).model_fields)
    assert {
        key: getattr(config.tenants, key) for key in ("min_contributors", "share_strictness", "share_needs_yes")
    } == {
        key: field.default
        for key, field in type(config.tenants).model_fields.items()
        if key not in ("mode", "principals")
    }
