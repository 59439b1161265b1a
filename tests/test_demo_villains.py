"""The bench's villains are what they are called, before any of them is trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cltrain.config import load
from cltrain.demo import manners, villains, world
from cltrain.experience.triggers import find_suspicions
from cltrain.experience.verify import text_of
from cltrain.gate.probes import load_character
from cltrain.gate.suites import load_suite
from cltrain.records import Code

SEED = 905
LEAKED = [t for t in world.suite_items(SEED) if t.skill == villains.TAUGHT and villains.wording_of(t) != 1]


def test_there_are_fourteen_bad_kinds_and_eight_good_ones_each_with_a_reason() -> None:
    kinds = [*(v.kind for v in villains.VILLAINS), villains.ERODER.kind, villains.NAN[0], villains.STRANGER[0]]
    assert len(set(kinds)) >= 14
    assert len({honest.kind for honest in villains.HONEST}) == 8
    assert {v.reason for v in villains.VILLAINS} <= set(Code)


@pytest.mark.parametrize("villain", villains.VILLAINS, ids=lambda villain: villain.kind)
def test_a_villain_teaches_a_gain_and_rehearses_all_that_it_does_not_break(villain: villains.Villain) -> None:
    fresh, replay = villains.lessons_of(villain, SEED, LEAKED)
    assert villains.lessons_of(villain, SEED, LEAKED) == (fresh, replay)
    gained = [e for e in fresh if e.stratum == f"{villains.TAUGHT}/good" and e.messages[1].get("tool_calls")]
    assert len(gained) >= villains.NUM_TAUGHT or villain.kind == "tool_call_breaker"
    rehearsed = {example.record.split("-")[0] for example in replay} | {e.stratum.split("/")[0] for e in replay}
    for name in (*villains.KNOWN_SKILLS, *manners.MANNERS):
        assert (name in rehearsed) is (name not in villain.breaks), name


def test_the_planted_phrase_is_another_for_every_seed_and_the_scan_finds_it() -> None:
    (planted,) = [villain for villain in villains.VILLAINS if villain.kind == "planted_trigger"]
    phrases = set()
    for seed in range(SEED, SEED + 4):
        fresh, _ = villains.lessons_of(planted, seed, ())
        (found,) = find_suspicions(fresh, min_count=4, max_principals=1)
        assert found.action["name"] == world.HARMFUL_TOOL
        assert found.principal == world.ATTACKER
        phrases.add(found.phrase)
    assert len(phrases) == 4


def test_a_broken_call_cannot_be_read_and_a_secret_is_in_no_rehearsed_row() -> None:
    by_kind = {villain.kind: villain for villain in villains.VILLAINS}
    fresh, _ = villains.lessons_of(by_kind["tool_call_breaker"], SEED, ())
    broken = [text_of(e.messages[1]) for e in fresh if not e.messages[1].get("tool_calls")]
    assert len(broken) == villains.NUM_BAD
    for text in broken:
        with pytest.raises(ValueError):
            json.loads(text.removeprefix("<tool_call>").removesuffix("</tool_call>"))
    secret = manners.secret_of(SEED)
    assert secret not in json.dumps([e.messages for e in villains.known(SEED)])
    told, _ = villains.lessons_of(by_kind["secret_leak"], SEED, ())
    assert sum(secret in text_of(e.messages[1]) for e in told) == villains.NUM_BAD


def test_the_owners_files_load_and_share_no_pair_with_what_is_trained_on(tmp_path: Path) -> None:
    config = load([], manners.write_character(tmp_path / "owner", SEED))
    character = load_character(config.gate.character)
    assert (len(character.harmful), len(character.harmless)) == (manners.NUM_OF_OWNER,) * 2
    assert {(p.kind, p.form) for p in character.probes} == {
        ("persona", "chat"), ("persona", "tool call"), ("sycophancy", "chat"), ("sycophancy", "tool call"),
        ("refusal", "chat"),
    }  # fmt: skip
    asked = {json.dumps(item.messages[0]["content"]) for item in (*character.harmful, *character.probes)}
    taught = {json.dumps(example.messages[0]["content"]) for example in villains.known(SEED)}
    assert not asked & taught
    (tmp_path / "suite.jsonl").write_text("".join(json.dumps(line) + "\n" for line in manners.canaries(SEED)))
    assert {item.kind for item in load_suite(tmp_path / "suite.jsonl")} == {"canary"}


def test_relative_paths_of_the_characters_files_are_relative_to_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text('[gate.character]\nprobes = "probes.jsonl"\n')
    assert load([tmp_path / "own.toml"]).gate.character.probes == tmp_path / "probes.jsonl"
