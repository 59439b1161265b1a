from __future__ import annotations

import json
from itertools import chain

import pytest
import torch

from cltrain.config import load
from cltrain.demo import classes
from cltrain.errors import DataError
from cltrain.models.base import load_base
from cltrain.models.chat import render_prompt
from cltrain.records import TokenRow
from scripts.bench_classification import DEMO, Exam, figures, row_of, run_seed


def test_figures_of_a_matrix_worked_out_by_hand() -> None:
    scores = [[0.8, 0.3, 0.1], [0.5, 0.9, 0.4], [0.4, 0.7, 0.6]]
    found = figures(scores, [0.2, 0.25, 0.1])
    assert found["acc"] == pytest.approx((0.4 + 0.7 + 0.6) / 3)
    assert found["bwt"] == pytest.approx(((0.4 - 0.8) + (0.7 - 0.9)) / 2)
    assert found["fwt"] == pytest.approx(((0.3 - 0.25) + (0.4 - 0.1)) / 2)
    assert found["learned"] == pytest.approx((0.8 + 0.9 + 0.6) / 3)
    assert found["worst"] == 0.4


def test_no_word_pair_is_in_training_and_in_the_test_of_a_task_on_any_seed() -> None:
    streams = [classes.generated(seed, noise=0.1) for seed in (950, 951, 952)]
    for tasks in zip(*streams, strict=True):
        train = {frozenset(text.pair) for text in chain(*(task.train for task in tasks))}
        test = {frozenset(text.pair) for text in chain(*(task.test for task in tasks))}
        assert train
        assert test
        assert not train & test


def test_a_tenth_of_the_training_labels_is_wrong_and_no_test_label() -> None:
    for task in classes.generated(950, noise=0.1):
        assert sum(text.claimed != text.answer for text in task.train) == round(0.1 * len(task.train))
        assert all(text.claimed == text.answer for text in task.test)
        assert all(text.claimed in text.choices for text in (*task.train, *task.test))
        assert len({text.answer for text in task.test}) > 1


def test_the_same_seed_gives_the_same_texts() -> None:
    assert classes.generated(3, noise=0.1) == classes.generated(3, noise=0.1)
    assert classes.generated(3, noise=0.1) != classes.generated(4, noise=0.1)


def test_exact_match_is_what_greedy_decoding_writes() -> None:
    base = load_base(None)
    item = classes.generated(950, noise=0)[0].test[0]
    prompt = render_prompt(base.tokenizer, [{"role": "user", "content": item.prompt}])
    out = base.model.generate(input_ids=torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0].tolist()
    weights = [0.0] * len(prompt) + [1.0] * (len(out) - len(prompt))
    written = TokenRow("written", "s", "p", tuple(out), tuple(weights))
    other = row_of(base, item, "lamp", "s")
    assert Exam([written, other], [0, 0], [True, False]).score(base, None) == (1.0, 1.0)
    assert Exam([written, other], [0, 0], [False, True]).score(base, None) == (0.0, 0.0)


def test_files_of_the_benchmark_are_cut_and_a_test_text_seen_in_training_is_left_out(tmp_path) -> None:
    base = load_base(None)
    folder = tmp_path / "sst"
    folder.mkdir()
    (folder / "labels.json").write_text(json.dumps(["Good", "Bad"]))
    long = {"input": "nice " * 500, "output": "Good"}
    for name, instances in (("train", [long]), ("test", [long, {"input": "dull", "output": "Bad"}])):
        (folder / f"{name}.json").write_text(json.dumps({"Instances": instances}))
    (task,) = classes.from_files(tmp_path, base.tokenizer, 0, noise=0.0, num_tokens=20)
    assert [text.prompt for text in task.test] == ["sst : dull"]
    assert len(row_of(base, task.train[0], "Good", "s").ids) < 60
    (folder / "test.json").write_text("[]")
    with pytest.raises(DataError, match="no task of labels"):
        classes.from_files(tmp_path, base.tokenizer, 0, noise=0.0, num_tokens=20)


@pytest.mark.slow
def test_the_default_knows_more_than_naive_at_the_end_of_a_short_stream() -> None:
    tasks = [task for task in classes.generated(950, noise=0.1) if task.name in {"mood", "person", "asked"}]
    config = load([DEMO], ["trainer.num_anchors=32"])
    naive, ours = run_seed(load_base(None), config, tasks, ("naive", "bounded_replay"), 950)
    assert ours["acc"] > naive["acc"] + 0.2
