"""A setting that cannot be honoured is refused by name, wherever it stands."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from cltrain.config import Config, from_dict, load
from cltrain.errors import ConfigError
from cltrain.launch import needed
from tests.command import Command, cltrain

__all__ = ["cltrain"]  # a fixture


def settings_of(kind: str, section: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """Every setting whose type says `kind`."""
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from settings_of(kind, inner, f"{prefix}{name}.")
        elif re.search(rf"\b{kind}\b", str(inner)):
            yield f"{prefix}{name}"


@pytest.mark.parametrize("value", ["inf", "-inf", "nan"])
def test_no_number_may_be_infinite_or_none_at_all(value: str) -> None:
    names = list(settings_of("float"))
    assert {"gate.base_kl", "trainer.lr", "trainer.objectives.sft", "health.max_ending_ratio"} <= set(names)
    for name in names:
        with pytest.raises(ConfigError, match=rf"{name}: .*; got -?(inf|nan)"):
            load((), [f"{name}={value}"])


def test_a_number_is_no_switch() -> None:
    names = [*settings_of("int"), *settings_of("float")]
    assert {"seed", "trainer.lr", "base.context"} <= set(names)
    for name in names:
        with pytest.raises(ConfigError, match=rf"{name}: .*true and false are for switches only; got True"):
            load((), [f"{name}=true"])
    assert load((), ["experience.filter=false"]).experience.filter is False


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("adapter.targets=[]", "adapter.targets: "),
        ("trainer.objectives.use=[]", "trainer.objectives.use: "),
        ("agent.learn_from=[]", "agent.learn_from: "),
        ('trainer.remember=["ewc","ewc"]', "trainer.remember: .*listed twice"),
        ('server.url="nonsense"', "server.url: .*got 'nonsense'"),
        ('server.url="http://"', "server.url: "),
        ('server.urls=["http://a", "nonsense"]', r"server.urls.*got 'nonsense'"),
        ('server.urls=["http://a", "http://a"]', "server.urls: .*listed twice"),
        ("server.min_ready=2", r"min_ready = 2, but there are 1 replicas"),
        ("gate.stratum_margin=0.01", r"gate: .*margin = 0.05 is wider than stratum_margin = 0.01"),
        ("gate.margin=0.5", r"gate: .*margin = 0.5 is wider than stratum_margin = 0.12"),
        ("gate.character.probe_fall=16", r"gate.character: .*probe_fall = 16 lets one update go farther than .* = 15"),
        ("gate.detectors.spectrum_history=65", "gate.detectors.spectrum_history: "),
        ("rollout.weights=[0.05, 1.0]", "rollout: .*shares between 0 and 1, and one is 1: after the last comes all"),
        ("rollout.weights=[0.0]", "rollout: .*shares between 0 and 1, and one is 0"),
        ("rollout.weights=[0.5, 0.25]", "rollout: .*grow from step to step, and these do not: 0.5, 0.25"),
        ("rollout.weights=[0.1, 0.1]", "rollout.weights: .*listed twice"),
        ("rollout.weights=[]", "rollout.weights: "),
        ("rollout.kind=blue-green", "rollout.kind: .*got 'blue-green'"),
        ("rollout.kind=rolling", "rollout.kind = 'rolling' needs two replicas or more"),
        ("rollout.kind=blue_green", "rollout.kind = 'blue_green' needs two replicas or more"),
        ("rollout={kind='canary', max_hours=0.5, settle_s=1800}", "rollout: .*no episode of a canary would count"),
        ("rollout.on_timeout=hope", "rollout.on_timeout: .*got 'hope'"),
    ],
)
def test_what_could_not_be_meant_is_refused(setting: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load((), [setting])


@pytest.mark.parametrize("kind", ["canary", "shadow"])
def test_a_server_without_room_for_a_candidate_beside_what_serves_is_refused(kind: str) -> None:
    with pytest.raises(ConfigError, match=rf"rollout.kind = '{kind}' keeps the candidate.*max_adapters = 2.*needs 3"):
        load((), [f"rollout.kind={kind}", "server.max_adapters=2"])
    assert load((), [f"rollout.kind={kind}", "server.max_adapters=3"]).rollout.is_tried


def test_a_bound_on_promotions_without_a_gain_is_for_a_gate_that_asks_for_one() -> None:
    with pytest.raises(ConfigError, match=r"fdr bounds .* promote_on = 'expected' asks for none"):
        load((), ["gate.fdr=true", 'gate.promote_on="expected"'])
    assert load((), ["gate.fdr=true", "gate.margin=0.12", "gate.character.probe_fall=15"]).gate.fdr


def test_a_shadow_is_not_judged_by_what_nobody_sees() -> None:
    with pytest.raises(ConfigError, match="kind = 'shadow' has faults alone"):
        load((), ["rollout.kind=shadow", 'rollout.metrics=["score"]'])
    assert load((), ["rollout.kind=shadow"]).rollout.judged_by == ("faults",)
    assert load((), ["rollout.kind=canary"]).rollout.judged_by == ("faults", "score")


def test_a_tenants_candidates_are_not_tried_and_all_else_of_the_rollout_holds() -> None:
    two = 'server.urls=["http://a", "http://b"]'
    for kind, expected in (("canary", "all"), ("shadow", "all"), ("rolling", "rolling"), ("blue_green", "blue_green")):
        given = load((), [two, f"rollout.kind={kind}", "rollout.grace_s=600", "agent.name=support@acme"]).rollout
        assert (given.kind, given.grace_s) == (expected, 600)


@pytest.mark.parametrize("name", ["base.path", "gate.suite", "trainer.anchors", "experience.rehearsal"])
def test_config_check_says_what_is_not_there(cltrain: Command, tmp_path: Path, name: str) -> None:
    done = cltrain("config", "check", f"--set={name}={tmp_path / 'nowhere'}")
    assert (done.code, f"{name} = '{tmp_path / 'nowhere'}': there is no such file" in done.err) == (2, True), done
    assert cltrain("config", "check", f"--set={name}={tmp_path}").code == 0


def test_only_settings_that_somebody_gave_are_compared() -> None:
    theirs = load((), ["trainer.lr=0.001", "agent.mode=auto"]).shaping()
    assert load().unlike(theirs) == []
    assert load((), ["trainer.lr=1e-3", "home=/elsewhere", "server.port=1"]).unlike(theirs) == []
    assert load((), ["trainer.lr=0.002", "agent.mode=auto"]).unlike(theirs) == ["trainer.lr = 0.001, not 0.002"]


def test_replicas_are_named_by_urls_alone() -> None:
    two = ['server.urls=["http://a:8000", "http://b:8000"]', "server.min_ready=2"]
    assert load((), two).server.replicas == ("http://a:8000", "http://b:8000")
    assert load((), ['server.urls=["http://a/v1/", "http://b/"]']).server.replicas == ("http://a", "http://b")
    assert needed(load((), two)) == ("gateway", "worker"), "they run already"
    for url in ("http://a", "http://a/", "http://a/v1", "http://a/v1/"):
        assert load((), [f"server.url={url}"]).server.replicas == ("http://a",), url
    with pytest.raises(ConfigError, match="listed twice"):
        load((), ['server.urls=["http://a", "http://a/v1"]'])
    assert load().server.replicas == ("http://127.0.0.1:8101",)
    with pytest.raises(ConfigError, match=r"server\.url and server\.urls are both given"):
        load((), [*two, "server.url=http://c:8000"])


def test_a_lower_clip_that_cispo_does_not_have_is_refused_and_ppo_takes_it() -> None:
    """MiniMax-M1 (arXiv:2506.13585) clips the importance weight from above alone."""
    assert from_dict({"trainer": {"objectives": {"policy_kind": "ppo", "clip_low": 0.3}}})
    with pytest.raises(ConfigError, match=r"clip_low = 0.3, but policy_kind = 'cispo' has no lower bound"):
        from_dict({"trainer": {"objectives": {"clip_low": 0.3}}})
    assert from_dict(Config().resolved())
