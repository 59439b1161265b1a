"""The batching engine against transformers and PEFT, one sequence at a time."""

import random
import threading
from contextlib import closing

import pytest
import torch

from cltrain.deploy.engine import Engine
from cltrain.deploy.sampling import Sampling
from cltrain.errors import DataError, ServerError
from cltrain.models.adapter import attach, read_adapter
from cltrain.models.base import load_base
from cltrain.models.shapes import FAMILIES
from tests.serving import Waiting, random_adapter
from tests.tiny import make_tiny_base


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return load_base(make_tiny_base(tmp_path_factory.mktemp("base")))


@pytest.fixture
def engine(base):
    with closing(Engine(base, max_batch=8)) as engine:
        yield engine


def prompts(count, longest=40):
    draw = random.Random(7)
    return [draw.choices(range(448), k=draw.randint(2, longest)) for _ in range(count)]


def reference(model, ids, num_tokens):
    """Greedy ids and their log-probs, and those of the prompt, by plain full forwards."""
    ids, chosen = list(ids), []
    with torch.no_grad():
        for _ in range(num_tokens):
            logprobs = torch.log_softmax(model(torch.tensor([ids])).logits[0], -1)
            token = int(logprobs[-1].argmax())
            chosen.append(float(logprobs[-1, token]))
            ids.append(token)
    return ids[-num_tokens:], chosen


@pytest.mark.parametrize("family", FAMILIES)
def test_ragged_batch_answers_like_each_row_alone(family, tmp_path):
    base = load_base(make_tiny_base(tmp_path, family))
    with closing(Engine(base, max_batch=4, prefill_tokens=48)) as engine:  # rows wait, long prompts go in by chunks
        greedy = Sampling(8, ignore_eos=True)
        rows = [(ids, Waiting(engine, "base", ids, greedy)) for ids in prompts(7, longest=90)]
        for ids, row in rows:
            tokens, logprobs = reference(base.model, ids, 8)
            assert row.ids() == tokens
            assert [token.logprob for token in row.result().tokens] == pytest.approx(logprobs, abs=1e-3)


def test_sliding_window_is_respected(tmp_path):
    directory = make_tiny_base(tmp_path, "mistral")
    config = directory / "config.json"
    config.write_text(config.read_text().replace('"sliding_window": null', '"sliding_window": 8'))
    base = load_base(directory)
    assert base.model.config.sliding_window == 8
    with closing(Engine(base)) as engine:
        ids = prompts(1)[0] * 3
        assert Waiting(engine, "base", ids, Sampling(8, ignore_eos=True)).ids() == reference(base.model, ids, 8)[0]


def test_every_row_of_a_mixed_batch_uses_its_own_adapter(base, engine, tmp_path):
    solo = {"base": base.model}
    for seed, (rank, targets) in enumerate(
        [(4, ("q_proj", "v_proj")), (8, ("o_proj", "down_proj")), (2, ("up_proj",))]
    ):
        path = random_adapter(base, tmp_path / str(seed), seed, rank, targets)
        engine.adapters.load(f"a{seed}", path)
        solo[f"a{seed}"] = attach(base, read_adapter(path))
    ids = prompts(1)[0]
    expected = {name: reference(model, ids, 10) for name, model in solo.items()}
    assert len({tuple(tokens) for tokens, _ in expected.values()}) == 4, (
        "the adapters must differ for this to mean much"
    )
    names = [*solo, *solo]
    rows = [Waiting(engine, name, ids, Sampling(10, ignore_eos=True)) for name in names]
    for name, row in zip(names, rows, strict=True):
        assert row.ids() == expected[name][0]
        assert [token.logprob for token in row.result().tokens] == pytest.approx(expected[name][1], abs=1e-3)


def test_prompt_scores_are_the_models_own(base, engine):
    for ids in prompts(3):
        with torch.no_grad():
            logprobs = torch.log_softmax(base.model(torch.tensor([ids])).logits[0], -1)
        scores = Waiting(engine, "base", ids, Sampling(1, num_prompt_top=2)).result().prompt
        assert scores[0] is None
        assert len(scores) == len(ids)
        for t, score in enumerate(scores[1:]):
            assert score.id == ids[t + 1]
            assert score.logprob == pytest.approx(float(logprobs[t, ids[t + 1]]), abs=1e-3)
            assert score.rank == 1 + int((logprobs[t] > logprobs[t, ids[t + 1]]).sum())
            assert score.top[0][1] == pytest.approx(float(logprobs[t].max()), abs=1e-3)


def test_short_request_overtakes_a_long_one(base):
    with closing(Engine(base, prefill_tokens=4)) as engine:  # 125 chunks
        long = Waiting(engine, "base", [5] * 500, Sampling(1))
        short = Waiting(engine, "base", [5, 6], Sampling(3, ignore_eos=True))
        short.result()
        assert not long.done.is_set()
        long.result()


def test_seed_repeats_a_sample_whoever_else_is_there(engine):
    warm = Sampling(20, temperature=1.0, seed=3, ignore_eos=True)
    alone = Waiting(engine, "base", [9, 8, 7], warm).ids()
    others = [Waiting(engine, "base", ids, Sampling(25, 1.0, seed=None, ignore_eos=True)) for ids in prompts(5)]
    assert Waiting(engine, "base", [9, 8, 7], warm).ids() == alone
    assert Waiting(engine, "base", [9, 8, 7], Sampling(20, 1.0, seed=4, ignore_eos=True)).ids() != alone
    for other in others:
        other.result()


def test_samples_follow_the_temperature_distribution(base, engine):
    with torch.no_grad():
        logits = base.model(torch.tensor([[1, 2, 3]])).logits[0, -1].double()
    expected = torch.softmax(logits / 0.7, -1)
    count = 1500
    rows = [Waiting(engine, "base", [1, 2, 3], Sampling(1, 0.7, seed=seed, ignore_eos=True)) for seed in range(count)]
    seen = torch.bincount(torch.tensor([row.ids()[0] for row in rows]), minlength=448).double()
    top = expected.topk(10).indices
    spread = (count * expected[top] * (1 - expected[top])).sqrt()
    assert bool(((seen[top] - count * expected[top]).abs() < 4.5 * spread).all())


def test_top_k_and_top_p_keep_only_the_likeliest(base, engine):
    with torch.no_grad():
        order = base.model(torch.tensor([[1, 2, 3]])).logits[0, -1].sort(descending=True)
    ranks = {int(token): place for place, token in enumerate(order.indices)}
    probs = torch.softmax(order.values.double(), -1)
    nucleus = int((probs.cumsum(0) < 0.2).sum()) + 1
    for limits, allowed in (({"top_k": 3}, 3), ({"top_p": 0.2}, nucleus)):
        rows = [Waiting(engine, "base", [1, 2, 3], Sampling(1, 1.0, seed=s, **limits)) for s in range(100)]
        places = {ranks[row.ids()[0]] for row in rows}
        assert max(places) < allowed
        assert len(places) > 1


def test_cancelled_row_frees_its_place(base):
    with closing(Engine(base, max_batch=1)) as engine:
        first = Waiting(engine, "base", [1, 2], Sampling(400, ignore_eos=True), is_streamed=True)
        second = Waiting(engine, "base", [3, 4], Sampling(2, ignore_eos=True))
        engine.cancel(first.row)
        assert len(second.ids()) == 2
        assert not first.done.is_set()


def test_a_broken_row_leaves_the_others_alone(base, engine, tmp_path):
    engine.adapters.load("good", random_adapter(base, tmp_path / "a", 1))
    expected = Waiting(engine, "good", [4, 5, 6], Sampling(6, ignore_eos=True)).ids()
    engine.adapters.load("broken", random_adapter(base, tmp_path / "b", 2))
    for a_KR, _ in engine.adapters.resolve("broken").factors.values():
        a_KR.fill_(float("nan"))  # no file can bring this in; a kernel can
    rows = [Waiting(engine, name, [4, 5, 6], Sampling(6, ignore_eos=True)) for name in ("good", "broken") * 4]
    for name, row in zip(("good", "broken") * 4, rows, strict=True):
        assert (row.result().error is not None) == (name == "broken")
    for row in [Waiting(engine, "broken", [4] * 40, Sampling(6)) for _ in range(8)]:
        assert "not a number" in row.result().error
    long = [Waiting(engine, "good", [4] * 30, Sampling(20, ignore_eos=True)) for _ in range(4)]
    short = [Waiting(engine, "good", [4, 5, 6], Sampling(6, ignore_eos=True)) for _ in range(4)]
    assert all(row.ids() == expected for row in [*rows[::2], *short])
    assert all(row.result().error is None for row in long)


def test_unloaded_adapter_finishes_what_it_began(base, engine, tmp_path):
    engine.adapters.load("old", random_adapter(base, tmp_path / "a", 1))
    expected = Waiting(engine, "old", [4, 5, 6], Sampling(60, ignore_eos=True)).ids()
    has_begun = threading.Event()
    row = Waiting(engine, "old", [4, 5, 6], Sampling(60, ignore_eos=True), is_streamed=True)
    while not row.deltas:
        has_begun.wait(0.001)
    engine.adapters.unload("old")
    engine.adapters.load("old-2", random_adapter(base, tmp_path / "b", 2))
    assert not row.done.is_set()
    assert row.ids() == expected
    with pytest.raises(KeyError):
        engine.adapters.resolve("old")


def test_what_cannot_fit_is_refused_with_both_numbers(base, engine):
    with pytest.raises(DataError, match=r"512 tokens.*513 tokens"):
        Waiting(engine, "base", [1] * 500, Sampling(13))
    with pytest.raises(DataError, match="vocabulary of 448"):
        Waiting(engine, "base", [448], Sampling(1))
    with pytest.raises(DataError, match="empty"):
        Waiting(engine, "base", [], Sampling(1))
    Waiting(engine, "base", [1] * 500, Sampling(12, ignore_eos=True)).result()  # exactly full


def test_closing_tells_those_who_wait(base):
    engine = Engine(base, max_batch=1)
    rows = [Waiting(engine, "base", [1, 2], Sampling(500, ignore_eos=True)) for _ in range(3)]
    engine.close()
    assert [row.result().error for row in rows] == ["the server is shutting down"] * 3
    with pytest.raises(ServerError):
        Waiting(engine, "base", [1], Sampling(1))
