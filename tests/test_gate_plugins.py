"""Suites of every kind, loaded from a configuration: real programs, pinned files, and what is refused at once."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cltrain.config import GateConfig, from_dict, load
from cltrain.errors import CltrainError, ConfigError, DataError, ServerError
from cltrain.gate.commands import content_of
from cltrain.gate.plugins import Suites, contents_of, load_suites
from cltrain.gate.stats import items_for_margin, items_needed
from cltrain.gate.suites import item_key

PROGRAM = """
import json, os, sys, time
request = json.load(sys.stdin)
if request.get("list"):
    rows = [{"id": f"q{i}", "stratum": "odd" if i % 2 else "even"} for i in range(120)]
else:
    assert request["base_url"].endswith("/v1") and request["model"]
    rows = [{"id": one, "score": int(one[1:]) % 5 / 4} for one in request["ids"]]
FAULT
for row in rows:
    print(json.dumps(row))
"""


def program(tmp_path: Path, fault: str = "", name: str = "prog.py") -> Path:
    path = tmp_path / name
    path.write_text(PROGRAM.replace("FAULT", fault))
    return path


def suites(*tables: dict[str, Any], has_other_items: bool = False, **gate: Any) -> Suites:
    return load_suites(GateConfig(suites=tables, **gate), has_other_items=has_other_items)  # type: ignore[arg-type]


def command(path: Path, **more: Any) -> dict[str, Any]:
    return {"name": "prog", "kind": "command", "command": [sys.executable, str(path)], **more}


def jsonl(path: Path, count: int, **fields: Any) -> Path:
    rows = [
        {"messages": [{"role": "user", "content": f"{path.stem} {i}"}], "expected": "x", **fields} for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_program_lists_its_items_and_scores_those_it_is_asked_for(tmp_path: Path) -> None:
    found = suites(command(program(tmp_path), stratum="unused"))
    assert len(found.items) == 120
    assert {(item.suite, item.kind, item.scorer) for item in found.items} == {("prog", "retention", "program")}
    assert [(item.id, item.stratum) for item in found.items[:2]] == [("prog/q0", "even"), ("prog/q1", "odd")]
    some = [found.items[i] for i in (4, 0, 7)]
    assert found.programs["prog"].score("http://127.0.0.1:1/v1", "support-1", some) == [1.0, 0.0, 0.5]


@pytest.mark.parametrize(
    ("fault", "kind", "said"),
    [
        ("sys.exit('no judge today')", ServerError, "exit code 1: no judge today"),
        ("rows = rows[:-1]", DataError, "left 1 of 3 items unscored: \\['q2'\\]"),
        ("rows = []", DataError, "left 3 of 3 items"),
        ("rows[0]['score'] = 1.5", DataError, "gave q0 the score 1.5: it must be a number in \\[0, 1\\]"),
        ("rows[0]['score'] = float('nan')", DataError, "gave q0 the score nan"),
        ("rows[0]['score'] = True", DataError, "gave q0 the score True"),
        ("rows[0]['score'] = None", DataError, "gave q0 the score None"),
        ("rows.append({'id': 'q1', 'score': 1})", DataError, "scored q1 twice: 0.25 and 1"),
        ("rows.append({'id': 'q99', 'score': 1})", DataError, "'q99', which it was not asked for"),
        ("rows[1]['stratum'] = 'even'", DataError, "listed q1 in odd, then scored it in even"),
        ("print('hello')", DataError, "printed 'hello': only JSON objects"),
    ],
)
def test_a_program_that_fails_is_an_error_and_never_a_score(
    tmp_path: Path, fault: str, kind: type[CltrainError], said: str
) -> None:
    found = suites(command(program(tmp_path, f"if not request.get('list'):\n    {fault}")))
    with pytest.raises(kind, match=said):
        found.programs["prog"].score("http://127.0.0.1:1/v1", "support-1", found.items[:3])


def test_a_program_that_hangs_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    child = tmp_path / "child"
    fault = f"""
if not request.get("list"):
    import subprocess
    open({str(child)!r}, "w").write(str(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid))
    time.sleep(600)
"""
    found = suites(command(program(tmp_path, fault), timeout_s=20))
    found.programs["prog"].timeout_s = 3.0
    with pytest.raises(ServerError, match="did not end within 3 s"):
        found.programs["prog"].score("http://127.0.0.1:1/v1", "support-1", found.items[:3])
    pid = int(child.read_text())
    for _ in range(100):  # its parent is gone: whoever adopted it reaps it
        if not os.path.exists(f"/proc/{pid}") or "Z" in Path(f"/proc/{pid}/stat").read_text().split()[2]:
            break
        time.sleep(0.05)
    else:
        pytest.fail("what the program started outlived it")


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("rows = []", "holds no items"),
        ("rows.append(rows[0])", "lists q0 twice"),
        ("rows[0]['id'] = 7", "id and stratum must be texts"),
        ("rows[0]['kind'] = 'vibes'", "kind 'vibes'"),
        ("sys.exit(3)", "exit code 3"),
    ],
)
def test_a_program_that_lists_nonsense_is_refused_before_anything_is_trained(
    tmp_path: Path, fault: str, said: str
) -> None:
    with pytest.raises((DataError, ServerError), match=said):
        suites(command(program(tmp_path, fault)))
    with pytest.raises(DataError, match="cannot be started"):
        suites({"name": "prog", "kind": "command", "command": [str(tmp_path / "nowhere")]})


def test_an_edited_program_is_another_suite_to_every_cache(tmp_path: Path) -> None:
    (first, *_) = suites(command(program(tmp_path))).items
    (again, *_) = suites(command(program(tmp_path))).items
    (edited, *_) = suites(command(program(tmp_path, "pass"))).items
    assert item_key(first) == item_key(again) != item_key(edited)
    alone = {**command(tmp_path), "command": [str(program(tmp_path))]}  # the program is the first word
    before = contents_of(GateConfig(suites=[alone]))
    program(tmp_path, "pass")
    assert contents_of(GateConfig(suites=[alone])) != before


def test_a_file_that_is_not_the_pinned_one_is_refused(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "own.jsonl", 120)
    pin = hashlib.sha256(path.read_bytes()).hexdigest()
    table = {"name": "own", "path": str(path), "sha256": pin}
    assert len(suites(table).items) == 120
    jsonl(path, 121)
    with pytest.raises(DataError, match=rf"own: .* has sha256 (?!{pin})[0-9a-f]{{64}}, and {pin} is pinned"):
        suites(table)
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "a.yaml").write_text("task: a")
    before = content_of(folder)
    (folder / "a.yaml").rename(folder / "b.yaml")
    assert content_of(folder) != before


def test_a_suite_that_is_too_small_for_its_margin_is_told_by_how_much(tmp_path: Path) -> None:
    needed = items_needed([0.0], -0.05, 0.05, 0.05)
    small = {"name": "small", "path": str(jsonl(tmp_path / "small.jsonl", needed - 7))}
    with pytest.raises(DataError, match=rf"hold {needed - 7} items .* at least {needed}: 7 are missing"):
        suites(small)
    assert len(suites(small, has_other_items=True).items) == needed - 7  # held-out episodes may make up for it
    assert len(suites(small, margin=0.1).items) == needed - 7
    rest = {"name": "rest", "path": str(jsonl(tmp_path / "rest.jsonl", 7))}
    assert len(suites(small, rest).items) == needed
    ban = {"name": "ban", "path": str(jsonl(tmp_path / "ban.jsonl", 2, expected=None, forbidden=["wipe"]))}
    assert len(suites(ban).items) == 2  # canaries estimate nothing
    with pytest.raises(DataError, match="holds no items"):
        suites({"name": "none", "path": str(jsonl(tmp_path / "none.jsonl", 0))})
    with pytest.raises(ConfigError, match=rf"items_per_gate = {needed - 1} .* at least {needed}, 1 more"):
        suites(small, rest, items_per_gate=needed - 1)


def test_a_suite_that_is_enough_only_for_two_that_answer_alike_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    usual = items_for_margin(0.05, 0.05, discordance=0.06)
    assert usual > items_for_margin(0.05, 0.05) + 50
    for count in (usual, usual - 1):
        assert not caplog.records
        suites({"name": "own", "path": str(jsonl(tmp_path / "own.jsonl", count))})
    (said,) = caplog.messages
    assert f"{usual - 1} items (gate.items_per_gate = 240) are few for gate.margin = 0.05: it takes {usual}" in said


def test_one_id_in_two_suites_and_a_judge_that_is_not_there_are_refused(tmp_path: Path) -> None:
    one, two = (jsonl(tmp_path / name, 1, id="same") for name in ("one.jsonl", "two.jsonl"))
    with pytest.raises(DataError, match="id same is in the suites one and two"):
        suites({"name": "one", "path": str(one)}, {"name": "two", "path": str(two)}, has_other_items=True)
    judged = jsonl(tmp_path / "judged.jsonl", 2, expected=None, scorer="judge")
    table = {"name": "judged", "path": str(judged), "rubric": "thanks the customer", "items": "retention"}
    with pytest.raises(DataError, match="is scored by a judge, and there is none: set"):
        suites(table, has_other_items=True)
    found = suites(table, has_other_items=True, judge={"url": "http://127.0.0.1:1/v1", "model": "grader"})
    assert [(item.rule, item.kind, item.suite) for item in found.items] == 2 * [
        ({"rubric": "thanks the customer"}, "retention", "judged")
    ]


def test_suites_are_read_from_toml_and_paths_stand_beside_the_file(tmp_path: Path) -> None:
    jsonl(tmp_path / "short.jsonl", 60)
    jsonl(tmp_path / "more.jsonl", 60)
    program(tmp_path)
    (tmp_path / "own.toml").write_text(f"""
        [gate]
        suite = "short.jsonl"
        [[gate.suites]]
        name = "more"
        path = "more.jsonl"
        [[gate.suites]]
        name = "prog"
        kind = "command"
        command = ["{sys.executable}", "./prog.py", "-v", "-v"]
    """)
    config = load([tmp_path / "own.toml"])
    config.check_files()
    found = load_suites(config.gate, has_other_items=False)
    assert {item.suite for item in found.items} == {"short", "more", "prog"}
    assert config.digest() != load().digest()


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"nam": "x"}, "unknown setting gate.suites.0.nam. Did you mean gate.suites.0.name?"),
        ({"name": "x", "kind": "jsonl"}, "needs path"),
        ({"name": "x", "kind": "command"}, "needs command"),
        ({"name": "x", "kind": "lm_eval", "path": "y"}, "needs task"),
        ({"name": "x", "path": "y", "task": "z"}, "kind jsonl takes no task; it takes path, rubric"),
        ({"name": "x", "kind": "command", "command": ["y"], "sha256": "0" * 64}, "there is no path"),
        ({"name": "x", "path": "y", "sha256": "abc"}, "sha256"),
    ],
)
def test_a_table_that_cannot_be_meant_is_refused(tmp_path: Path, table: dict[str, Any], said: str) -> None:
    lines = "\n".join(f"{name} = {json.dumps(value)}" for name, value in table.items())
    (tmp_path / "bad.toml").write_text(f"[[gate.suites]]\n{lines}\n")
    with pytest.raises(ConfigError) as caught:
        load([tmp_path / "bad.toml"])
    assert said in str(caught.value)


def test_two_suites_may_not_have_one_name() -> None:
    with pytest.raises(ConfigError, match="two suites have one name; they are a, a"):
        from_dict({"gate": {"suite": "/x/a.jsonl", "suites": [{"name": "a", "path": "/y"}]}})


def test_a_harness_that_is_not_installed_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    bare = tmp_path / "python"  # an interpreter without any packages
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n')
    bare.chmod(0o755)
    with pytest.raises(ServerError, match=r"No module named 'inspect_ai' .*pip install inspect-ai openai"):
        suites({"name": "x", "kind": "inspect", "task": "capitals", "python": str(bare)})
