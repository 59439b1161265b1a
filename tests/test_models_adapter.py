"""Bases and adapters on disk: what is read, what is refused, and that PEFT reads what we write."""

import json
import shutil
import subprocess
import sys

import pytest
import torch

from cltrain.errors import ConfigError, ConflictError, DataError
from cltrain.models.adapter import (
    AdapterFile,
    attach,
    new_factors,
    parameters_of,
    read_adapter,
    set_factors,
    write_adapter,
)
from cltrain.models.base import load_base, read_config
from cltrain.models.digest import adapter_digest, base_digest
from cltrain.models.forward import next_log_probs
from cltrain.models.shapes import FAMILIES, expected_shapes, module_shapes
from cltrain.records import TokenRow
from tests.tiny import make_tiny_base

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ROW = TokenRow("r", "s", "p", tuple(range(3, 43)), (0.0,) + (1.0,) * 39)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return make_tiny_base(tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture(scope="module")
def base(directory):
    return load_base(directory)


def moved(adapter: AdapterFile, seed: int, size: float = 0.05) -> AdapterFile:
    generator = torch.Generator().manual_seed(seed)
    noise = lambda t: t + size * torch.randn(t.shape, generator=generator)  # noqa: E731
    return adapter.with_factors({m: (noise(a), noise(b)) for m, (a, b) in adapter.factors.items()})


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_loads_and_its_config_alone_gives_the_shapes(tmp_path, family):
    base = load_base(make_tiny_base(tmp_path / family, family))
    shapes = module_shapes(read_config(base.path), TARGETS)
    real = {m: tuple(base.model.get_submodule(m).weight.shape) for m in shapes}
    assert shapes == real
    adapter = moved(new_factors(base, 4, 8.0, TARGETS, seed=1), 2)
    write_adapter(tmp_path / "adapter", adapter)
    from safetensors import safe_open

    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", framework="pt") as file:
        written = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert written == expected_shapes(read_config(base.path), TARGETS, 4)


def test_the_attached_model_is_the_base_plus_scaled_factors(base):
    adapter = moved(new_factors(base, 4, 8.0, TARGETS, seed=1), 2)
    merged = load_base(base.path).model
    with torch.no_grad():
        for module, (a_RK, b_NR) in adapter.factors.items():
            merged.get_submodule(module).weight += adapter.alpha / adapter.rank * b_NR @ a_RK
    ids = torch.tensor([ROW.ids])
    expected = torch.log_softmax(merged(input_ids=ids).logits[0, :-1], -1)
    actual = next_log_probs(base, attach(base, adapter), [ROW])
    torch.testing.assert_close(actual, expected, atol=2e-4, rtol=2e-4)


def test_a_new_adapter_changes_nothing_and_is_the_same_for_the_same_seed(base):
    fresh = new_factors(base, 4, 8.0, TARGETS, seed=1)
    assert torch.equal(next_log_probs(base, attach(base, fresh), [ROW]), next_log_probs(base, base.model, [ROW]))
    again, other = new_factors(base, 4, 8.0, TARGETS[::-1], seed=1), new_factors(base, 4, 8.0, TARGETS, seed=2)
    module = next(iter(fresh.factors))
    assert torch.equal(fresh.factors[module][0], again.factors[module][0])
    assert not torch.equal(fresh.factors[module][0], other.factors[module][0])


def test_attached_models_share_the_frozen_base_and_nothing_else(base):
    before = next_log_probs(base, base.model, [ROW])
    adapter = new_factors(base, 4, 8.0, TARGETS, seed=1)
    one, two = attach(base, adapter), attach(base, adapter)
    set_factors(parameters_of(one, adapter), moved(adapter, 3).factors)
    assert torch.equal(next_log_probs(base, base.model, [ROW]), before)
    assert torch.equal(next_log_probs(base, two, [ROW]), before)
    assert not torch.equal(next_log_probs(base, one, [ROW]), before)
    frozen = {id(p) for p in base.model.parameters()}
    assert {id(p) for p in one.parameters() if not p.requires_grad} == frozen
    trainable = {id(p) for p in one.parameters() if p.requires_grad}
    assert trainable == {id(p) for pair in parameters_of(one, adapter).values() for p in pair}


def test_attaching_leaves_the_global_random_state_alone(base):
    state = torch.random.get_rng_state()
    attach(base, new_factors(base, 4, 8.0, TARGETS, seed=1))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_what_is_written_is_read_back_and_peft_reads_the_same(base, tmp_path):
    from peft import PeftModel

    adapter = moved(new_factors(base, 4, 6.0, TARGETS, seed=1), 2)
    digest = write_adapter(tmp_path / "a", adapter)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"], "nothing temporary is left"
    again = read_adapter(tmp_path / "a")
    assert (again.rank, again.alpha, again.targets) == (4, 6.0, tuple(sorted(TARGETS)))
    assert again.base_digest == base.digest == base_digest(base.path)
    assert list(again.factors) == list(adapter.factors)
    assert all(torch.equal(again.factors[m][i], adapter.factors[m][i]) for m in adapter.factors for i in (0, 1))
    theirs = PeftModel.from_pretrained(load_base(base.path).model, tmp_path / "a").eval()
    torch.testing.assert_close(
        next_log_probs(base, theirs, [ROW]), next_log_probs(base, attach(base, adapter), [ROW]), atol=1e-6, rtol=1e-6
    )
    assert write_adapter(tmp_path / "a", adapter) == digest == adapter_digest(tmp_path / "a")
    with pytest.raises(ConflictError):
        write_adapter(tmp_path / "a", moved(adapter, 5))


def test_the_bytes_are_the_same_in_another_process(base, tmp_path):
    adapter = new_factors(base, 4, 6.0, TARGETS, seed=1)
    digest = write_adapter(tmp_path / "a", adapter)
    program = (
        "import sys, pathlib; from cltrain.models.base import load_base; "
        "from cltrain.models.adapter import new_factors, write_adapter; base = load_base(pathlib.Path(sys.argv[1]));"
        "print(write_adapter(pathlib.Path(sys.argv[2]), new_factors(base, 4, 6.0, sys.argv[3:], seed=1)))"
    )
    out = subprocess.run(
        [sys.executable, "-c", program, base.path, tmp_path / "b", *TARGETS], capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == digest


def test_damaged_adapters_are_refused(base, tmp_path):
    from safetensors.torch import load_file, save_file

    good = tmp_path / "good"
    write_adapter(good, moved(new_factors(base, 4, 8.0, TARGETS, seed=1), 2))

    def broken(name, change):
        directory = shutil.copytree(good, tmp_path / name)
        change(directory)
        return directory

    def edit(key, value):
        def change(directory):
            file = directory / "adapter_config.json"
            file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))

        return change

    def edit_tensors(function):
        def change(directory):
            file = directory / "adapter_model.safetensors"
            tensors = load_file(file)
            function(tensors)
            save_file(tensors, file)

        return change

    first = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    cases = {
        "pickle": (lambda d: (d / "adapter_model.bin").write_bytes(b"x"), "pickle"),
        "missing": (lambda d: (d / "adapter_model.safetensors").unlink(), "missing"),
        "truncated": (lambda d: (d / "adapter_model.safetensors").write_bytes(b"\x08"), "safetensors"),
        "nan": (edit_tensors(lambda t: t[first].view(-1)[3:4].fill_(float("nan"))), "NaN"),
        "unpaired": (edit_tensors(lambda t: t.pop(first)), "pairs"),
        "rank": (edit("r", 5), "rank is 5"),
        "dora": (edit("use_dora", True), "use_dora"),
        "alpha_pattern": (edit("alpha_pattern", {"q_proj": 99}), "alpha_pattern"),
        "no_config": (lambda d: (d / "adapter_config.json").write_text("{"), "not a LoRA config"),
    }
    for name, (change, reason) in cases.items():
        with pytest.raises(DataError, match=reason):
            read_adapter(broken(name, change))


def test_nan_is_never_written(base, tmp_path):
    adapter = new_factors(base, 4, 8.0, TARGETS, seed=1)
    next(iter(adapter.factors.values()))[1][0, 0] = float("nan")
    with pytest.raises(DataError, match="NaN"):
        write_adapter(tmp_path / "a", adapter)
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_for_another_base_is_refused(base, tmp_path):
    other = load_base(make_tiny_base(tmp_path / "other", seed=1))
    with pytest.raises(DataError, match="another base"):
        attach(base, new_factors(other, 4, 8.0, TARGETS, seed=1))


def test_an_unknown_target_is_named(base):
    with pytest.raises(ConfigError, match="c_attn"):
        new_factors(base, 4, 8.0, ["q_proj", "c_attn"], seed=1)


def test_unusable_bases_are_refused(directory, tmp_path):
    with pytest.raises(DataError, match="not a model directory"):
        load_base(tmp_path)
    pickled = shutil.copytree(directory, tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(DataError, match="pickle"):
        load_base(pickled)
    foreign = shutil.copytree(directory, tmp_path / "foreign")
    (foreign / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(DataError, match="gpt2"):
        load_base(foreign)
    cut = shutil.copytree(directory, tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(DataError, match="cannot be loaded"):
        load_base(cut)
    with pytest.raises(ConfigError, match=r"base\.context"):
        load_base(directory, context=100_000)


def test_a_base_with_changed_weights_or_config_has_another_digest(directory, tmp_path):
    copy = shutil.copytree(directory, tmp_path / "copy")
    assert base_digest(copy) == base_digest(directory)
    (copy / "config.json").write_text((copy / "config.json").read_text() + " ")
    assert base_digest(copy) != base_digest(directory)
    assert base_digest(make_tiny_base(tmp_path / "other", seed=1)) != base_digest(directory)


def test_naming_and_checking_adapters_needs_no_torch():
    names = ", ".join(f"cltrain.models.{name}" for name in ("digest", "shapes", "toolcalls"))
    subprocess.run([sys.executable, "-c", f"import sys, {names}; assert 'torch' not in sys.modules"], check=True)
