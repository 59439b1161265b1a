"""Collapse is seen and named before anything serves: certainty, endings, gradients; and what healthy looks like."""

import dataclasses

import numpy as np
import pytest

from cltrain.config import HealthConfig
from cltrain.models.adapter import attach
from cltrain.models.base import stop_ids
from cltrain.models.forward import next_log_probs, predicted
from cltrain.trainer.health import collapse
from cltrain.trainer.update import UpdateDiscarded
from tests.trainer_parts import Tiny, dense, make_tiny, skill_rows

FREE = {"remember": (), "lr": 0.05, "num_steps": 20}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("health"))


def on_anchors(tiny, adapter) -> tuple[float, float]:
    """Mean entropy in nats, and mean chance to end where the anchor goes on; in float64 by numpy."""
    model = tiny.base.model if adapter is None else attach(tiny.base, adapter)
    entropies, endings, stops = [], [], sorted(stop_ids(tiny.base))
    for row in tiny.anchors:
        logp_MV = next_log_probs(tiny.base, model, [row]).double().numpy()
        entropies += list(-(np.exp(logp_MV) * logp_MV).sum(-1))
        open_M = [row.ids[t] not in stops for t in predicted(row)]
        endings += list(np.exp(logp_MV[open_M][:, stops]).sum(-1))
    return float(np.mean(entropies)), float(np.mean(endings))


def always(token, count=6):
    """Rows that say this token after every other."""
    rows = skill_rows(0, count)
    pairs = [[one for ordinary in row.ids[:8] for one in (ordinary, token)] for row in rows]
    return [
        dataclasses.replace(row, ids=tuple(ids), weights=(0.0, 1.0) * 8) for row, ids in zip(rows, pairs, strict=True)
    ]


def files_left(tiny, name):
    return [path for path in (tiny.directory / name).rglob("*") if path.is_file()]


def test_a_healthy_update_passes_with_its_vital_signs_in_the_metrics(tiny):
    made = tiny.update("healthy", skill_rows(0, 6), skill_rows(1, 4))
    metrics = made.candidate.metrics
    (entropy, ending), (base_entropy, base_ending) = on_anchors(tiny, made.adapter), on_anchors(tiny, None)
    assert metrics["entropy"] == pytest.approx(entropy, rel=1e-4)
    assert metrics["entropy_share"] == pytest.approx(entropy / base_entropy, rel=1e-4)
    assert metrics["ending_ratio"] == pytest.approx((ending + 1e-3) / (base_ending + 1e-3), rel=1e-4)
    ranks = []
    for module in made.adapter.factors:
        shape = tuple(tiny.base.model.get_submodule(module).weight.shape)
        sigmas = np.linalg.svd(dense(made.adapter, module, shape), compute_uv=False)[:4]
        shares = sigmas / sigmas.sum()
        ranks.append(np.exp(-(shares * np.log(shares)).sum()))
    assert metrics["effective_rank"] == pytest.approx(np.mean(ranks), rel=1e-4)
    assert metrics["plasticity"] == pytest.approx(1 - metrics["nll_fresh_last"] / metrics["nll_fresh_first"])
    assert metrics["plasticity"] > 0.05


def test_the_effective_rank_is_compared_with_the_incumbents(tiny):
    first = tiny.update("rank-1", skill_rows(0, 6), trainer={"lr": 0.05})
    assert "rank_share" not in first.candidate.metrics
    then = tiny.update("rank-2", skill_rows(1, 6), (), first, trainer={"lr": 0.05}).candidate.metrics
    assert then["rank_share"] == pytest.approx(then["effective_rank"] / first.candidate.metrics["effective_rank"])


@pytest.mark.parametrize(
    ("signs", "said"),
    [
        ({}, None),
        ({"entropy_share": 0.49}, "0.49 of the base's, below health.min_entropy_share = 0.5"),
        ({"entropy_share": 2.01}, "2.01 of the base's, above health.max_entropy_share = 2.0"),
        ({"rank_share": 0.49}, "0.49 of the incumbent's, below health.min_rank_share = 0.5"),
        ({"ending_ratio": 4.1}, "health.max_ending_ratio allows 4.0 either way"),
    ],
)
def test_each_limit_is_named_with_what_was_seen(signs, said):
    healthy = {"entropy_share": 1.0, "ending_ratio": 1.0, "effective_rank": 3.0, "rank_share": 0.9}
    reason = collapse({**healthy, **signs}, HealthConfig())
    assert reason is None if said is None else said in reason


def test_an_update_that_becomes_certain_of_everything_is_discarded(tiny):
    rows = always(300)
    free = tiny.update("certain-naive", rows, trainer={**FREE, "method": "naive"})
    assert on_anchors(tiny, free.adapter)[0] < 0.4 * on_anchors(tiny, None)[0]
    with pytest.raises(UpdateDiscarded, match=r"its entropy on the anchors is 0\.\d+ of the base's.*min_entropy_share"):
        tiny.update("certain", rows, trainer=FREE)
    assert files_left(tiny, "certain") == []


def test_an_update_that_ends_answers_too_soon_or_never_is_discarded(tiny):
    loose = HealthConfig(min_entropy_share=1e-6)
    with pytest.raises(UpdateDiscarded, match=r"ends answers \d+\.\d+ times as soon as the base.*max_ending_ratio"):
        tiny.update("soon", always(tiny.base.tokenizer.eos_token_id), trainer=FREE, health=loose)
    assert files_left(tiny, "soon") == []
    narrow = HealthConfig(min_entropy_share=1e-6, max_ending_ratio=1.05)
    with pytest.raises(UpdateDiscarded, match=r"ends answers 0\.\d+ times as soon as the base"):
        tiny.update("never", skill_rows(0, 6), trainer=FREE, health=narrow)


@pytest.mark.parametrize("method", ["bounded_replay", "naive"])
def test_an_exploding_gradient_discards_the_update_of_any_method(tiny, method):
    seen = []
    made = tiny.update("norm", skill_rows(0, 6), trainer={"method": method}, on_step=lambda _, m: seen.append(m))
    largest = max(step["grad_norm"] for step in seen)
    calm = HealthConfig(max_grad_norm=largest * 1.01)
    assert tiny.update("calm", skill_rows(0, 6), trainer={"method": method}, health=calm).content == made.content
    strict = HealthConfig(max_grad_norm=largest * 0.99)
    with pytest.raises(UpdateDiscarded, match=r"the gradient norm is .* at step \d, above health.max_grad_norm"):
        tiny.update("exploding", skill_rows(0, 6), trainer={"method": method}, health=strict)
    assert files_left(tiny, "exploding") == []
