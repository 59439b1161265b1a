"""One update: same bytes again, bounds by construction, nothing left of a failed one."""

import dataclasses
import hashlib
import random
import shutil
from pathlib import Path

import pytest
import torch

from cltrain.config import AdapterConfig, BoundsConfig, HealthConfig, TrainerConfig
from cltrain.errors import ConfigError, DataError
from cltrain.models.adapter import new_factors, read_adapter
from cltrain.models.anchors import load_anchors, mean_kl
from cltrain.models.base import load_base
from cltrain.models.chat import render_example
from cltrain.models.digest import adapter_digest
from cltrain.models.shapes import FAMILIES
from cltrain.records import Example, TokenRow
from cltrain.trainer import fingerprint
from cltrain.trainer.shrink import Spent
from cltrain.trainer.update import UpdateDiscarded, train_update, verify_bounds
from tests.tiny import TOOLS, make_tiny_base, ticket

ADAPTER = AdapterConfig(rank=4, alpha=8)
TRAINER = TrainerConfig(num_steps=6, batch_size=4, kl_batch=2, lr=0.01, checkpoint_every=2)
LOOSE = BoundsConfig(
    step_frobenius=9, drift_frobenius=9, step_spectral=9, drift_spectral=9, step_kl=9, drift_kl=9, day_frobenius=9
)


@dataclasses.dataclass
class World:
    base: object
    anchors: list
    fresh: list
    replay: list

    def update(self, work_dir: Path, **changes):
        arguments = {
            "incumbent": None,
            "adapter": ADAPTER,
            "fresh": self.fresh,
            "replay": self.replay,
            "anchors": self.anchors,
            "trainer": TRAINER,
            "bounds": LOOSE,
            "seed": 7,
            "work_dir": work_dir,
        }
        return train_update(self.base, **{**arguments, **changes})


def make_world(directory: Path, family: str = "llama") -> World:
    base = load_base(make_tiny_base(directory / family, family))
    anchors, _ = load_anchors(base, file=None, count=6, max_tokens=16, seed=1, directory=directory / "anchors")

    def row(order, tool):
        messages = tuple(ticket(order, tool))
        return render_example(base.tokenizer, 512, Example(order, "anna", f"{tool}/good", messages, (1,), TOOLS[:1]))

    fresh = [row(f"A{i}", "refund") for i in range(5)]
    return World(base, anchors, fresh, [row(f"B{i}", ("refund", "track")[i % 2]) for i in range(6)])


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def weights_digest(base) -> str:
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in base.model.parameters())).hexdigest()


def files_under(directory: Path) -> list[str]:
    return sorted(str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file())


def test_the_same_inputs_and_seed_give_the_same_bytes(world, tmp_path):
    one = world.update(tmp_path / "one")
    torch.rand(5)  # the global random state has no part in it
    other = world.update(tmp_path / "other", fresh=world.fresh[::-1])
    assert adapter_digest(Path(one.path)) == adapter_digest(Path(other.path))
    assert (one.bounds, one.metrics, one.reads) == (other.bounds, other.metrics, other.reads)
    third = world.update(tmp_path / "third", seed=8)
    assert adapter_digest(Path(third.path)) != adapter_digest(Path(one.path))


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """An update that nothing interrupted."""
    return world.update(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("last_step", [0, 1, 2, 4, 5])
def test_an_interrupted_update_resumes_to_the_same_bytes(world, tmp_path, last_step):
    class PowerCutError(Exception):
        pass

    def cut(step, measured):
        if step == last_step:
            raise PowerCutError

    whole = world.update(tmp_path / "whole")
    with pytest.raises(PowerCutError):
        world.update(tmp_path / "cut", on_step=cut)
    assert not (tmp_path / "cut" / "candidate").exists()
    steps = []
    resumed = world.update(tmp_path / "cut", on_step=lambda step, measured: steps.append(step))
    assert steps == list(range((last_step + 1) // 2 * 2, 6)), "it goes on from the last checkpoint"
    assert adapter_digest(Path(resumed.path)) == adapter_digest(Path(whole.path))
    assert (resumed.bounds, resumed.metrics, resumed.reads) == (whole.bounds, whole.metrics, whole.reads)


def test_a_checkpoint_of_other_inputs_is_not_continued(world, tmp_path):
    world.update(tmp_path / "work")
    steps = []
    again = world.update(tmp_path / "work", seed=8, on_step=lambda step, measured: steps.append(step))
    assert steps == list(range(6))
    assert adapter_digest(Path(again.path)) == adapter_digest(Path(world.update(tmp_path / "new", seed=8).path))


@pytest.mark.parametrize("seed", range(12))
def test_a_checkpoint_with_one_other_bit_is_never_continued(world, whole, tmp_path, seed):
    """Refused, or (a bit of what says whose it is) not known and the update starts over."""

    class PowerCutError(Exception):
        pass

    def cut(step, measured):
        if step == 3:
            raise PowerCutError

    with pytest.raises(PowerCutError):
        world.update(tmp_path, on_step=cut)
    file = tmp_path / "checkpoint.safetensors"
    content = bytearray(file.read_bytes())
    header = int.from_bytes(content[:8], "little")
    place = random.Random(seed).randrange(*((8, 8 + header) if seed % 2 else (8 + header, len(content))))
    content[place] ^= 1 << seed % 8
    file.write_bytes(content)
    said = "damaged"
    try:
        again = world.update(tmp_path)
    except DataError as error:
        said = str(error)
        file.unlink()
        again = world.update(tmp_path)
    assert "damaged" in said
    assert adapter_digest(Path(again.path)) == adapter_digest(Path(whole.path))


def test_what_was_measured_before_an_interruption_is_judged_too(world, whole, tmp_path):
    shutil.copytree(Path(whole.path).parent, tmp_path / "work")
    with pytest.raises(UpdateDiscarded, match=r"at step 0, above health\.max_grad_norm"):
        world.update(tmp_path / "work", health=HealthConfig(max_grad_norm=1e-6))


@pytest.mark.parametrize("other", ["context", "dtype", "version"])
def test_a_checkpoint_of_another_context_dtype_or_version_is_not_continued(world, tmp_path, other, monkeypatch):
    world.update(tmp_path / "work")
    base = world.base
    if other == "context":
        base = dataclasses.replace(base, context=base.context - 1)
    elif other == "dtype":
        base = load_base(base.path, dtype="bfloat16")
    else:
        monkeypatch.setattr(fingerprint, "__version__", "0.0.0")
    steps = []
    dataclasses.replace(world, base=base).update(tmp_path / "work", on_step=lambda step, measured: steps.append(step))
    assert steps == list(range(6))


def test_the_base_is_never_written_to_and_the_candidate_learned(world, tmp_path):
    before = weights_digest(world.base)
    candidate = world.update(tmp_path, trainer=TRAINER.model_copy(update={"num_steps": 20}))
    assert weights_digest(world.base) == before
    assert candidate.metrics["nll_fresh_last"] < 0.5 * candidate.metrics["nll_fresh_first"]
    assert candidate.num_steps == 20


def test_the_next_update_starts_from_the_exported_file(world, tmp_path):
    first = world.update(tmp_path / "first")
    incumbent = read_adapter(Path(first.path))
    second = world.update(tmp_path / "second", incumbent=incumbent)
    assert second.metrics["nll_fresh_first"] < first.metrics["nll_fresh_first"]
    spent = Spent(0.0, second.bounds.num_tokens, second.bounds.num_steps)
    exported = read_adapter(Path(second.path))
    report = verify_bounds(
        world.base, exported, incumbent, world.anchors, LOOSE, spent=spent, shrink=second.bounds.shrink
    )
    assert report == second.bounds
    assert report.step_frobenius > 0
    assert mean_kl(world.base, world.anchors, None, read_adapter(Path(second.path))) == pytest.approx(report.drift_kl)
    step_kl = mean_kl(world.base, world.anchors, incumbent, read_adapter(Path(second.path)))
    assert step_kl == pytest.approx(report.step_kl)


@pytest.mark.parametrize(
    "bound", ["step_frobenius", "drift_frobenius", "step_spectral", "drift_spectral", "step_kl", "drift_kl"]
)
def test_each_bound_shrinks_the_step_until_it_holds_and_no_further(world, tmp_path, bound):
    incumbent = read_adapter(Path(world.update(tmp_path / "first").path))
    trainer = TRAINER.model_copy(update={"lr": 0.02})
    free = world.update(tmp_path / "free", incumbent=incumbent, trainer=trainer)
    assert free.bounds.shrink == 1.0
    at_start = getattr(verify_bounds(world.base, incumbent, incumbent, world.anchors, LOOSE), bound)
    limit = (at_start + getattr(free.bounds, bound)) / 2
    bounds = LOOSE.model_copy(update={bound: limit})
    candidate = world.update(tmp_path / "bound", incumbent=incumbent, trainer=trainer, bounds=bounds)
    if bound == "drift_frobenius":  # kept to while training, by projection
        assert candidate.bounds.shrink == 1
    else:
        assert 0.05 < candidate.bounds.shrink < 1
    assert candidate.bounds.holds
    exported = read_adapter(Path(candidate.path))
    spent = Spent(0.0, candidate.bounds.num_tokens, candidate.bounds.num_steps)
    report = verify_bounds(
        world.base, exported, incumbent, world.anchors, bounds, spent=spent, shrink=candidate.bounds.shrink
    )
    assert report == candidate.bounds
    assert 0.97 * limit < getattr(report, bound) <= limit


def test_a_step_that_must_shrink_too_far_is_discarded_and_leaves_nothing(world, tmp_path):
    for bound in ("step_frobenius", "drift_frobenius"):
        bounds = LOOSE.model_copy(update={bound: 1e-4})
        with pytest.raises(UpdateDiscarded, match="min_shrink"):
            world.update(tmp_path, bounds=bounds)
        assert files_under(tmp_path) == []


def test_a_loss_or_gradient_that_is_not_finite_discards_the_update(world, tmp_path):
    poisoned = dataclasses.replace(world.fresh[0], weights=(float("inf"),) * len(world.fresh[0].ids))
    with pytest.raises(UpdateDiscarded, match=r"nll_fresh is (inf|nan) at step 0"):
        world.update(tmp_path, fresh=[poisoned])
    assert files_under(tmp_path) == []
    steps = []
    exploding = TRAINER.model_copy(update={"lr": 1e30})
    with pytest.raises(UpdateDiscarded, match="at step"):
        world.update(tmp_path, trainer=exploding, on_step=lambda step, measured: steps.append(step))
    assert len(steps) >= 1
    assert files_under(tmp_path) == []


def test_weights_that_explode_in_the_last_step_never_become_a_candidate(world, tmp_path):
    for method in ("bounded_replay", "naive"):
        trainer = TRAINER.model_copy(update={"lr": 3e37, "num_steps": 1, "method": method})
        with pytest.raises(UpdateDiscarded):
            world.update(tmp_path / method, trainer=trainer, bounds=BoundsConfig())
        assert files_under(tmp_path / method) == []


def test_no_token_to_learn_from_discards_the_update(world, tmp_path):
    silent = dataclasses.replace(world.fresh[0], weights=(0.0,) * len(world.fresh[0].ids))
    for fresh in ([], [silent]):
        with pytest.raises(UpdateDiscarded, match="no fresh row"):
            world.update(tmp_path, fresh=fresh)


def test_one_fresh_row_without_replay_is_enough(world, tmp_path):
    candidate = world.update(tmp_path, fresh=world.fresh[:1], replay=[])
    assert {read.record for read in candidate.reads} == {"A0"}
    assert candidate.metrics["nll_fresh_last"] < candidate.metrics["nll_fresh_first"]


def test_reads_name_the_record_of_every_slot(world, tmp_path):
    reads = world.update(tmp_path).reads
    assert [(read.step, read.slot) for read in reads] == [(step, slot) for step in range(6) for slot in range(4)]
    assert all(read.record.startswith("A" if read.slot < 2 else "B") for read in reads)


def test_naive_uses_no_replay_no_kl_and_no_bounds_but_reports_them(world, tmp_path):
    tight = BoundsConfig(step_frobenius=1e-3, drift_frobenius=1e-3, step_kl=1e-3, drift_kl=1e-3)
    trainer = TRAINER.model_copy(update={"method": "naive"})
    candidate = world.update(tmp_path / "naive", trainer=trainer, bounds=tight)
    assert {read.record[0] for read in candidate.reads} == {"A"}
    assert not {name for name in candidate.metrics if name.startswith(("kl", "nll_replay"))}
    assert candidate.bounds.shrink == 1.0
    assert not candidate.bounds.holds


def test_kl_to_the_base_keeps_the_candidate_nearer_to_it(world, tmp_path):
    trainer = TRAINER.model_copy(update={"num_steps": 24})
    with_kl = world.update(tmp_path / "with", trainer=trainer)
    without = world.update(tmp_path / "without", trainer=trainer.model_copy(update={"kl_beta": 0.0}))
    assert with_kl.bounds.drift_kl < 0.5 * without.bounds.drift_kl


def test_doubling_kl_beta_doubles_that_terms_measured_gradient(world, tmp_path):
    incumbent = read_adapter(Path(world.update(tmp_path / "incumbent").path))

    def measure(beta):
        seen = []
        trainer = TRAINER.model_copy(update={"kl_beta": beta, "num_steps": 1})
        directory = tmp_path / str(beta)
        world.update(
            directory, incumbent=incumbent, trainer=trainer, on_step=lambda step, measured: seen.append(measured)
        )
        return seen[0]

    one, two = measure(0.5), measure(1.0)
    assert one["grad_norm_kl"] > 0
    assert two["grad_norm_kl"] == pytest.approx(2 * one["grad_norm_kl"], rel=1e-4)
    assert two["grad_norm_fresh"] == one["grad_norm_fresh"]
    assert two["kl"] == one["kl"], "the reported KL is without its coefficient"


def test_micro_batches_change_nothing_but_rounding(world, tmp_path):
    measured = {None: [], 1: []}
    for size, seen in measured.items():
        trainer = TRAINER.model_copy(update={"micro_batch": size, "num_steps": 3})
        world.update(tmp_path / str(size), trainer=trainer, on_step=lambda step, values, seen=seen: seen.append(values))
    for whole, single in zip(measured[None], measured[1], strict=True):
        assert single == pytest.approx(whole, rel=1e-3, abs=1e-6)


def test_an_incumbent_with_other_modules_or_another_base_is_refused(world, tmp_path):
    other = new_factors(world.base, 4, 8.0, ("q_proj",), seed=1)
    with pytest.raises(ConfigError, match=r"the incumbent has \('q_proj',\)"):
        world.update(tmp_path, incumbent=other)
    foreign = load_base(make_tiny_base(tmp_path / "base", seed=1))
    with pytest.raises(DataError, match="another base"):
        world.update(tmp_path, incumbent=new_factors(foreign, 4, 8.0, ADAPTER.targets, seed=1))


def test_rows_that_the_base_cannot_take_are_refused(world, tmp_path):
    long = TokenRow("long", "s", "p", (5,) * 513, (1.0,) * 513)
    with pytest.raises(DataError, match="long has 513 tokens; the base takes 512"):
        world.update(tmp_path, fresh=[long])
    with pytest.raises(DataError, match="outside the base's vocabulary"):
        world.update(tmp_path, replay=[TokenRow("odd", "s", "p", (5, 448), (0.0, 1.0))])
    with pytest.raises(DataError, match="no anchors"):
        world.update(tmp_path, anchors=[])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_learns_within_bounds(tmp_path, family):
    world = make_world(tmp_path, family)
    bounds = BoundsConfig(step_frobenius=0.05, drift_frobenius=0.1, step_kl=0.05, drift_kl=0.05, min_shrink=0.01)
    candidate = world.update(tmp_path / "work", bounds=bounds)
    assert candidate.bounds.holds
    assert candidate.metrics["nll_fresh_last"] < candidate.metrics["nll_fresh_first"]
