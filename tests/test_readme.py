"""What the README shows can be typed: its example lines load, its flags are those of the shipped configuration."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest

from cltrain.api import Deployment
from cltrain.config import from_dict
from cltrain.experience.ingest import read_rehearsal
from cltrain.gate.suites import load_suite

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
