"""Import: every line of a file becomes a record, a duplicate, or is kept aside with its reason."""

import json
import os
from pathlib import Path

import pytest
from sqlalchemy import select

from cltrain.config import ExperienceConfig, ObjectivesConfig
from cltrain.errors import DataError
from cltrain.experience import ingest
from cltrain.experience.examples import example_of
from cltrain.experience.ingest import import_file, read_rehearsal
from cltrain.experience.lanes import lane_of
from cltrain.experience.lines import KEPT_BYTES, MAX_LINE_BYTES
from cltrain.experience.reading import read_trajectories
from cltrain.experience.recording import Recorder
from cltrain.experience.rows import num_set_aside
from cltrain.experience.verify import verify
from cltrain.experience.window import next_window
from cltrain.records import Example, Generation, Trajectory
from cltrain.store.database import open_store
from cltrain.store.schema import set_aside

SHARED = Path(os.environ.get("CLTRAIN_SHARED_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
TAU_BENCH = SHARED / "tau-bench" / "trajectories.jsonl"


@pytest.fixture
def store(tmp_path):
    store = open_store(tmp_path / "state")
    yield store
    store.close()


@pytest.fixture
def recorder(store):
    with Recorder(store, b"k" * 32, 0.1) as recorder:
        yield recorder


def take(recorder, store, file, **options):
    return import_file(recorder, file, "support", clock=lambda: 1000.0, **options)


def kept_aside(store):
    with store.read() as connection:
        return connection.execute(select(set_aside).order_by(set_aside.c.line)).all()


def episode(identifier="a", arguments='{"item": "lamp"}', **fields):
    call = {"id": "c", "type": "function", "function": {"name": "repair", "arguments": arguments}}
    messages = [
        {"role": "user", "content": "my lamp is broken"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "ok"},
        {"role": "assistant", "content": "done"},
    ]
    return {"id": identifier, "model": "old-agent", "reward": 1.0, "messages": messages, **fields}


@pytest.mark.skipif(not TAU_BENCH.exists(), reason="shared data is not here")
def test_every_real_airline_episode_is_accounted_for(recorder, store):
    report = take(recorder, store, TAU_BENCH)
    assert (report.num_lines, report.num_imported, report.num_set_aside, report.num_duplicates) == (200, 200, 0, 0)
    assert (report.num_positive, report.num_without_tools) == (84, 200)
    again = take(recorder, store, TAU_BENCH)
    assert (again.num_imported, again.num_duplicates, again.num_set_aside) == (0, 200, 0)
    stored = read_trajectories(store, "support")
    rewards = {row["id"]: row["reward"] for row in map(json.loads, TAU_BENCH.open())}
    messages = {row["id"]: row["messages"] for row in map(json.loads, TAU_BENCH.open())}
    assert {t.id: (t.feedback[0].score + 1) / 2 for t in stored} == rewards
    assert {t.id: list(t.messages) for t in stored} == messages
    train = [t for t in stored if t.split == "train"]
    assert all("'gpt-4o'" in example_of(t, learn_from=("agent",), tools_allowed=None) for t in train if rewards[t.id])
    listed = [example_of(t, learn_from=("gpt-4o",), tools_allowed=None) for t in train]
    learnable = [e for e in listed if isinstance(e, Example)]
    assert len(learnable) == sum(rewards[t.id] == 1 for t in train) > 60
    assert [verify(e) for e in learnable] == [None] * len(learnable)
    assert any(verify(e, must_be_grounded=True) for e in learnable), "real agents compose dates and sums"


def test_broken_lines_are_counted_and_kept_with_their_reason(recorder, store, tmp_path):
    deep = b'{"id": "deep", "messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    lines = [
        b"\xef\xbb\xbf" + json.dumps(episode("a")).encode(),  # a byte order mark is no fault
        b"{not json",
        json.dumps(episode("b", arguments="lamp, please")).encode(),
        json.dumps(episode("c", arguments="[1]")).encode(),
        b'{"id": "d", "messages": "\xff\xfe"}',
        b'["a", "list"]',
        b"",
        json.dumps(episode("e", reward=7)).encode(),
        json.dumps(episode("f", reward=True)).encode(),
        json.dumps(episode("f", reward=-0.5)).encode(),  # as a score it would be one
        json.dumps(episode("g", messages=[])).encode(),
        json.dumps(episode("h", messages=[{"role": "user", "content": "hi"}])).encode(),
        json.dumps(episode("i", messages=[{"role": "king", "content": "hi"}])).encode(),
        json.dumps(episode("i", messages=[{"role": ["user"], "content": "hi"}])).encode(),
        json.dumps(episode("j", tools="all")).encode(),
        b'{"id": "k", "reward": NaN, "messages": []}',
        b'{"id": "l", "messages": [{"role": "assistant", "content": "\\ud800"}]}',
        deep,
        json.dumps(episode("m", arguments='{"item": "\\ud800"}')).encode(),
        json.dumps(episode("n", arguments='{"item": ' + "[" * 900 + "]" * 900 + "}")).encode(),
        json.dumps(episode("o", tools=[{"type": "web_search"}])).encode(),
        json.dumps(episode("a", reward=0.0)).encode(),  # the id of line 1, another verdict
        json.dumps(episode("a")).encode(),  # line 1 again
        json.dumps(episode("z")).encode(),
    ]
    file = tmp_path / "log.jsonl"
    file.write_bytes(b"\r\n".join(lines))
    report = take(recorder, store, file)
    assert (report.num_imported, report.num_duplicates, report.num_blank) == (2, 1, 1)
    assert report.num_lines == len(lines) - 1 == 2 + 1 + report.num_set_aside
    aside = kept_aside(store)
    assert [row.line for row in aside] == [2, 3, 4, 5, 6, *range(8, 23)]
    assert [row.raw for row in aside] == [lines[row.line - 1] for row in aside]
    assert sum(report.reasons.values()) == len(aside)
    assert (
        aside[1].reason
        == "a tool call's arguments are no JSON object: message 1: the arguments of 'repair' are not JSON"
    )
    assert "UTF-8" in aside[3].reason
    assert aside[-1].reason == "id already used in this file for another episode: a"
    assert [t.id for t in read_trajectories(store, "support")] == ["a", "z"]
    take(recorder, store, file)
    assert len(kept_aside(store)) == len(aside), "importing again keeps nothing twice"


@pytest.mark.parametrize("number", ["1e999", "-1e999", "1" + "0" * 400, "NaN", '"1"', "true"])
@pytest.mark.parametrize("field", ["reward", "created_at"])
def test_numbers_that_are_no_reward_or_time_are_refused(recorder, store, tmp_path, field, number):
    file = tmp_path / "log.jsonl"
    line = json.dumps(episode(**{field: 0})).replace(f'"{field}": 0', f'"{field}": {number}')
    file.write_text(f"{line}\n{json.dumps(episode('next'))}")
    report = take(recorder, store, file)
    assert (report.num_imported, report.num_set_aside) == (1, 1)


def test_a_line_that_defeats_its_reader_or_the_store_is_set_aside_and_the_next_one_is_read(recorder, store, tmp_path):
    with pytest.raises(ingest._Refused, match="its content cannot be used: KeyError"):
        ingest._read(lambda line: line["messages"], {})
    message = {"role": "assistant", "content": "hello"}
    taken = Generation("x:answer", "other", 0, "r1", None, None, None, "stop")
    recorder.add_trajectory(
        Trajectory("other", "support", "other", "ann", (message,), ("agent",), generations=(taken,))
    )
    choice = {"message": message, "finish_reason": "stop", "token_ids": [1]}
    asked = {"model": "r1", "messages": [{"role": "user", "content": "hi"}]}
    lines = [{"id": "x", "request": asked, "response": {"model": "r1", "choices": [choice]}}, episode("next")]
    file = tmp_path / "log.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    report = take(recorder, store, file, producer="agent", releases=["r1"])
    assert (report.num_imported, report.reasons) == (1, {"cannot be stored": 1})


def test_a_huge_line_costs_no_memory_and_the_next_one_is_read(recorder, store, tmp_path):
    file = tmp_path / "log.jsonl"
    with file.open("wb") as stream:
        stream.write(b'{"id": "big", "x": "' + b"y" * (MAX_LINE_BYTES * 2) + b'"}\n')
        stream.write(json.dumps(episode("next")).encode())
    report = take(recorder, store, file)
    assert (report.num_lines, report.num_imported, report.num_set_aside) == (2, 1, 1)
    (row,) = kept_aside(store)
    assert row.line == 1
    assert len(row.raw) == KEPT_BYTES
    assert str(MAX_LINE_BYTES * 2 + 23) in row.reason, "the real size is told"


def test_an_empty_file_is_no_error_and_an_unreadable_one_is(recorder, store, tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    assert take(recorder, store, empty).num_lines == 0
    with pytest.raises(DataError, match="cannot read"):
        take(recorder, store, tmp_path / "nothing.jsonl")
    with pytest.raises(DataError, match="cannot read"):
        take(recorder, store, tmp_path)
    wide = tmp_path / "wide.jsonl"
    wide.write_text(json.dumps(episode()), encoding="utf-16")
    with pytest.raises(DataError, match="UTF-16"):
        take(recorder, store, wide)


def test_an_id_that_is_stored_with_other_content_is_kept_aside(recorder, store, tmp_path):
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    first.write_text(json.dumps(episode("a")))
    second.write_text(json.dumps(episode("a", session="other")))
    take(recorder, store, first)
    assert take(recorder, store, second).reasons == {"conflicts with what is stored": 1}
    assert import_file(recorder, first, "sales", clock=lambda: 1.0).reasons == {"conflicts with what is stored": 1}
    reasons = [row.reason.partition("'a' ")[2] for row in kept_aside(store)]
    assert reasons == ["is already stored for another episode: use a new id", "is taken: use a new id"]


def test_a_producer_named_later_is_that_of_answers_whose_was_unknown(recorder, store, tmp_path):
    file = tmp_path / "log.jsonl"
    named = episode("named")
    lines = [{key: value for key, value in episode("unknown").items() if key != "model"}, named]
    file.write_text("\n".join(map(json.dumps, lines)))

    def learnable():
        read = next_window(store, "support", ExperienceConfig(), learn_from=("agent",), tools_allowed=None, now=2000.0)
        return [example.record for example in read.examples]

    take(recorder, store, file)
    assert learnable() == []
    again = take(recorder, store, file, producer="agent")
    assert (again.num_imported, again.num_duplicates) == (1, 0)
    assert again.reasons == {"conflicts with what is stored": 1}, "whose producer is known keeps it"
    assert learnable() == ["unknown"]
    assert take(recorder, store, file, producer="agent").num_duplicates == 1


def test_nothing_is_guessed_about_producer_tools_and_reward(recorder, store, tmp_path):
    file = tmp_path / "log.jsonl"
    unknown = {key: value for key, value in episode("u").items() if key not in {"model", "reward"}}
    lines = [unknown, episode("m", reward=0.25), episode("s", reward=None, score=0.25, principal="ann")]
    file.write_text("\n".join(map(json.dumps, lines)))
    report = take(recorder, store, file)
    assert (report.num_without_reward, report.num_positive, report.num_without_tools) == (1, 1, 3)
    u, m, s = read_trajectories(store, "support")
    assert u.producers == ("user", None, "tool", None)
    assert (u.feedback, u.tools, u.principal, u.session) == ((), (), "import:log", "u")
    assert (m.feedback[0].score, m.producers[1]) == (-0.5, "old-agent")
    assert (s.feedback[0].score, s.principal) == (0.25, "ann")


def pair(identifier="p", **changes):
    (asked, rejected, *_), (_, chosen, *_) = episode()["messages"], episode(arguments='{"item": "my lamp"}')["messages"]
    return {"id": identifier, "prompt": [asked], "chosen": [chosen], "rejected": [rejected], **changes}


def test_a_pair_is_a_correction_of_the_rejected_answer_and_learned_by_dpo_where_asked(recorder, store, tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps(pair()))
    assert take(recorder, store, file, producer="agent").num_imported == 1
    assert take(recorder, store, file, producer="agent").num_duplicates == 1
    (stored,) = read_trajectories(store, "support")
    rules = {"learn_from": ("agent",), "tools_allowed": None}
    learned = lane_of(stored, ObjectivesConfig(corrections="dpo"), **rules)
    assert (learned.objective, learned.kind, learned.targets) == ("dpo", "correction", (1,))
    assert [called["tool_calls"][0]["function"]["arguments"] for called in (learned.messages[1], learned.rejected)] == [
        '{"item": "my lamp"}', '{"item": "lamp"}',
    ]  # fmt: skip
    assert lane_of(stored, ObjectivesConfig(), **rules).objective == "sft"
    file.write_text(json.dumps(pair(chosen=pair()["rejected"])))
    assert take(recorder, store, file, producer="agent").reasons == {"conflicts with what is stored": 1}


def test_a_pair_whose_author_nobody_named_is_set_aside_until_somebody_does(recorder, store, tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps(pair()))
    assert take(recorder, store, file).reasons == {"nobody said who wrote the answers of a pair": 1}
    assert take(recorder, store, file, producer="agent").num_imported == 1


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"prompt": "my lamp"}, "a pair's `prompt` is not a list of messages"),
        ({"rejected": None}, "has no `messages`"),
        *[({key: [{"role": ["user"]}]}, "a message has no known role") for key in ("prompt", "chosen", "rejected")],
        (
            {"chosen": episode()["messages"]},
            "a pair's `chosen` and `rejected` are not one answer of the assistant each",
        ),
    ],
)
def test_a_pair_of_another_form_is_set_aside_with_its_reason(recorder, store, tmp_path, changes, reason):
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps(pair(**changes)))
    assert take(recorder, store, file, producer="agent").reasons == {reason: 1}


def test_the_owner_names_the_producer_of_a_log(recorder, store, tmp_path):
    file = tmp_path / "log.jsonl"
    file.write_text(json.dumps(episode()))
    take(recorder, store, file, producer="agent")
    assert read_trajectories(store, "support")[0].producers == ("user", "agent", "tool", "agent")


@pytest.mark.parametrize("word", ["agent", "operator", "rehearsal", "user"])
def test_a_file_cannot_claim_to_be_written_by_whom_we_trust(recorder, store, tmp_path, word):
    file = tmp_path / "log.jsonl"
    file.write_text(json.dumps(episode("a", model=word)) + "\n" + json.dumps(episode("b")))
    report = take(recorder, store, file)
    assert (report.num_imported, report.num_set_aside) == (1, 1)
    assert report.reasons == {"`model` is a producer that only this deployment itself may be": 1}
    assert [t.id for t in read_trajectories(store, "support")] == ["b"]
    assert kept_aside(store)[0].raw == json.dumps(episode("a", model=word)).encode()


def test_lines_set_aside_are_counted_for_the_agent_that_they_were_meant_for(recorder, store, tmp_path):
    file = tmp_path / "log.jsonl"
    file.write_text("{\n" + json.dumps(episode("a")) + "\n")
    for agent in ("support", "sales", "sales"):
        import_file(recorder, file, agent, producer=None, clock=lambda: 1.0)
    with store.read() as connection:
        assert [num_set_aside(connection, agent) for agent in ("support", "sales", "sale")] == [1, 2, 0]


def test_a_line_without_id_is_imported_once(recorder, store, tmp_path):
    file = tmp_path / "log.jsonl"
    line = json.dumps({key: value for key, value in episode().items() if key != "id"})
    file.write_text(f"{line}\n{line}\n")
    report = take(recorder, store, file)
    assert (report.num_imported, report.num_duplicates) == (1, 1)


def test_rehearsal_makes_every_answer_a_target_and_names_a_bad_line(tmp_path):
    file = tmp_path / "rehearsal.jsonl"
    file.write_text(json.dumps(episode()) + "\n")
    (example,) = read_rehearsal(file)
    assert (example.kind, example.targets, example.stratum) == ("rehearsal", (1, 3), "repair/good")
    file.write_text(json.dumps(episode()) + "\n{}\n")
    with pytest.raises(DataError, match=r"rehearsal\.jsonl line 2: has no `messages`"):
        read_rehearsal(file)
