"""Two hundred real airline episodes: all accounted for, too long for the small base, learned by one of 16k context."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from cltrain.experience.examples import example_of
from cltrain.experience.reading import read_trajectories
from cltrain.models.base import Base, load_base
from cltrain.models.chat import render_rows
from cltrain.records import Example
from cltrain.store.database import open_store
from tests.command import free_port, run_cltrain
from tests.tiny import make_tiny_base

SHARED = Path(os.environ.get("CLTRAIN_SHARED_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
TAU_BENCH = SHARED / "tau-bench" / "trajectories.jsonl"
pytestmark = pytest.mark.skipif(not TAU_BENCH.exists(), reason=f"shared data is not here ({TAU_BENCH})")

NUM_EPISODES, NUM_POSITIVE = 200, 84  # what the assignment says is in the file
CONTEXT = 16384
NUM_LEARNED = 8


@pytest.fixture(scope="module")
def episodes() -> list[dict[str, Any]]:
    return [json.loads(line) for line in TAU_BENCH.open()]


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], float]:
    """A home with the file in it, what the import reported, and its seconds."""
    home = tmp_path_factory.mktemp("real") / "home"
    start = time.monotonic()
    done = run_cltrain("import", str(TAU_BENCH), "--agent=support", f"--home={home}", "--json")
    assert done.code == 0, done
    return home, done.json, time.monotonic() - start


@pytest.fixture(scope="module")
def long_base(tmp_path_factory: pytest.TempPathFactory, episodes: list[dict[str, Any]]) -> Base:
    text = "\n".join(str(m.get("content") or "") for e in episodes[:40] for m in e["messages"])
    directory = make_tiny_base(
        tmp_path_factory.mktemp("long") / "base", "qwen2", CONTEXT, vocabulary=4000, num_vocabulary=4032, text=text
    )
    return load_base(directory)


def test_every_episode_is_taken_in_and_each_is_reported_too_long_for_the_small_base(
    imported: tuple[Path, dict[str, Any], float], episodes: list[dict[str, Any]]
) -> None:
    _, report, seconds = imported
    assert (report["num_lines"], report["num_imported"]) == (NUM_EPISODES, NUM_EPISODES)
    assert (report["num_duplicates"], report["num_set_aside"], report["num_blank"]) == (0, 0, 0)
    assert report["num_positive"] == NUM_POSITIVE == sum(e["reward"] == 1.0 for e in episodes)
    assert (report["num_fitting"], report["num_unusable"]) == (0, NUM_EPISODES)
    limit = load_base(None).context
    for episode, reason in zip(episodes, report["unusable"], strict=True):
        words = reason.split()
        assert words[:3] == ["record", episode["id"], "has"]
        assert int(words[3]) > limit
        assert f"the base takes {limit} (base.context)" in reason
    assert seconds < 60


def test_a_base_of_16k_context_takes_them_and_loss_lies_on_the_agents_words_alone(
    imported: tuple[Path, dict[str, Any], float], long_base: Base
) -> None:
    """The tokens with loss, decoded, are the assistant's texts and calls, each with its end token, and nothing else."""
    trajectories = read_trajectories(open_store(imported[0]), "support")
    num_fitting = num_learnable = 0
    for trajectory in trajectories:
        example = example_of(trajectory, learn_from=("gpt-4o",), tools_allowed=None)
        if not isinstance(example, Example):
            continue
        num_learnable += 1
        (row,) = render_rows(long_base.tokenizer, long_base.context, example)
        num_fitting += len(row.ids) <= CONTEXT
        learned = long_base.tokenizer.decode([i for i, w in zip(row.ids, row.weights, strict=True) if w])
        said = [turn for turn in learned.split("<|im_end|>") if turn]
        targets = [trajectory.messages[i] for i in example.targets]
        assert all(message["role"] == "assistant" for message in targets)
        assert len(said) == len(targets)
        for turn, message in zip(said, targets, strict=True):
            calls = [
                (c["function"]["name"], json.loads(c["function"]["arguments"])) for c in message.get("tool_calls") or ()
            ]
            text, *found = turn.split("<tool_call>")
            assert text.strip() == (message.get("content") or "").strip()
            parsed = [json.loads(part.split("</tool_call>")[0]) for part in found]
            assert [(call["name"], call["arguments"]) for call in parsed] == calls
    assert num_fitting == num_learnable > 0.8 * NUM_POSITIVE  # a tenth of the sessions is held out


@pytest.mark.slow
def test_one_update_learns_from_eight_of_them(imported: tuple[Path, dict[str, Any], float], long_base: Base) -> None:
    settings = (
        'agent.learn_from=["gpt-4o"]', f"experience.min_window={NUM_LEARNED}", f"experience.max_window={NUM_LEARNED}",
        "experience.principal_quota=1.0", "trainer.num_steps=1", f"trainer.batch_size={NUM_LEARNED}",
        "trainer.micro_batch=1", "trainer.num_anchors=2", "trainer.anchor_tokens=32", "gate.items_per_gate=4",
        "gate.margin=0.8", "gate.stratum_margin=0.8", "gate.max_answer_tokens=8", f"server.port={free_port()}",
    )  # fmt: skip
    start = time.monotonic()
    words = ("update", f"--base={long_base.path}", f"--home={imported[0]}", "--json", "--agent=support")
    done = run_cltrain(*words, *(f"--set={setting}" for setting in settings))
    seconds = time.monotonic() - start
    summary = done.json
    assert summary["verdict"] in ("promote", "hold", "reject"), done
    assert summary["num_window"] == summary["num_kept"] == NUM_LEARNED, summary
    assert summary["metrics"]["num_fresh"] == NUM_LEARNED
    assert summary["bounds"]["drift_kl"] <= 0.25
    assert seconds < 120
