"""No order of events takes an adapter past a budget: each distance is recomputed here, dense and in float64."""

import dataclasses
import time

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import select

from cltrain.api import Deployment
from cltrain.config import BoundsConfig, HealthConfig, from_dict
from cltrain.errors import ConfigError
from cltrain.models.adapter import new_factors
from cltrain.models.anchors import mean_kl
from cltrain.records import LearningMode
from cltrain.registry import releases
from cltrain.registry.displacement import DAY_S
from cltrain.store.schema import screenings
from cltrain.trainer.reference import Reference
from cltrain.trainer.shrink import Ruler, Spent, shrink_to_bounds
from cltrain.trainer.update import UpdateDiscarded
from tests.deployments import base_server, config_for, corrected, record, tickets, worker
from tests.trainer_parts import ADAPTER, LOOSE, Tiny, dense, dense_distances, make_tiny, skill_rows

TIGHT = BoundsConfig(
    step_frobenius=0.05, drift_frobenius=0.12, step_spectral=0.04, drift_spectral=0.1, step_kl=0.1, drift_kl=0.3,
    day_frobenius=0.13, min_shrink=0.01, max_steps=3,
)  # fmt: skip
WEIGHTS = ("step_frobenius", "drift_frobenius", "step_spectral", "drift_spectral")
ALMOST = 1 + 1e-9  # float64 rounding of the dense matrices; the margin for float32 is the trainer's own affair


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("budgets"))


def assert_within(tiny, made, before, bounds):
    incumbent = before.adapter if before else None
    for name, distance in dense_distances(tiny.base, made.adapter, incumbent).items():
        assert distance <= getattr(bounds, name) * ALMOST, name
        assert distance == pytest.approx(getattr(made.candidate.bounds, name), rel=1e-5, abs=1e-9), name
    assert mean_kl(tiny.base, tiny.anchors, incumbent, made.adapter) <= bounds.step_kl * (1 + 1e-5)
    assert mean_kl(tiny.base, tiny.anchors, None, made.adapter) <= bounds.drift_kl * (1 + 1e-5)


class PowerCutError(Exception):
    pass


def cut(step, measured):
    if step == 1:
        raise PowerCutError


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["promote", "promote", "reject", "interrupt", "rollback", "midnight"]),
        st.integers(0, 3),
        st.sampled_from([0.003, 0.1]),
        st.sampled_from([(), ("replay", "kl"), ("ema",), ("oplora", "l2sp")]),
        st.sampled_from([3, 4]),
        st.sampled_from([15, 40, 1000]),
    ),
    min_size=2,
    max_size=7,
)


@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(events=EVENTS)
def test_no_sequence_of_updates_rejections_interruptions_and_rollbacks_breaks_a_budget(tiny, events):
    served, today, discarded = [None], 0.0, []
    for number, (event, skill, lr, remember, rank, max_tokens) in enumerate(events):
        if event == "midnight":
            today = 0.0
            continue
        if event == "rollback":
            served = served[:-1] or [None]  # what was moved today stays spent
            continue
        name = f"event-{time.monotonic_ns()}-{number}"
        arguments = {
            "trainer": {"lr": lr, "num_steps": 3, "checkpoint_every": 1, "remember": remember},
            "bounds": TIGHT.model_copy(update={"max_tokens": max_tokens}), "spent_today": today,
            "adapter": ADAPTER.model_copy(update={"rank": rank}),
        }  # fmt: skip
        rows = skill_rows(skill, 4), skill_rows(skill + 1, 3), served[-1]
        try:
            if event == "interrupt":
                with pytest.raises(PowerCutError):
                    tiny.update(name, *rows, **arguments, on_step=cut)
            made = tiny.update(name, *rows, **arguments)
        except UpdateDiscarded as error:
            discarded.append(str(error))
            continue
        assert_within(tiny, made, served[-1], TIGHT)
        assert 4 * len(made.candidate.reads) <= max_tokens, "every row has four targets"
        assert len({read.step for read in made.candidate.reads}) <= TIGHT.max_steps
        if event != "reject":
            today += made.candidate.bounds.step_frobenius
            served.append(made)
        assert today <= TIGHT.day_frobenius
    assert all("min_shrink" in reason or "max_tokens" in reason for reason in discarded), discarded


@pytest.mark.parametrize(
    ("bound", "limit", "num_updates"),
    [("drift_frobenius", 0.3, 500), ("drift_spectral", 0.2, 60), ("drift_kl", 0.02, 60)],
)
def test_hundreds_of_updates_each_within_the_step_budget_never_leave_the_cumulative_one(
    tmp_path, bound, limit, num_updates
):
    """Factors that always pull the same way, as a feed that poisons slowly would: pulled back, not trained."""
    tiny = make_tiny(tmp_path)
    bounds = LOOSE.model_copy(update={"step_frobenius": 0.02, bound: limit, "min_shrink": 1e-3})
    incumbent = new_factors(tiny.base, 2, 4.0, ("q_proj",), seed=1)
    generator = torch.Generator().manual_seed(5)
    (module,) = incumbent.factors
    far_NR = torch.randn(incumbent.factors[module][1].shape, generator=generator)
    anchors = tiny.anchors[:1]
    of_base = Reference(tiny.base, tiny.base.model, anchors)
    drifts = []
    ruler = Ruler(tiny.base, None, incumbent, anchors, of_base)
    for _ in range(num_updates):
        a_RK, b_NR = incumbent.factors[module]
        noise = [torch.randn(factor.shape, generator=generator) for factor in (a_RK, b_NR)]
        trained = incumbent.with_factors({module: (a_RK + 0.02 * noise[0], b_NR + far_NR + 0.1 * noise[1])})
        candidate, shrink = shrink_to_bounds(ruler, incumbent, trained, bounds, Spent(0.0, 1, 1))
        assert shrink > 0
        distances = dense_distances(tiny.base, candidate, incumbent)
        if bound == "drift_kl":
            distances[bound] = mean_kl(tiny.base, anchors, None, candidate)
        assert distances["step_frobenius"] <= 0.02 * ALMOST
        assert distances[bound] <= limit * (1 + 1e-5 if bound == "drift_kl" else ALMOST)
        drifts.append(distances[bound])
        incumbent = candidate
        ruler = Ruler(tiny.base, incumbent, incumbent, anchors, of_base)
    if bound == "drift_frobenius":
        assert max(drifts[:14]) < 0.99 * limit, "a step is at most 0.02: 0.3 takes fifteen of them"
    assert min(drifts[20:]) > 0.9 * limit


@pytest.mark.parametrize(("bound", "limit"), [("drift_frobenius", 0.15), ("drift_spectral", 0.08), ("drift_kl", 0.05)])
def test_an_adapter_at_a_cumulative_bound_goes_on_learning_within_it(tiny, bound, limit):
    bounds = LOOSE.model_copy(update={"step_frobenius": 0.05, bound: limit})
    before, nll = None, []
    for number in range(16):
        skill = number // 8
        made = tiny.update(
            f"{bound}-{number}", skill_rows(skill, 4), (), before, bounds=bounds,
            trainer={"lr": 0.05, "num_steps": 4, "remember": ()},
        )  # fmt: skip
        assert_within(tiny, made, before, bounds)
        nll.append(tiny.nll(made.adapter, skill_rows(1, 4, seed=1)))
        before = made
        if number == 7:
            assert getattr(made.candidate.bounds, bound) > 0.9 * limit
    assert nll[-1] < nll[7] - 0.5, "eight updates at the bound taught nothing"


@pytest.mark.parametrize(("bound", "limit"), [("drift_frobenius", 0.15), ("drift_spectral", 0.08), ("drift_kl", 0.05)])
def test_what_exploded_is_not_scaled_back_into_a_cumulative_bound(tiny, bound, limit):
    """Whatever is left of it would be noise at the size of the bound."""
    start = new_factors(tiny.base, 2, 4.0, ("q_proj", "v_proj"), seed=1)
    ruler = Ruler(tiny.base, None, start, tiny.anchors[:1])
    bounds = LOOSE.model_copy(update={bound: limit, "min_shrink": 0.5})
    far = start.with_factors({m: (a, 500 * torch.ones_like(b)) for m, (a, b) in start.factors.items()})
    made, shrink = shrink_to_bounds(ruler, start, far, bounds, Spent(0.0, 1, 1))
    assert shrink < bounds.min_shrink
    assert getattr(ruler.report(made, bounds, Spent(0.0, 1, 1), shrink), bound) <= limit


def test_training_ends_before_the_token_budget(tiny):
    """Four rows of four targets a step: 16 tokens; agem also reads two old ones: 24."""
    for method, remember, max_tokens, num_steps, num_tokens in (
        ("bounded_replay", None, 50, 3, 48),
        ("bounded_replay", None, 48, 3, 48),
        ("bounded_replay", None, 47, 2, 32),
        ("agem", None, 71, 2, 48),
        ("bounded_replay", None, 10_000, 8, 128),
    ):
        made = tiny.update(
            f"tokens-{method}-{max_tokens}", skill_rows(0, 5), skill_rows(1, 5),
            trainer={"method": method, "remember": remember},
            bounds=LOOSE.model_copy(update={"max_tokens": max_tokens}),
        )  # fmt: skip
        assert (made.candidate.num_steps, made.candidate.bounds.num_tokens) == (num_steps, num_tokens)
        assert len(made.candidate.reads) * 4 == num_tokens
    with pytest.raises(UpdateDiscarded, match=r"first step has more tokens than bounds.max_tokens = 15"):
        tiny.update("tokens", skill_rows(0, 5), bounds=LOOSE.model_copy(update={"max_tokens": 15}))


def test_more_steps_than_allowed_are_refused_by_config_and_trainer(tiny):
    with pytest.raises(ConfigError, match=r"trainer.num_steps \(8\) is above bounds.max_steps \(4\)"):
        from_dict({"trainer": {"num_steps": 8}, "bounds": {"max_steps": 4}})
    with pytest.raises(UpdateDiscarded, match="num_steps"):
        tiny.update("steps", skill_rows(0, 5), bounds=LOOSE.model_copy(update={"max_steps": 4}))


@pytest.mark.parametrize("bound", WEIGHTS)
def test_each_weight_bound_is_met_closely_by_the_dense_distance(tiny, bound):
    before = tiny.update(f"{bound}-1", skill_rows(0, 4))
    free = tiny.update(f"{bound}-2", skill_rows(1, 4), (), before, trainer={"lr": 0.03})
    at_start = dense_distances(tiny.base, before.adapter, before.adapter)[bound]
    limit = (at_start + dense_distances(tiny.base, free.adapter, before.adapter)[bound]) / 2
    bounds = LOOSE.model_copy(update={bound: limit})
    made = tiny.update(f"{bound}-3", skill_rows(1, 4), (), before, trainer={"lr": 0.03}, bounds=bounds)
    assert_within(tiny, made, before, bounds)
    assert dense_distances(tiny.base, made.adapter, before.adapter)[bound] > 0.97 * limit


def test_what_the_day_has_left_shrinks_the_step_and_nothing_left_discards_it(tiny):
    bounds = LOOSE.model_copy(update={"day_frobenius": 0.5})
    made = tiny.update("day", skill_rows(0, 4), bounds=bounds, spent_today=0.47, trainer={"lr": 0.05})
    assert made.candidate.bounds.shrink < 1
    assert dense_distances(tiny.base, made.adapter, None)["step_frobenius"] <= 0.03 * ALMOST
    assert 0.499 < made.candidate.bounds.day_frobenius <= 0.5
    for spent in (0.5, 0.7):
        with pytest.raises(UpdateDiscarded, match="min_shrink"):
            tiny.update("day-spent", skill_rows(0, 4), bounds=bounds, spent_today=spent)
    naive = tiny.update("day-naive", skill_rows(0, 4), bounds=bounds, spent_today=0.5, trainer={"method": "naive"})
    assert naive.candidate.bounds.broken == ("day_frobenius",)


def test_the_error_of_compression_to_another_rank_is_part_of_the_step(tiny):
    before = tiny.update("rank-4", skill_rows(0, 4), trainer={"lr": 0.05})
    tails = []
    for module in before.adapter.factors:
        w_NK = tiny.base.model.get_submodule(module).weight.detach().double().numpy()
        sigmas = np.linalg.svd(dense(before.adapter, module, w_NK.shape), compute_uv=False)
        tails.append(np.linalg.norm(sigmas[2:]) / np.linalg.norm(w_NK))
    still = {"lr": 1e-12, "num_steps": 1}
    lower = ADAPTER.model_copy(update={"rank": 2, "alpha": 3})
    made = tiny.update("rank-2", skill_rows(0, 4), (), before, adapter=lower, trainer=still)
    assert made.adapter.rank == 2
    assert made.candidate.bounds.step_frobenius == pytest.approx(max(tails), rel=1e-4)
    tight = LOOSE.model_copy(update={"step_frobenius": max(tails) / 2})
    with pytest.raises(UpdateDiscarded, match="min_shrink"):
        tiny.update("rank-tight", skill_rows(0, 4), (), before, adapter=lower, trainer=still, bounds=tight)
    higher = ADAPTER.model_copy(update={"rank": 7})
    grown = tiny.update("rank-7", skill_rows(0, 4), (), before, adapter=higher, trainer=still)
    assert grown.candidate.bounds.step_frobenius < 1e-6
    learned = tiny.update("rank-7b", skill_rows(0, 4), (), before, adapter=higher)
    assert min(float(b_NR.norm(dim=0).min()) for _, b_NR in learned.adapter.factors.values()) > 0, "all seven learn"


@pytest.mark.parametrize("remember", [("replay", "kl"), ("ewc", "replay"), ("ema",)])
def test_a_rejected_update_leaves_no_trace_in_the_next_one(tiny, remember):
    """Neither its factors, nor Adam's moments, nor the random state, nor what it would have remembered."""
    trainer = {"remember": remember}
    before = tiny.update(f"trace-{remember}", skill_rows(0, 4), trainer=trainer)
    rows = skill_rows(1, 4), skill_rows(0, 4), before
    clean = tiny.update(f"clean-{remember}", *rows, trainer=trainer)
    name = f"traced-{remember}"
    with pytest.raises(UpdateDiscarded):
        tiny.update(name, skill_rows(2, 4), skill_rows(0, 4), before, trainer={**trainer, "lr": 1e30})
    with pytest.raises(UpdateDiscarded):
        tiny.update(name, *rows, trainer=trainer, health=HealthConfig(max_grad_norm=1e-9))
    tiny.update(name, skill_rows(2, 4), skill_rows(0, 4), before, trainer=trainer)  # the gate refuses this one
    torch.rand(3)
    after = tiny.update(name, *rows, trainer=trainer)
    assert after.content == clean.content
    assert after.candidate.metrics == clean.candidate.metrics
    assert dataclasses.replace(after.candidate, path="") == dataclasses.replace(clean.candidate, path="")


@pytest.mark.slow
def test_an_update_beyond_the_days_displacement_is_held_and_its_records_wait_for_tomorrow(tmp_path):
    with base_server() as server:
        config = config_for(tmp_path / "demo", server)
        deployment = Deployment(config)
        assert config.agent.mode is LearningMode.AUTO
        record(deployment.store, config, [corrected(ticket) for ticket in tickets("repair", 24)])
        with worker(config, deployment.store) as learner:
            first = learner.update()
        assert first["is_served"], first["reasons"]
        moved = releases.get(deployment.store, first["candidate"]).manifest["bounds"]["step_frobenius"]
        bounds = config.bounds.model_copy(update={"day_frobenius": moved * 1.001})
        config = config.model_copy(update={"bounds": bounds})
        record(deployment.store, config, [corrected(ticket) for ticket in tickets("gift", 24)])
        with worker(config, deployment.store) as learner:
            held = learner.update()
            assert held["verdict"] == "hold"
            assert "the day's displacement is spent" in held["reasons"][0]
            assert "the records wait" in held["reasons"][0]
            waiting = select(screenings.c.status).where(screenings.c.status != "replay")
            with deployment.store.read() as connection:
                assert set(connection.scalars(waiting)) <= {"waiting"}
            learner.rooms.clock = lambda: time.time() + DAY_S + 60
            tomorrow = learner.update()
        assert tomorrow["candidate"] is not None
        learned = releases.get(deployment.store, tomorrow["candidate"]).manifest["learned"]
        assert set(learned) <= {ticket.id for ticket in tickets("gift", 24)}
        assert len(learned) >= 12, "a quota or a second attempt may leave some out"
