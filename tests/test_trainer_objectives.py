"""The fresh rows' objectives in whole updates: each moves the right probability the right way, each coefficient
multiplies its own term, and neither micro-batches nor the order of rows changes anything."""

import dataclasses
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cltrain.config import ObjectivesConfig
from cltrain.errors import DataError
from cltrain.models import forward
from cltrain.models.adapter import attach, new_factors, parameters_of
from cltrain.models.anchors import mean_kl
from cltrain.models.scoring import token_log_probs
from cltrain.records import TokenRow
from cltrain.trainer import reference
from cltrain.trainer.draws import Draws
from cltrain.trainer.streams import Streams
from cltrain.trainer.terms import Batching, Fresh
from cltrain.trainer.update import UpdateDiscarded
from tests.trainer_parts import LOOSE, Tiny, make_tiny, skill_rows

OBJECTIVES = ("sft", "dpo", "kto", "policy", "hindsight")
NAIVE = {"method": "naive", "kl_beta": 0.0}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("objectives"))


def rows_of(tiny, objective, count=5, *, values=None) -> list[TokenRow]:
    """Rows of skill 1 as the objective wants them: the pair's loser answers as skill 2, the hint names the answer."""
    rows = []
    for i, row in enumerate(skill_rows(1, count)):
        changes = {"objective": objective}
        if objective == "dpo":
            changes["partner"] = skill_rows(1, count, answer=2)[i]
        if objective == "hindsight":
            changes["partner"] = dataclasses.replace(row, ids=(200, 201, *row.ids), weights=(0.0, 0.0, *row.weights))
        if objective in ("kto", "policy"):
            changes["value"] = values[i] if values else (1.0, -1.0)[i % 2]
        if objective == "policy":
            changes["behaviour"] = tuple(token_log_probs(tiny.base, None, [row])[0])
        rows.append(dataclasses.replace(row, **changes))
    return rows


def measure(tiny, name, fresh, replay=(), after=None, **trainer):
    """What every step of an update measured, and the update."""
    seen = []
    made = tiny.update(
        name, fresh, replay, after, trainer=NAIVE | trainer, on_step=lambda step, measured: seen.append(measured)
    )
    return seen, made


def answer_log_prob(tiny, adapter, rows) -> float:
    return sum(sum(row) for row in token_log_probs(tiny.base, adapter, rows)) / len(rows)


@pytest.mark.parametrize("kernels", ["auto", "off"])
def test_rows_without_a_gradient_move_nothing_beside_terms_that_hold_back(tiny, kernels):
    """Every answer as good as the baseline: what is left is the rounding of the KL, of which Adam would make steps."""
    fresh = rows_of(tiny, "policy", 4, values=[0.0] * 4)
    seen, made = measure(tiny, f"idle-{kernels}", fresh, method="kl", kl_beta=1.0, kernels=kernels, num_steps=4)
    assert all(step["grad_norm_fresh"] == 0 for step in seen)
    assert made.candidate.bounds.step_frobenius == 0
    assert not any(b.any() for _, b in made.adapter.factors.values())


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("value", [1.0, -1.0])
def test_one_row_alone_gives_a_finite_gradient(tiny, objective, value):
    fresh = rows_of(tiny, objective, 1, values=[value])
    seen, made = measure(tiny, f"one-{objective}-{value}", fresh, num_steps=2)
    assert all(0 < step["grad_norm_fresh"] < math.inf for step in seen)
    assert made.candidate.bounds.step_frobenius > 0


def test_an_advantage_of_zero_moves_nothing(tiny):
    seen, made = measure(tiny, "zero", rows_of(tiny, "policy", 1, values=[0.0]), num_steps=2)
    assert [step["grad_norm_fresh"] for step in seen] == [0.0, 0.0]
    assert made.candidate.bounds.step_frobenius == 0.0


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("kind", ["first", "second"])
def test_doubling_an_objectives_coefficient_doubles_its_gradient_and_not_its_measured_loss(tiny, objective, kind):
    """cispo and forward KL with their defaults, then ppo and jsd."""
    kinds = {"policy_kind": ("cispo", "ppo")[kind == "second"], "hindsight_kind": ("forward", "jsd")[kind == "second"]}
    first = []
    for size in (0.7, 1.4):
        settings = ObjectivesConfig(**{objective: size}, **kinds)
        seen, _ = measure(
            tiny, f"double-{objective}-{kind}-{size}", rows_of(tiny, objective), objectives=settings, num_steps=1
        )
        first.append(seen[0])
    one, two = first
    assert two["grad_norm_fresh"] == pytest.approx(2 * one["grad_norm_fresh"], rel=1e-5)
    name = "nll_fresh" if objective == "sft" else f"loss_{objective}"
    assert two[name] == pytest.approx(one[name], rel=1e-6)


def test_a_coefficient_multiplies_its_own_objective_only(tiny):
    """With g = g_sft + c g_dpo measured at c = 1, 2, 3, the squared norms lie on one parabola in c."""
    fresh = [*rows_of(tiny, "sft", 3), *rows_of(tiny, "dpo", 3)]
    squares = []
    for size in (1.0, 2.0, 3.0):
        settings = ObjectivesConfig(dpo=size)
        seen, _ = measure(tiny, f"own-{size}", fresh, objectives=settings, num_steps=1, batch_size=6)
        squares.append(seen[0]["grad_norm_fresh"] ** 2)
    alone, _ = measure(tiny, "own-alone", [r for r in fresh if r.objective == "dpo"], num_steps=1, batch_size=6)
    of_dpo = (alone[0]["grad_norm_fresh"] / 2) ** 2  # there each row fills two slots
    assert (squares[2] - 2 * squares[1] + squares[0]) / 2 == pytest.approx(of_dpo, rel=1e-3)


def test_each_stream_is_the_mean_of_its_rows_times_their_share_of_the_step_and_its_coefficient(tiny):
    """So that a row weighs the same whatever it is learned by, and a principal's share of rows is its part of the
    loss."""
    one, three = rows_of(tiny, "sft", 1), rows_of(tiny, "dpo", 3)

    def gradient(rows, config):
        adapter = new_factors(tiny.base, 4, 8.0, ("q_proj", "up_proj"), seed=1)
        model = attach(tiny.base, adapter)
        streams = Streams(tiny.base, model, tiny.base.model, rows, config)
        Fresh(Draws(7, rows, [], 1), streams, Batching(len(rows), None, 0.0)).add(0)
        return torch.cat([b_NR.grad.flatten() for _, b_NR in parameters_of(model, adapter).values()])

    together = gradient([*one, *three], ObjectivesConfig(dpo=2.0))
    apart = [gradient(rows, ObjectivesConfig()) for rows in (one, three)]
    torch.testing.assert_close(together, 0.25 * apart[0] + 0.75 * 2.0 * apart[1], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("method", "knob"), [("kl", "kl_beta"), ("l2sp", "l2sp_lambda"), ("ewc", "ewc_lambda"), ("distill", "distill_beta")]
)
def test_doubling_a_penaltys_coefficient_doubles_its_gradient(tiny, method, knob):
    """At the first step after an update; a penalty on the step itself is zero there, so there at the second."""
    before = tiny.update(f"before-{knob}", skill_rows(0, 4), trainer={"method": method})
    seen = {}
    for size in (1e-6, 2e-6):  # small, so that the first step is the same to rounding
        settings = {"method": method, knob: size, "warmup_steps": 0}
        seen[size], _ = measure(tiny, f"{knob}-{size}", skill_rows(1, 4), (), before, num_steps=2, **settings)
    one, two = seen[1e-6][1], seen[2e-6][1]
    assert one[f"grad_norm_{method}"] > 0
    assert two[f"grad_norm_{method}"] == pytest.approx(2 * one[f"grad_norm_{method}"], rel=1e-3)
    assert two[method] == pytest.approx(one[method], rel=1e-3)
    assert two["grad_norm_fresh"] == pytest.approx(one["grad_norm_fresh"], rel=1e-3)


def test_dpo_raises_the_chosen_over_the_rejected_answer(tiny):
    fresh = rows_of(tiny, "dpo")
    _, made = measure(tiny, "dpo", fresh)

    def margin(adapter):
        rejected = [row.partner for row in fresh]
        return answer_log_prob(tiny, adapter, fresh) - answer_log_prob(tiny, adapter, rejected)

    assert margin(made.adapter) > margin(None) + 1


@pytest.mark.parametrize("objective", ["kto", "policy"])
def test_a_good_mark_raises_an_answer_and_a_bad_one_lowers_it(tiny, objective):
    before = answer_log_prob(tiny, None, skill_rows(1, 5))
    for value in (1.0, -1.0):
        _, made = measure(tiny, f"{objective}-{value}", rows_of(tiny, objective, values=[value] * 5))
        assert (answer_log_prob(tiny, made.adapter, skill_rows(1, 5)) - before) * value > 0.5


@pytest.mark.parametrize("objective", ["kto", "policy"])
def test_in_one_window_good_answers_rise_and_bad_ones_fall(tiny, objective):
    good = rows_of(tiny, objective, 3, values=[1.0] * 3)
    bad = [
        dataclasses.replace(
            row, objective=objective, value=-1.0, behaviour=tuple(token_log_probs(tiny.base, None, [row])[0])
        )
        for row in skill_rows(3, 3)
    ]
    _, made = measure(tiny, f"mixed-{objective}", [*good, *bad], batch_size=6)
    assert answer_log_prob(tiny, made.adapter, good) > answer_log_prob(tiny, None, good)
    assert answer_log_prob(tiny, made.adapter, bad) < answer_log_prob(tiny, None, bad)


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
def test_hindsight_moves_towards_the_self_that_saw_the_hint(tiny, kind):
    """The teacher is the incumbent behind the hint; its distance to the student, measured apart from the trainer."""
    fresh = rows_of(tiny, "hindsight")
    hinted = [row.partner for row in fresh]
    seen, made = measure(tiny, f"hint-{kind}", fresh, objectives=ObjectivesConfig(hindsight_kind=kind))
    assert seen[-1]["loss_hindsight"] < 0.8 * seen[0]["loss_hindsight"]
    own, taught = token_log_probs(tiny.base, None, fresh), token_log_probs(tiny.base, None, hinted)
    now = token_log_probs(tiny.base, made.adapter, fresh)
    gaps = [
        sum(abs(a - b) for row, wanted in zip(rows, taught, strict=True) for a, b in zip(row, wanted, strict=True))
        for rows in (own, now)
    ]
    assert gaps[1] < 0.9 * gaps[0]


def test_a_window_of_all_objectives_trains_with_replay_and_kl(tiny):
    fresh = [row for objective in OBJECTIVES for row in rows_of(tiny, objective, 2)]
    seen = []
    made = tiny.update(
        "all", fresh, skill_rows(0, 4), trainer={"batch_size": 20}, on_step=lambda step, measured: seen.append(measured)
    )
    losses = {"nll_fresh", "loss_dpo", "loss_kto", "loss_policy", "loss_hindsight", "nll_replay", "kl"}
    assert all(losses <= step.keys() for step in seen)
    assert seen[-1]["grad_norm"] > 0
    for name in ("nll_fresh", "loss_dpo", "nll_replay"):
        assert seen[-1][name] < seen[0][name]
    assert made.candidate.bounds.holds


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_micro_batches_change_nothing_but_rounding(tiny, objective):
    fresh = rows_of(tiny, objective, 6)
    runs = [
        measure(tiny, f"micro-{objective}-{size}", fresh, batch_size=6, micro_batch=size, num_steps=3)
        for size in (None, 1, 4)
    ]
    for seen, made in runs[1:]:
        for step, whole in zip(seen, runs[0][0], strict=True):
            assert step == pytest.approx(whole, rel=2e-3, abs=1e-5)
        assert mean_kl(tiny.base, fresh, runs[0][1].adapter, made.adapter) < 1e-5


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_order_of_rows_changes_no_byte(tiny, objective):
    fresh, replay = rows_of(tiny, objective), skill_rows(0, 5)
    one = tiny.update(f"order-{objective}-1", fresh, replay, trainer={"num_steps": 3})
    other = tiny.update(f"order-{objective}-2", fresh[2:] + fresh[:2], replay[::-1], trainer={"num_steps": 3})
    assert other.content == one.content


def test_replay_never_says_again_what_was_marked_bad_or_needed_a_hint(tiny):
    replay = [row for objective in OBJECTIVES for row in rows_of(tiny, objective, 2)]
    replay = [dataclasses.replace(row, record=f"{row.objective}-{row.value:+g}-{row.record}") for row in replay]
    made = tiny.update("again", skill_rows(0, 4), replay, trainer={"num_steps": 8})
    said = {read.record.rsplit("-s1", 1)[0] for read in made.candidate.reads if not read.record.startswith("s0")}
    assert said == {"sft-+1", "dpo-+1", "kto-+1"}, "what only a score speaks for was never verified"


def test_a_row_without_what_its_objective_needs_is_refused_by_name(tiny):
    row = skill_rows(1, 1)[0]
    for objective, words in (("dpo", "partner"), ("hindsight", "partner"), ("policy", "log-prob")):
        with pytest.raises(DataError, match=f"s1-0 is learned by {objective}.*{words}"):
            tiny.update("refused", [dataclasses.replace(row, objective=objective)])
    silent = dataclasses.replace(row, weights=(0.0,) * len(row.ids))
    with pytest.raises(DataError, match="partner with an answer"):
        tiny.update("refused", [dataclasses.replace(row, objective="dpo", partner=silent)])
    longer = dataclasses.replace(row, ids=(*row.ids, 5), weights=(*row.weights, 1.0))
    with pytest.raises(DataError, match="same number of targets"):
        tiny.update("refused", [dataclasses.replace(row, objective="hindsight", partner=longer)])


def weighing(row, weight):
    """The row and its partner with every weight times `weight`."""
    partner = weighing(row.partner, weight) if row.partner else None
    return dataclasses.replace(row, weights=tuple(w * weight for w in row.weights), partner=partner)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_row_of_half_the_weight_counts_half_whatever_its_objective(tiny, objective):
    fresh = rows_of(tiny, objective, 3)
    whole, half = (
        measure(tiny, f"weight-{objective}-{w}", [weighing(row, w) for row in fresh], num_steps=1, batch_size=3)[0][0]
        for w in (1.0, 0.5)
    )
    name = "nll_fresh" if objective == "sft" else f"loss_{objective}"
    assert half[name] == pytest.approx(whole[name] / 2, rel=1e-5)
    assert half["grad_norm_fresh"] == pytest.approx(whole["grad_norm_fresh"] / 2, rel=1e-4)


class Widest(TorchDispatchMode):
    """The most rows of any tensor of one number per id of the vocabulary, also of those made for the gradient."""

    def __init__(self, num_vocabulary):
        super().__init__()
        self.num_vocabulary, self.num_rows = num_vocabulary, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.shape[-1:] == (self.num_vocabulary,) and made.is_contiguous():
            self.num_rows = max(self.num_rows, made.shape.numel() // self.num_vocabulary)
        return made


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_no_objective_holds_more_logits_at_once_than_it_may(tiny, objective, monkeypatch):
    """Five rows of four targets: whole, and two tokens at a time."""
    fresh = rows_of(tiny, objective)
    num_vocabulary = tiny.base.model.config.vocab_size
    found = []
    for limit in (forward.MAX_LOGITS, 2 * num_vocabulary):
        monkeypatch.setattr(forward, "MAX_LOGITS", limit)
        adapter = new_factors(tiny.base, 4, 8.0, ("q_proj", "up_proj"), seed=1)
        model = attach(tiny.base, adapter)
        parameters = [factor for pair in parameters_of(model, adapter).values() for factor in pair]
        with Widest(num_vocabulary) as widest:
            streams = Streams(tiny.base, model, tiny.base.model, fresh, ObjectivesConfig())
            with torch.no_grad():
                for factor in parameters:
                    factor += 0.02
            z = streams.reference_point(range(5) if objective == "kto" else (), 5)
            loss = streams.loss(objective, range(5), [0.2] * 5, z)
            loss.backward()
        found.append((widest.num_rows, float(loss.detach()), [factor.grad for factor in parameters]))
    (num_whole, whole, gradients), (num_pieces, pieces, others) = found
    assert num_whole >= 20
    assert 1 <= num_pieces <= 2
    assert pieces == pytest.approx(whole, rel=1e-5)
    for one, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5 * float(one.abs().max()))


def test_hinted_selves_that_do_not_fit_in_memory_are_asked_again_and_say_the_same(tiny, monkeypatch):
    before, fresh = tiny.update("kept-before", skill_rows(0, 4)), rows_of(tiny, "hindsight")
    seen, kept = measure(tiny, "kept", fresh, (), before)
    monkeypatch.setattr(reference, "MAX_KEPT", 0)
    again, asked = measure(tiny, "asked", fresh, (), before)
    assert Streams(tiny.base, tiny.base.model, tiny.base.model, fresh, ObjectivesConfig())._hinted._kept is None
    assert [step["loss_hindsight"] for step in again] == pytest.approx([s["loss_hindsight"] for s in seen], rel=1e-3)
    assert mean_kl(tiny.base, fresh, kept.adapter, asked.adapter) < 1e-6


def test_a_rejected_answer_counts_as_tokens_and_a_hinted_self_does_not(tiny):
    """Four slots a step; every answer has four tokens."""
    for objective, per_step in (("dpo", 32), ("hindsight", 16), ("kto", 16)):
        fresh = rows_of(tiny, objective)
        bounds = LOOSE.model_copy(update={"max_tokens": 2 * per_step + 1})
        made = tiny.update(f"count-{objective}", fresh, trainer=NAIVE, bounds=bounds)
        assert (made.candidate.num_steps, made.candidate.bounds.num_tokens) == (2, 2 * per_step)
    with pytest.raises(UpdateDiscarded, match="max_tokens = 31"):
        tiny.update("count", rows_of(tiny, "dpo"), bounds=LOOSE.model_copy(update={"max_tokens": 31}))
