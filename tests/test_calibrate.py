"""Budgets proposed from the owner's own data: by the stated rules, from what waits, without touching the deployment."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from cltrain.api import Deployment
from cltrain.calibration import calibrate, proposed, split, toml_lines, waiting_examples
from cltrain.config import Config, load
from cltrain.errors import ConfigError, DataError
from cltrain.models.adapter import new_factors, write_adapter
from cltrain.models.base import load_base
from cltrain.records import Feedback, Generation, Trajectory
from cltrain.registry.aliases import move_alias
from cltrain.registry.releases import ensure_base_release, seal
from cltrain.store.database import Store, open_store
from tests.command import Command, cltrain
from tests.deployments import corrected, record, tickets

__all__ = ["cltrain"]  # a fixture

NOBODY = "http://127.0.0.1:9"  # no server is needed
SMALL = (
    "trainer.num_steps=2", "trainer.num_anchors=2", "trainer.anchor_tokens=16", "trainer.batch_size=4",
    "experience.eval_share=0.0", "experience.min_window=4", f"server.url={NOBODY}",
)  # fmt: skip


def words(home: Path, *settings: str) -> list[str]:
    return [f"--home={home}", *(f"--set={setting}" for setting in (*SMALL, *settings))]


def settings_of(home: Path, *settings: str) -> Config:
    return load((), [f"home={home}", *SMALL, *settings])


def unlearnable(name: str) -> Trajectory:
    messages = ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"})
    return Trajectory(name, "support", name, "eve", messages, ("user", "stranger"), created_at=1.0)


def contents(home: Path, store: Store) -> tuple[list[str], dict[str, str]]:
    """Every row of the store, and every other file by its hash."""
    connection = store.engine.raw_connection()
    rows = list(connection.driver_connection.iterdump())
    connection.close()
    files = [path for path in home.rglob("*") if path.is_file() and not path.name.startswith("store.db")]
    return rows, {str(path.relative_to(home)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def update_of(**values: float) -> dict[str, float]:
    names = ("step_frobenius", "step_spectral", "step_kl", "drift_frobenius", "drift_spectral", "drift_kl")
    return {**dict.fromkeys(names, 0.01), **values}


def test_budgets_follow_from_what_was_measured_by_the_stated_rules() -> None:
    updates = [
        update_of(step_frobenius=step, step_spectral=2 * step, step_kl=step**2, drift_frobenius=drift, drift_kl=kl)
        for step, drift, kl in ((0.1, 0.1, 0.001), (0.3, 0.25, 0.004), (0.2, 0.2, 0.002))
    ]
    found = proposed(updates)
    assert found["bounds"]["step_frobenius"] == 0.28  # 0.2 + 0.8 * (0.3 - 0.2)
    assert found["bounds"]["step_spectral"] == 0.56
    assert found["bounds"]["step_kl"] == 0.08  # 0.04 + 0.8 * (0.09 - 0.04)
    assert found["bounds"]["drift_frobenius"] == 0.75
    assert found["bounds"]["drift_spectral"] == 0.03
    assert found["bounds"]["drift_kl"] == found["gate"]["base_kl"] == 0.036
    assert proposed([update_of(step_kl=0.01201)])["bounds"]["step_kl"] == 0.013, "a budget was rounded down"


@pytest.mark.parametrize("value", [0.0, float("inf"), float("nan")])
def test_no_budget_is_proposed_where_nothing_moved_or_all_was_lost(value: float) -> None:
    with pytest.raises(DataError, match="step_kl"):
        proposed([update_of(step_kl=value)])


def test_the_data_is_split_in_time_order_into_parts_of_one_size() -> None:
    assert [list(part) for part in split(range(11), 3)] == [[0, 1, 2], [3, 4, 5, 6], [7, 8, 9, 10]]
    assert split([], 0) == []


def test_the_proposal_is_a_configuration_that_loads_and_the_deployment_is_as_it_was(
    tmp_path: Path, cltrain: Command
) -> None:
    home = tmp_path / "state"
    config = settings_of(home)
    store = open_store(home)
    record(store, config, [*(corrected(ticket) for ticket in tickets("repair", 18)), unlearnable("x")])
    before = contents(home, store)
    done = cltrain("calibrate", *words(home))
    assert done.code == 0, done
    assert "3 naive updates" in done.out or "4 naive updates" in done.out
    assert contents(home, store) == before
    (tmp_path / "budgets.toml").write_text(done.out)
    resolved = load([tmp_path / "budgets.toml"])
    as_json = cltrain("calibrate", *words(home), "--json").json
    assert as_json["num_missing"] == 0
    for name, value in as_json["proposed"]["bounds"].items():
        assert getattr(resolved.bounds, name) == value > 0
    assert resolved.gate.base_kl == resolved.bounds.drift_kl
    steps = [update["step_frobenius"] for update in as_json["updates"]]
    assert min(steps) < as_json["proposed"]["bounds"]["step_frobenius"] <= 1.1 * max(steps)
    drifts = [update["drift_frobenius"] for update in as_json["updates"]]
    assert drifts[0] == pytest.approx(steps[0])
    assert all(abs(drift - step) > 1e-3 * step for drift, step in zip(drifts[1:], steps[1:], strict=True)), (
        "each began at the base"
    )


def test_too_little_data_is_a_hold_that_says_how_many_records_are_missing(tmp_path: Path, cltrain: Command) -> None:
    home = tmp_path / "state"
    store = open_store(home)
    record(store, settings_of(home), [corrected(ticket) for ticket in tickets("repair", 5)])
    done = cltrain("calibrate", *words(home), "--json")
    assert (done.code, done.json["num_records"], done.json["num_missing"]) == (10, 5, 7), done
    assert done.json["proposed"] == {}
    said = cltrain("calibrate", *words(home))
    assert (said.code, "hold: 5 learnable records are waiting" in said.out, "need 7 more" in said.out) == (
        10,
        True,
        True,
    )


def test_records_that_cannot_be_learned_from_are_not_the_same_as_none(tmp_path: Path, cltrain: Command) -> None:
    home = tmp_path / "state"
    record(open_store(home), settings_of(home), [unlearnable("x"), unlearnable("y")])
    done = cltrain("calibrate", *words(home), "--json")
    assert done.json["reasons"][1:] == ["2 are unusable, most often (2): nobody who may judge it gave a score"]


def test_the_updates_begin_where_the_serving_release_is(tmp_path: Path) -> None:
    config = settings_of(tmp_path / "state")
    store, base = open_store(config.state_dir), load_base(None)
    record(store, config, [corrected(ticket) for ticket in tickets("repair", 12)])
    fresh = new_factors(base, config.adapter.rank, config.adapter.alpha, config.adapter.targets, seed=0)
    far = fresh.with_factors({m: (a, b + 0.05) for m, (a, b) in fresh.factors.items()})
    write_adapter(tmp_path / "made", far)
    parent = ensure_base_release(store, "support", base.digest, now=1.0).name
    release = seal(store, config.state_dir, "support", tmp_path / "made", parent, {}, now=2.0).name
    move_alias(store, "support", expected=parent, to=release, fence=None, now=3.0, is_human=True)
    found = calibrate(config, store, now=time.time(), on_progress=lambda line: None)
    assert all(update["drift_frobenius"] > 5 * update["step_frobenius"] for update in found["updates"])


def test_a_window_that_the_screens_refuse_is_left_out_and_said(tmp_path: Path) -> None:
    config = settings_of(tmp_path / "state", "experience.max_window=8", "experience.max_flagged_share=0.01")
    store = open_store(config.state_dir)
    good, bad = tickets("repair", 8), tickets("refund", 8, seed=6)
    invented = {"name": "repair", "arguments": {"item": "a thing that nobody named"}}
    record(store, config, [corrected(ticket) for ticket in good])
    record(store, config, [corrected(ticket, claimed=invented) for ticket in bad])
    found = calibrate(config, store, now=time.time(), on_progress=lambda line: None)
    assert (found["num_records"], found["num_missing"]) == (8, 4)
    assert any("window is refused" in reason for reason in found["reasons"])


def test_budgets_are_those_of_the_objectives_in_use_each_record_settled_as_by_an_update(tmp_path: Path) -> None:
    config = settings_of(
        tmp_path / "state", 'trainer.objectives.use=["dpo","policy","kto"]', "trainer.objectives.corrections=dpo"
    )
    store, base = open_store(config.state_dir), load_base(None)
    record(store, config, [corrected(ticket) for ticket in tickets("repair", 12)])
    (failed,) = (corrected(ticket) for ticket in tickets("refund", 1))
    answer = Generation("g", failed.id, 1, "support-v000009-aaaaaaaaaaaa", (1, 2), (3, 4), (-0.5, -0.5))
    thumb = Feedback("thumb", failed.id, score=-1.0, created_at=2.0)
    record(store, config, [replace(failed, feedback=(thumb,), generations=(answer,))])
    examples, _ = waiting_examples(config, store, base, "", time.time())
    assert Counter(example.objective for example in examples) == {"dpo": 12, "kto": 1}
    assert any("its adapter is gone" in note for example in examples for note in example.notes)
    found = calibrate(config, store, now=time.time(), on_progress=lambda line: None)
    assert len(found["updates"]) == 3
    assert found["proposed"]


def test_the_lines_show_what_each_update_measured() -> None:
    found = {
        "updates": [update_of(), update_of(step_kl=0.5)],
        "num_records": 12,
        "proposed": {"bounds": {"step_kl": 0.5}},
    }
    lines = toml_lines(found)
    assert "2 naive updates on 12" in lines[0]
    assert lines[-2:] == ["[bounds]", "step_kl = 0.5"]
    assert all(line.startswith("#") for line in lines[: lines.index("")])


@pytest.mark.parametrize("name", ["step_frobenius", "drift_frobenius", "step_spectral", "drift_spectral", "step_kl",
                                  "drift_kl", "day_frobenius"])  # fmt: skip
@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("0", "greater than 0; got 0"),
        ("-1.5", "greater than 0; got -1.5"),
        ("inf", "finite number; got inf"),
        ("nan", "got nan"),
    ],
)
def test_a_budget_of_zero_or_without_end_is_refused_with_its_name_and_value(name: str, value: str, said: str) -> None:
    with pytest.raises(ConfigError, match=rf"bounds\.{name}: .*{said}"):
        load((), [f"bounds.{name}={value}"])


def test_a_config_command_says_a_refused_budget_with_exit_code_2(cltrain: Command) -> None:
    done = cltrain("config", "check", "--set=bounds.drift_kl=inf")
    assert (done.code, done.err.strip()) == (
        2,
        "ConfigError: bounds.drift_kl: Input should be a finite number; got inf",
    )
    assert Deployment(load((), ["bounds.drift_kl=0.5"])).config.bounds.drift_kl == 0.5
