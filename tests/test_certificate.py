"""A release's bounds follow from its files, the base and the anchors alone, and whatever was touched is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cltrain.api import Deployment, verify
from cltrain.certificate import CLAIMED_ONLY, certify, distances
from cltrain.config import BoundsConfig
from cltrain.models.adapter import AdapterFile, new_factors, read_adapter, write_adapter
from cltrain.models.anchors import load_anchors
from cltrain.models.base import Base, load_base
from cltrain.models.digest import adapter_digest, base_path
from cltrain.records import BOUNDS
from cltrain.registry.releases import file_digests, release_name
from tests.command import Command, cltrain
from tests.deployments import base_server, config_for, corrected, record, tickets, worker
from tests.tiny import make_tiny_base

__all__ = ["cltrain"]  # a fixture

MEASURED = [name for name in BOUNDS if name not in CLAIMED_ONLY]
WIDE_GATE = {
    "items_per_gate": 8,
    "promote_on": "non_inferior",
    "margin": 0.99,
    "stratum_margin": 0.99,
}


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two promoted updates of a worker left, without its store: releases and anchors."""
    home = tmp_path_factory.mktemp("sealed")
    with base_server() as url:
        config = config_for(home / "demo", url, trainer={"num_steps": 3, "num_anchors": 4}, gate=WIDE_GATE)
        deployment = Deployment(config)
        for skill in ("repair", "refund"):
            record(deployment.store, config, [corrected(ticket) for ticket in tickets(skill, 12)])
            with worker(config, deployment.store) as learner:
                summary = learner.update()
            assert summary["is_served"], summary["reasons"]
    for part in ("releases", "anchors"):
        shutil.copytree(config.state_dir / part, home / "alone" / part)
    return home / "alone"


@pytest.fixture
def copied(sealed: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A copy to tamper with: the releases without and with a parent that is no base."""
    state = shutil.copytree(sealed, tmp_path / "state")
    for path in [state, *state.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    first, second = sorted(path for path in (state / "releases/support").iterdir() if path.is_dir())
    return first, second


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return load_base(make_tiny_base(tmp_path_factory.mktemp("tiny") / "llama"))


def edit_manifest(release: Path, **changes: Any) -> None:
    file = release / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["bounds"] |= changes.pop("bounds", {})
    file.write_text(json.dumps({**manifest, **changes}))


def flip_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(bytes(content))


def parent_of(release: Path) -> Path:
    return release.parent / json.loads((release / "manifest.json").read_text())["parent"]


def remade(release: Path, factor: float) -> Path:
    """The release with its B multiplied and every hash and name made right again; the claims stay."""
    adapter = read_adapter(release)
    made = release.parent.parent / "made"
    digest = write_adapter(made, adapter.with_factors({m: (a, b * factor) for m, (a, b) in adapter.factors.items()}))
    return resealed(release, made, digest)


def resealed(release: Path, made: Path, digest: str) -> Path:
    """`made` in the place of the release, with its claims and with hashes and name that are right."""
    manifest = json.loads((release / "manifest.json").read_text())
    name = release_name("support", manifest["number"], digest)
    manifest |= {"name": name, "digest": digest, "files": file_digests(made)}
    (made / "manifest.json").write_text(json.dumps(manifest))
    return made.rename(release.parent / name)


def test_every_release_of_a_worker_holds_from_its_files_alone(sealed: Path, cltrain: Command) -> None:
    releases = sorted(path for path in (sealed / "releases/support").iterdir() if path.is_dir())
    assert len(releases) == 2
    assert not list(sealed.rglob("*.db"))
    for release in releases:
        done = cltrain("verify", str(release), "--json")
        assert (done.code, done.json["failed"]) == (0, []), done.out
        states = {finding["name"]: finding["state"] for finding in done.json["findings"]}
        assert {name for name, state in states.items() if state == "claimed"} == set(CLAIMED_ONLY)
        assert {states[name] for name in MEASURED} == {"holds"}
    seen = {finding["name"]: finding["seen"] for finding in done.json["findings"]}
    assert seen["step_frobenius"] != pytest.approx(seen["drift_frobenius"], rel=1e-3), "the step is not from the base"
    assert cltrain("verify", str(release)).out.endswith("holds\n")
    home = f"--home={release.parents[2]}"
    assert cltrain("verify", release.name[:-4], home).out.endswith("holds\n")
    unknown = cltrain("verify", "nobody-v0", home)
    assert (unknown.code, "none begins with 'nobody-v0'" in unknown.err) == (3, True), unknown


def test_norms_are_those_that_theory_gives(tiny: Base) -> None:
    """Deltas of orthogonal rank-one parts: Frobenius is the root of the squares, spectral the largest."""
    module = "model.layers.0.self_attn.q_proj"
    weight_NK = tiny.model.get_submodule(module).weight
    length = float(weight_NK.double().norm())

    def adapter(*sizes: float) -> AdapterFile:
        fresh = new_factors(tiny, 2, 6.0, ("q_proj",), seed=0)
        a_RK, b_NR = torch.zeros(2, weight_NK.shape[1]), torch.zeros(weight_NK.shape[0], 2)
        for i, size in enumerate(sizes):
            a_RK[i, 3 + i], b_NR[7 + i, i] = size, 1.0
        return fresh.with_factors({m: (a_RK, b_NR) if m == module else pair for m, pair in fresh.factors.items()})

    rows, _ = load_anchors(tiny, file=None, count=2, max_tokens=8, seed=1, directory=tiny.path / "anchors")
    seen = distances(tiny, adapter(3.0, 4.0), adapter(3.0, 1.0), rows)
    assert seen["drift_frobenius"] == pytest.approx(3 * 5 / length, rel=1e-12)
    assert seen["drift_spectral"] == pytest.approx(3 * 4 / length, rel=1e-12)
    assert seen["step_frobenius"] == seen["step_spectral"] == pytest.approx(3 * 3 / length, rel=1e-12)
    again = distances(tiny, adapter(3.0, 4.0), adapter(3.0, 4.0), rows)
    assert (again["step_frobenius"], again["step_kl"]) == (0.0, 0.0)
    assert again["drift_kl"] == seen["drift_kl"] > 0


def test_kl_is_that_of_plain_float64_models(tiny: Base) -> None:
    rows, _ = load_anchors(tiny, file=None, count=3, max_tokens=16, seed=2, directory=tiny.path / "anchors")
    generator = torch.Generator().manual_seed(3)
    fresh = new_factors(tiny, 4, 8.0, ("q_proj", "down_proj"), seed=1)
    parent, child = (
        fresh.with_factors(
            {m: (a, 0.1 * torch.randn(b.shape, generator=generator)) for m, (a, b) in fresh.factors.items()}
        )
        for _ in range(2)
    )

    def log_probs(adapter: AdapterFile | None) -> torch.Tensor:
        model = load_base(tiny.path).model.double()
        with torch.no_grad():
            for module, (a_RK, b_NR) in adapter.factors.items() if adapter else ():
                model.get_submodule(module).weight += 2.0 * b_NR.double() @ a_RK.double()
            return torch.cat([torch.log_softmax(model(torch.tensor([row.ids])).logits[0, :-1], dim=-1) for row in rows])

    of_base, of_parent, of_child = log_probs(None), log_probs(parent), log_probs(child)
    seen = distances(tiny, child, parent, rows)
    for name, from_ in (("drift_kl", of_base), ("step_kl", of_parent)):
        kl = (from_.exp() * (from_ - of_child)).sum(-1).mean()
        assert seen[name] == pytest.approx(float(kl), rel=1e-6), name


TAMPERED: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "a byte of the weights": (
        lambda r: flip_a_byte(r / "adapter_model.safetensors"), "adapter_model.safetensors", "not the file",
    ),
    "the adapter's config": (
        lambda r: (r / "adapter_config.json").write_text("{}"), "adapter_config.json", "not the file that was sealed",
    ),
    "a smaller step claimed": (
        lambda r: edit_manifest(r, bounds={"step_frobenius": 0.001}), "step_frobenius", "claims 0.001",
    ),
    "a smaller spectral norm claimed": (
        lambda r: edit_manifest(r, bounds={"drift_spectral": 0.001}), "drift_spectral", "claims 0.001",
    ),
    "a smaller KL claimed": (lambda r: edit_manifest(r, bounds={"drift_kl": 0.0}), "drift_kl", "claims 0"),
    "no number claimed": (lambda r: edit_manifest(r, bounds={"step_kl": float("nan")}), "step_kl", "claims nan"),
    "another dtype": (lambda r: edit_manifest(r, dtype="bfloat16"), "step_frobenius", "the files show"),
    "a limit below what is seen": (
        lambda r: edit_manifest(r, bounds={"drift_frobenius_limit": 1e-4}), "drift_frobenius", "beyond the limit",
    ),
    "a day that was too long": (lambda r: edit_manifest(r, bounds={"day_frobenius": 2.0}), "day_frobenius", "beyond"),
    "a day of less than nothing": (
        lambda r: edit_manifest(r, bounds={"day_frobenius": -5.0}), "day_frobenius", "no amount",
    ),
    "a memory planted": (
        lambda r: (r / "memory.safetensors").write_bytes(b"x"), "memory.safetensors", "does not list it",
    ),
    "another name": (lambda r: edit_manifest(r, name="support-v000009-0123456789ab"), "name", "another name"),
    "another number": (lambda r: edit_manifest(r, number=7), "name", "the content is named support-v000007"),
    "another parent": (lambda r: edit_manifest(r, parent_digest="0" * 64), "parent", "another digest"),
    "the parent gone": (lambda r: shutil.rmtree(parent_of(r)), "parent", "--parent names it"),
    "the parent changed": (
        lambda r: flip_a_byte(parent_of(r) / "adapter_config.json"), "parent", "is not the adapter that",
    ),
    "the anchors changed": (
        lambda r: flip_a_byte(next((r.parents[2] / "anchors").iterdir())), "anchors", "not the anchors",
    ),
    "the anchors gone": (lambda r: shutil.rmtree(r.parents[2] / "anchors"), "anchors", "--anchors names it"),
}  # fmt: skip


@pytest.mark.parametrize("what", TAMPERED)
def test_what_was_touched_is_named_with_exit_code_3(what: str, copied: tuple[Path, Path], cltrain: Command) -> None:
    _, release = copied
    tamper, name, said = TAMPERED[what]
    tamper(release)
    done = cltrain("verify", str(release))
    assert done.code == 3, done
    (line,) = [line for line in done.out.splitlines() if line.startswith(f"{name} ")]
    assert "fails" in line
    assert said in line
    assert name in done.out.splitlines()[-1]
    assert "Traceback" not in done.err


def test_weights_that_moved_on_are_caught_also_when_every_hash_was_made_right_again(copied: tuple[Path, Path]) -> None:
    found = certify(remade(copied[1], factor=1.001))
    assert set(found.failed) == set(MEASURED)


def test_another_base_is_named_and_nothing_is_measured_on_it(
    copied: tuple[Path, Path], tiny: Base, cltrain: Command
) -> None:
    done = cltrain("verify", str(copied[0]), f"--base={tiny.path}", "--json")
    assert done.code == 3
    findings = {finding["name"]: finding for finding in done.json["findings"]}
    assert findings["base"]["seen"] == tiny.digest
    assert f"{tiny.path} is another base: --base names the right one" in findings["base"]["says"]
    assert {findings[name]["state"] for name in MEASURED} == {"unchecked"}
    assert {findings[name]["seen"] for name in MEASURED} == {None}


def test_the_base_is_that_of_the_configuration_unless_one_is_named(
    copied: tuple[Path, Path], tiny: Base, tmp_path: Path, cltrain: Command
) -> None:
    (tmp_path / "mine.toml").write_text(f"[base]\npath = '{tiny.path}'\n")
    words = ("verify", str(copied[0]), f"--config={tmp_path / 'mine.toml'}")
    done = cltrain(*words)
    assert done.code == 3
    assert done.out.startswith(f"{copied[0].name} is of another base than the one looked at: name it with --base\n")
    assert cltrain(*words, f"--base={base_path(None)}").code == 0


def test_a_delta_of_no_numbers_is_refused_also_when_every_hash_is_right(
    copied: tuple[Path, Path], cltrain: Command
) -> None:
    made = shutil.copytree(copied[1], copied[1].parent.parent / "made")
    file = made / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "lora_alpha": float("nan")}))
    done = cltrain("verify", str(resealed(copied[1], made, adapter_digest(made))))
    assert (done.code, "the delta is not finite" in done.err) == (3, True), done


def test_parts_that_lie_elsewhere_are_taken_from_where_the_owner_says(
    copied: tuple[Path, Path], tmp_path: Path, cltrain: Command
) -> None:
    first, second = copied
    (pinned,) = (first.parents[2] / "anchors").iterdir()
    alone = shutil.copytree(second, tmp_path / "elsewhere" / second.name)
    parent, anchors = first.rename(tmp_path / "the-parent"), pinned.rename(tmp_path / "pinned.jsonl")
    assert cltrain("verify", str(alone)).code == 3
    assert cltrain("verify", str(alone), f"--parent={parent}", f"--anchors={anchors}").code == 0


def test_the_owners_limits_count_and_not_those_that_the_manifest_states(
    copied: tuple[Path, Path], tmp_path: Path, cltrain: Command
) -> None:
    release, _ = copied
    (tmp_path / "mine.toml").write_text("[bounds]\nstep_frobenius = 1e-4\n")
    done = cltrain("verify", str(release), f"--config={tmp_path / 'mine.toml'}", "--json")
    assert (done.code, done.json["failed"]) == (3, ["step_frobenius"])
    assert cltrain("verify", str(release), "--set=bounds.max_steps=1000").code == 0
    tight = BoundsConfig(max_tokens=1)
    assert verify(release, limits=tight).failed == ("num_tokens",)


def test_a_directory_without_a_whole_manifest_is_no_release(
    copied: tuple[Path, Path], tmp_path: Path, cltrain: Command
) -> None:
    release, _ = copied
    manifest = release / "manifest.json"
    whole = json.loads(manifest.read_text())
    without = {name: value for name, value in whole.items() if name != "anchors"}
    fewer = {name: value for name, value in whole["bounds"].items() if name != "step_kl_limit"}
    for content, said in (
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "not a release's manifest"),
        (json.dumps(without), "anchors: Field required"),
        (json.dumps({**whole, "bounds": fewer}), "does not claim step_kl_limit"),
        (json.dumps({**whole, "parent": "../../anchors"}), "no plain name"),
    ):
        manifest.write_text(content)
        done = cltrain("verify", str(release))
        assert (done.code, said in done.err) == (3, True), done
    done = cltrain("verify", str(tmp_path / "nowhere"), "--json")
    assert (done.code, "give the directory of a release" in done.json["message"]) == (3, True)
