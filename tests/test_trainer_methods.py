"""Every method by its name: what theory demands of it on a tiny base, and the same bytes again."""

import copy
import dataclasses
import hashlib

import numpy as np
import pytest
import torch

from cltrain.config import BoundsConfig
from cltrain.errors import DataError
from cltrain.models.adapter import attach
from cltrain.models.anchors import mean_kl
from cltrain.models.digest import MEMORY_FILE
from cltrain.objectives.fisher import measure_fisher
from cltrain.objectives.geometry import difference_norms
from cltrain.objectives.penalties import ewc
from cltrain.objectives.projections import overlap, top_subspaces
from cltrain.trainer.memory import Memory, read_memory, sealed_memory, write_memory
from cltrain.trainer.methods import METHODS
from tests.deltas import flat
from tests.trainer_parts import ADAPTER, LOOSE, Tiny, dense, dense_distances, make_tiny, skill_rows

OLD = skill_rows(0, 6)
NEW = skill_rows(1, 6)
CONTRARY = skill_rows(0, 6, answer=2)  # OLD's prompts with other answers: learning these unlearns OLD


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("methods"))


@pytest.fixture(scope="module")
def learned(tiny):
    """What every second update here begins with: OLD learned well, with the Fisher of it."""
    return tiny.update("learned", OLD, trainer={"method": "ewc", "num_steps": 40})


def total_step(made, before) -> float:
    """||dW - dW_before||_F over all modules, relative to the base's."""
    norms = difference_norms(made.adapter, before.adapter)
    return sum(norm**2 for norm in norms.values()) ** 0.5


def second(tiny, learned, name, fresh=CONTRARY, replay=OLD, **trainer):
    return tiny.update(f"{name}-{len(list(tiny.directory.iterdir()))}", fresh, replay, learned, trainer=trainer)


class PowerCutError(Exception):
    pass


@pytest.mark.parametrize("method", METHODS)
def test_two_updates_of_every_method_learn_and_give_the_same_bytes_also_after_an_interruption(tiny, method):
    trainer = {"method": method, "ewc_lambda": 10.0}
    first = tiny.update(f"{method}-1", OLD, trainer=trainer)
    assert first.candidate.metrics["nll_fresh_last"] < first.candidate.metrics["nll_fresh_first"]
    two = tiny.update(f"{method}-2", NEW, OLD, first, trainer=trainer)
    again = tiny.update(f"{method}-2b", NEW[::-1], OLD[3:] + OLD[:3], first, trainer=trainer)
    assert again.content == two.content
    assert (again.candidate.metrics, again.candidate.bounds) == (two.candidate.metrics, two.candidate.bounds)
    assert tiny.nll(two.adapter, NEW) < 0.95 * tiny.nll(first.adapter, NEW)

    def cut(step, measured):
        if step == 4:
            raise PowerCutError

    with pytest.raises(PowerCutError):
        tiny.update(f"{method}-2c", NEW, OLD, first, trainer=trainer, on_step=cut)
    steps = []
    resumed = tiny.update(f"{method}-2c", NEW, OLD, first, trainer=trainer, on_step=lambda step, _: steps.append(step))
    assert steps == [3, 4, 5, 6, 7], "it goes on from the checkpoint"
    assert resumed.content == two.content
    assert (resumed.candidate.metrics, resumed.candidate.reads) == (two.candidate.metrics, two.candidate.reads)


def test_replay_keeps_what_naive_forgets(tiny, learned):
    before = tiny.nll(learned.adapter, OLD)
    naive = tiny.nll(second(tiny, learned, "forget", NEW, method="naive", num_steps=30).adapter, OLD)
    replay = tiny.nll(second(tiny, learned, "keep", NEW, method="replay", num_steps=30).adapter, OLD)
    assert naive > 2 * before
    assert replay < 0.5 * naive


def test_kl_keeps_the_candidate_nearer_to_the_base(tiny):
    naive = tiny.update("drift-naive", NEW, trainer={"method": "naive", "num_steps": 40})
    kl = tiny.update("drift-kl", NEW, trainer={"method": "kl", "num_steps": 40})
    assert kl.candidate.bounds.drift_kl < 0.6 * naive.candidate.bounds.drift_kl


def test_a_large_l2sp_coefficient_moves_less_and_a_larger_one_still_less(tiny, learned):
    steps = [
        total_step(second(tiny, learned, "l2sp", method="l2sp", l2sp_lambda=size, num_steps=30), learned)
        for size in (0.0, 30.0, 1000.0)
    ]
    assert steps[1] < 0.7 * steps[0]
    assert steps[2] < 0.7 * steps[1]


def test_ewc_seals_the_fisher_of_what_the_update_learned(tiny, learned):
    path = tiny.directory / "learned" / "candidate"
    sealed = read_memory(path, learned.adapter).fisher
    model = attach(tiny.base, learned.adapter)
    expected = measure_fisher(tiny.base, model, list(learned.adapter.factors), OLD, 1.0)
    assert sealed.num_rows == expected.num_rows == 6
    for module, pair in expected.diagonals.items():
        for found, wanted in zip(sealed.diagonals[module], pair, strict=True):
            assert torch.equal(found, wanted)


def test_ewc_moves_less_along_what_was_learned_than_its_share_of_the_whole_step(tiny, learned):
    def weighted(made):
        """The Fisher-weighted part of the step, relative to the step."""
        layout, values = flat(made.adapter)
        along = float(ewc(layout, made.adapter.scale, learned.adapter, learned.memory.fisher)(values))
        return along**0.5, along**0.5 / total_step(made, learned)

    free = second(tiny, learned, "ewc0", NEW, method="ewc", ewc_lambda=0.0, num_steps=30)
    held = second(tiny, learned, "ewc1", NEW, method="ewc", ewc_lambda=1000.0, num_steps=30)
    assert weighted(held)[0] < 0.5 * weighted(free)[0]
    assert weighted(held)[1] < 0.9 * weighted(free)[1]
    apart = [mean_kl(tiny.base, OLD, learned.adapter, made.adapter) for made in (free, held)]
    assert apart[1] < 0.5 * apart[0]


def test_the_first_ewc_update_is_the_naive_one_and_the_second_remembers_both(tiny):
    naive = tiny.update("ewc-naive", OLD, trainer={"method": "naive"})
    first = tiny.update("ewc-first", OLD, trainer={"method": "ewc"})
    assert first.content[0] == naive.content[0]
    assert first.memory.fisher.num_rows == 6
    two = tiny.update("ewc-second", NEW, (), first, trainer={"method": "ewc"})
    assert two.memory.fisher.num_rows == pytest.approx(0.95 * 6 + 6)


def test_a_checkpoint_of_another_fisher_is_not_continued(tiny, learned):
    def cut(step, measured):
        if step == 4:
            raise PowerCutError

    trainer = {"method": "ewc"}
    with pytest.raises(PowerCutError):
        tiny.update("fisher", NEW, (), learned, trainer=trainer, on_step=cut)
    steps = []
    other = dataclasses.replace(learned, memory=Memory())
    tiny.update("fisher", NEW, (), other, trainer=trainer, on_step=lambda step, _: steps.append(step))
    assert steps[0] == 0


def test_oplora_leaves_nothing_in_the_bases_top_directions_also_when_shrunk(tiny, tmp_path):
    free = tiny.update("top-free", NEW, trainer={"method": "naive"})
    kept = tiny.update("top-kept", NEW, trainer={"method": "oplora"})
    subspaces = top_subspaces(tiny.base, list(free.adapter.factors), 16)
    assert overlap(free.adapter, subspaces) > 0.1
    assert overlap(kept.adapter, subspaces) < 1e-10
    half = LOOSE.model_copy(update={"step_frobenius": kept.candidate.bounds.step_frobenius / 2})
    trainer = {"remember": ("oplora",)}
    shrunk = tiny.update("top-shrunk", NEW, trainer=trainer, bounds=half)
    assert shrunk.candidate.bounds.shrink < 1
    assert overlap(shrunk.adapter, subspaces) < 1e-10
    wider = ADAPTER.model_copy(update={"rank": 6})
    grown = tiny.update("top-grown", OLD, (), shrunk, trainer=trainer, adapter=wider, bounds=half)
    assert grown.candidate.bounds.shrink < 1
    assert overlap(grown.adapter, subspaces) < 1e-10


def test_one_agem_step_does_not_raise_the_loss_that_a_naive_step_raises(tiny, learned):
    one = {"num_steps": 1, "warmup_steps": 0, "lr": 1e-4, "batch_size": 12, "final_lr_share": 1.0}
    before = tiny.nll(learned.adapter, OLD)
    naive = tiny.nll(second(tiny, learned, "agem", method="naive", **one).adapter, OLD)
    agem = tiny.nll(second(tiny, learned, "agem", method="agem", **one).adapter, OLD)
    assert naive - before > 2e-5
    assert agem - before < 0.2 * (naive - before)


def test_agem_learns_from_fresh_rows_alone_and_without_old_rows_is_naive(tiny, learned):
    guarded = second(tiny, learned, "agem", method="agem")
    assert {name for name in guarded.candidate.metrics if "replay" in name} == {"num_replay"}
    assert {read.record[:2] for read in guarded.candidate.reads} == {"s0"}
    naive, alone = (second(tiny, learned, "alone", NEW, (), method=name) for name in ("naive", "agem"))
    assert alone.content == naive.content


def test_ema_serves_the_average_and_trains_on_from_the_fast_weights(tiny, learned):
    trainer = {"method": "ema", "ema_decay": 0.75, "batch_size": 6}
    after = dataclasses.replace(learned, memory=Memory())
    one = tiny.update("ema-1", NEW, (), after, trainer=trainer)
    for module, (_, b_NR) in one.adapter.factors.items():
        shape = (b_NR.shape[0], one.adapter.factors[module][0].shape[1])
        wanted = 0.75 * dense(learned.adapter, module, shape) + 0.25 * dense(one.memory.fast, module, shape)
        u, sigmas, vt = np.linalg.svd(wanted)
        wanted = (u[:, :4] * sigmas[:4]) @ vt[:4]
        assert np.linalg.norm(dense(one.adapter, module, shape) - wanted) < 1e-5 * np.linalg.norm(wanted)
    fast = dataclasses.replace(one, adapter=one.memory.fast)
    assert total_step(one, learned) < 0.5 * total_step(fast, learned)
    two = tiny.update("ema-2", NEW, (), one, trainer=trainer)
    assert two.candidate.metrics["nll_fresh_first"] == pytest.approx(tiny.nll(fast.adapter, NEW), rel=1e-5)
    assert tiny.nll(two.adapter, NEW) < tiny.nll(one.adapter, NEW)


def test_distill_learns_less_of_what_the_incumbent_would_not_say_and_reads_no_old_row(tiny, learned):
    """Between "only the labels" (naive) and "only the incumbent" (a huge beta), and by fresh rows alone."""
    settings = {"num_steps": 30}
    naive = second(tiny, learned, "soft", NEW, method="naive", **settings)
    distill, held = (
        second(tiny, learned, "soft", NEW, method="distill", distill_beta=beta, **settings) for beta in (1.0, 30.0)
    )
    losses = [tiny.nll(made.adapter, NEW) for made in (naive, distill, held, learned)]
    assert losses[0] < losses[1] < losses[2] < losses[3]
    assert losses[3] - losses[2] < 0.4 * (losses[3] - losses[0])
    apart = [mean_kl(tiny.base, NEW, learned.adapter, made.adapter) for made in (naive, distill)]
    assert apart[1] < 0.5 * apart[0]
    alone = second(tiny, learned, "soft", NEW, (), method="distill", distill_beta=1.0, **settings)
    assert alone.content == distill.content


def test_joint_draws_old_and_new_rows_alike(tiny, learned):
    joint = second(tiny, learned, "joint", NEW, method="joint", num_steps=6)
    records = [read.record for read in joint.candidate.reads]
    assert {name: records.count(name) for name in records} == {row.record: 2 for row in OLD + NEW}


def test_merge_reset_is_the_incumbent_and_a_new_adapter_of_the_merged_model(tiny, learned):
    """The merged model is built here; what is trained on it from nothing must be what the sum was made of."""
    merged = second(tiny, learned, "merge", NEW, (), method="merge_reset")
    below = copy.deepcopy(tiny.base.model)
    for module in learned.adapter.factors:
        weight = below.get_submodule(module).weight
        weight += torch.from_numpy(dense(learned.adapter, module, tuple(weight.shape))).float()
    other = dataclasses.replace(tiny, base=dataclasses.replace(tiny.base, model=below))
    new = other.update("merge-new", NEW, trainer={"method": "naive"})
    lost = []
    for module in learned.adapter.factors:
        shape = tuple(tiny.base.model.get_submodule(module).weight.shape)
        u, sigmas, vt = np.linalg.svd(dense(learned.adapter, module, shape) + dense(new.adapter, module, shape))
        best = (u[:, :4] * sigmas[:4]) @ vt[:4]
        assert np.linalg.norm(dense(merged.adapter, module, shape) - best) < 1e-4 * np.linalg.norm(best)
        lost.append(float(np.linalg.norm(sigmas[4:]) / np.linalg.norm(sigmas)))
    assert max(lost) > 0.01, "the sum has a higher rank, so that something was re-compressed"


def test_penalties_on_a_merged_model_hold_the_new_adapter_to_nothing(tiny, learned):
    free = second(tiny, learned, "merge", NEW, (), method="merge_reset", num_steps=30)
    held = second(
        tiny, learned, "merge", NEW, (), method="merge_reset", remember=("l2sp",), l2sp_lambda=1000.0, num_steps=30
    )
    assert held.candidate.metrics["l2sp_first"] == 0.0
    assert total_step(held, learned) < 0.3 * total_step(free, learned)


def test_remember_takes_the_place_of_the_methods_own_ways_and_combines_them(tiny, learned):
    bounded = tiny.update("first-bounded", NEW, OLD, trainer={"method": "bounded_replay"})
    combined = tiny.update("first-combined", NEW, OLD, trainer={"method": "naive", "remember": ("replay", "kl")})
    assert combined.content == bounded.content, "with bounds that never bite and no factors to balance they are one"
    nothing = tiny.update("first-nothing", NEW, OLD, trainer={"method": "bounded_replay", "remember": ()})
    naive = tiny.update("first-naive", NEW, OLD, trainer={"method": "naive"})
    assert nothing.content == naive.content
    assert naive.content != bounded.content
    names = ("replay", "kl", "ewc", "l2sp", "oplora", "agem", "ema")
    everything = second(tiny, learned, "all", NEW, method="bounded_replay", remember=names)
    terms = {"fresh", "replay", "kl", "ewc", "l2sp"}
    assert {f"grad_norm_{term}_last" for term in terms} <= everything.candidate.metrics.keys()


def test_bounds_hold_for_sums_and_averages_too(tiny, learned):
    bounds = BoundsConfig(step_frobenius=0.05, drift_frobenius=9, drift_spectral=9, step_kl=9, drift_kl=9)
    for name, remember, rank in (("sum", (), 4), ("average", ("ema", "replay"), 4), ("rank", ("kl",), 6)):
        method = "merge_reset" if name == "sum" else "bounded_replay"
        free = tiny.update(
            f"free-{name}", NEW, OLD, learned, trainer={"method": method, "remember": remember, "num_steps": 20}
        )
        made = tiny.update(
            f"held-{name}", NEW, OLD, learned,
            trainer={"method": "bounded_replay", "remember": remember, "num_steps": 20},
            adapter=ADAPTER.model_copy(update={"rank": rank}), bounds=bounds,
        )  # fmt: skip
        assert free.candidate.bounds.step_frobenius > 0.05
        assert dense_distances(tiny.base, made.adapter, learned.adapter)["step_frobenius"] <= 0.05
        assert made.candidate.bounds.step_frobenius > 0.04


def test_memory_that_is_damaged_is_refused(tiny, learned, tmp_path):
    (tmp_path / MEMORY_FILE).write_bytes(b"no safetensors")
    with pytest.raises(DataError, match="damaged"):
        read_memory(tmp_path, learned.adapter)
    assert read_memory(None, None) == Memory()


def test_only_the_memory_that_was_sealed_is_read(learned, tmp_path):
    write_memory(tmp_path, Memory(fast=learned.adapter))
    sha256 = hashlib.sha256((tmp_path / MEMORY_FILE).read_bytes()).hexdigest()
    assert sealed_memory(tmp_path, learned.adapter, sha256).fast is not None
    assert sealed_memory(tmp_path, learned.adapter, None) == Memory()
    with pytest.raises(DataError, match="not the file that was sealed"):
        sealed_memory(tmp_path, learned.adapter, "0" * 64)
    (tmp_path / MEMORY_FILE).unlink()
    with pytest.raises(DataError, match="cannot be read"):
        sealed_memory(tmp_path, learned.adapter, sha256)
