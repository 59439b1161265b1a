from __future__ import annotations

import json
from collections import Counter

import pytest
import torch

from cltrain.config import load
from cltrain.demo import classes
from cltrain.errors import DataError
from cltrain.models.base import load_base
from cltrain.models.chat import render_prompt
from cltrain.records import TokenRow
from scripts.bench_classification import DEMO, Exam, figures, main, row_of, run_seed, verdict


def test_figures_of_a_matrix_worked_out_by_hand() -> None:
    scores = [[0.8, 0.3, 0.1], [0.5, 0.9, 0.4], [0.4, 0.7, 0.6]]
    found = figures(scores, [0.2, 0.25, 0.1])
    assert found["acc"] == pytest.approx((0.4 + 0.7 + 0.6) / 3)
    assert found["bwt"] == pytest.approx(((0.4 - 0.8) + (0.7 - 0.9)) / 2)
    assert found["fwt"] == pytest.approx(((0.3 - 0.25) + (0.4 - 0.1)) / 2)
    assert found["learned"] == pytest.approx((0.8 + 0.9 + 0.6) / 3)
    assert found["worst"] == 0.4


def test_no_word_pair_of_a_task_is_in_two_of_training_test_and_development_on_any_seed() -> None:
    streams = {seed: classes.generated(seed, noise=0.1) for seed in (0, 1, 899, 900, 951)}
    for number in range(len(classes.MAKERS)):
        pairs: dict[str, set[frozenset[str]]] = {"train": set(), "test": set(), "development": set()}
        for seed, tasks in streams.items():
            pairs["train"] |= {frozenset(text.pair) for text in tasks[number].train}
            asked = "development" if seed >= classes.FIRST_DEVELOPMENT_SEED else "test"
            pairs[asked] |= {frozenset(text.pair) for text in tasks[number].test}
        assert all(pairs.values())
        assert len(set.union(*pairs.values())) == sum(map(len, pairs.values()))


def test_every_text_of_a_task_is_there_once_and_there_are_as_many_of_each_label() -> None:
    for task in classes.generated(0, noise=0.0):
        for texts in (task.train, task.test):
            assert len({text.prompt for text in texts}) == len(texts)
            if task.name != "order":  # its answers are names
                assert len(set(Counter(text.answer for text in texts).values())) == 1
        assert len(task.test) >= 192


def test_the_first_word_of_a_text_does_not_say_who_was_first() -> None:
    (order,) = [task for task in classes.generated(0, noise=0.0) if task.name == "order"]
    is_named_first = [text.prompt.split(" : ")[1].startswith(text.answer) for text in order.test]
    assert 0.35 < sum(is_named_first) / len(is_named_first) < 0.65


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


def _row(method: str, seed: int, acc: float, bwt: float = 0.0, base_kl: float = 0.5) -> dict:
    return {"method": method, "seed": seed, "acc": acc, "bwt": bwt, "base_kl": base_kl}


def test_the_verdict_compares_on_the_seeds_that_both_have() -> None:
    rows = [_row("replay", 0, 0.5), _row("replay", 1, 0.7), _row("bounded_replay", 0, 0.6, -0.03, 0.1)]
    (against, is_above), bwt = verdict(rows)
    assert "+0.100 from replay on ACC (+0.100 by seed); base KL 0.100 against 0.500" in against
    assert is_above
    assert bwt == ("bounded_replay: BWT -0.030, beyond 0.02", False)
    assert verdict(rows[:2]) == []
    assert [holds for _, holds in verdict([rows[0], _row("bounded_replay", 0, 0.5)])] == [False, True]


def test_a_bench_that_breaks_off_keeps_the_rows_of_the_methods_that_ended(tmp_path) -> None:
    for name, labels in (("one", ["hat", "cup"]), ("two", ["fox", "sun"])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "labels.json").write_text(json.dumps(labels))
        for purpose in ("train", "test"):
            instances = [{"input": f"{purpose} {label}", "output": label} for label in labels]
            (tmp_path / name / f"{purpose}.json").write_text(json.dumps({"Instances": instances}))
    kept = tmp_path / "rows.json"
    quick = ["--set=trainer.num_anchors=2", "--set=trainer.num_steps=1"]
    with pytest.raises(KeyError):
        main(["--data", str(tmp_path), "--json", str(kept), *quick, "--methods", "naive", "no such method"])
    assert [row["method"] for row in json.loads(kept.read_text())["rows"]] == ["naive"]


@pytest.mark.slow
def test_the_default_knows_more_than_naive_at_the_end_of_a_short_stream() -> None:
    tasks = classes.generated(950, noise=0.1, num_train=96, num_test=60)[:3]
    config = load([DEMO], ["trainer.num_anchors=32"])
    naive, ours = run_seed(load_base(None), config, tasks, ("naive", "bounded_replay"), 950)
    assert ours["acc"] > naive["acc"] + 0.2
