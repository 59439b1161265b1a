"""Every broken adapter is refused before a server hears of it, and without torch."""

import hashlib
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from cltrain.deploy.preflight import check_adapter
from cltrain.errors import DataError
from cltrain.models.base import load_base
from tests.serving import random_adapter
from tests.tiny import make_tiny_base

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return load_base(make_tiny_base(tmp_path_factory.mktemp("base")))


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    return random_adapter(base, tmp_path_factory.mktemp("adapter") / "a", 1, rank=4)


@pytest.fixture
def adapter(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "copy")


def with_config(adapter, **change):
    config = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps({**config, **change}))


def with_tensors(adapter, change):
    tensors = load_file(adapter / WEIGHTS)
    first = sorted(tensors)[0]
    change(tensors, first)
    save_file(tensors, adapter / WEIGHTS)


def with_manifest(adapter, spoil=False, **said):
    files = {name: hashlib.sha256((adapter / name).read_bytes()).hexdigest() for name in (CONFIG, WEIGHTS)}
    if spoil:
        files[WEIGHTS] = "0" * 64
    (adapter / "manifest.json").write_text(json.dumps({"files": files, **said}))


def put(value):
    def change(tensors, first):
        tensors[first] = tensors[first].copy()
        tensors[first].flat[-1] = value

    return change


DAMAGE = {
    "lacks adapter_config.json": lambda a: (a / CONFIG).unlink(),
    "lacks adapter_model.safetensors": lambda a: (a / WEIGHTS).unlink(),
    "pickle": lambda a: (a / "adapter_model.bin").write_bytes(b"x"),
    "no adapter needs": lambda a: (a / "README.md").write_text("hello"),
    "not a plain file": lambda a: ((a / WEIGHTS).rename(a.parent / "w"), (a / WEIGHTS).symlink_to(a.parent / "w")),
    "cannot be read as JSON": lambda a: (a / CONFIG).write_text("{"),
    "only LORA": lambda a: with_config(a, peft_type="LOHA"),
    "uses use_dora": lambda a: with_config(a, use_dora=True),
    "uses bias": lambda a: with_config(a, bias="all"),
    "uses modules_to_save": lambda a: with_config(a, modules_to_save=["lm_head"]),
    "rank 1024; no server takes more than 512": lambda a: with_config(a, r=1024),
    "has shape": lambda a: with_config(a, r=2),
    "cannot be adapted": lambda a: with_config(a, target_modules=["lm_head"]),
    "no place for": lambda a: with_config(a, target_modules=["q_proj"]),
    "lora_alpha": lambda a: with_config(a, lora_alpha=0),
    "lacks 1 of 28 tensors": lambda a: with_tensors(a, lambda t, first: t.pop(first)),
    "NaN": lambda a: with_tensors(a, put(np.nan)),
    "infinite": lambda a: with_tensors(a, put(-np.inf)),
    "is F64": lambda a: with_tensors(a, lambda t, first: t.update({first: t[first].astype(np.float64)})),
    "truncated": lambda a: (a / WEIGHTS).write_bytes((a / WEIGHTS).read_bytes()[:-4]),
    "not a safetensors file": lambda a: (a / WEIGHTS).write_bytes(b""),
    "not the file that was sealed": lambda a: with_manifest(a, spoil=True),
    "does not name the sha256": lambda a: (a / "manifest.json").write_text("{}"),
}


def test_whole_adapters_pass(base, adapter):
    check_adapter(adapter, base_dir=base.path, base_digest=base.digest)
    with_manifest(adapter)
    check_adapter(adapter, base_dir=base.path)
    with_tensors(adapter, lambda tensors, first: None)  # and the metadata is gone
    with_manifest(adapter, base=base.digest)
    check_adapter(adapter, base_dir=base.path)


@pytest.mark.parametrize("words", DAMAGE)
def test_a_damaged_adapter_is_refused_and_named(base, adapter, words):
    DAMAGE[words](adapter)
    with pytest.raises(DataError, match=words) as caught:
        check_adapter(adapter, base_dir=base.path, base_digest=base.digest)
    assert str(adapter) in str(caught.value)


def test_another_base_is_refused_whether_file_or_manifest_names_it(base, adapter, tmp_path):
    other = make_tiny_base(tmp_path / "other", seed=1)
    with pytest.raises(DataError, match="trained on base"):
        check_adapter(adapter, base_dir=other)
    with_manifest(adapter, base="c" * 64)
    with pytest.raises(DataError, match="trained on base c"):
        check_adapter(adapter, base_dir=base.path)
    with_tensors(adapter, lambda tensors, first: None)  # the metadata is gone
    for said, named in (({"base": "c" * 64}, "cccccccccccc"), ({}, "that it does not name")):
        with_manifest(adapter, **said)
        with pytest.raises(DataError, match=f"trained on base {named}"):
            check_adapter(adapter, base_dir=base.path)
    with pytest.raises(DataError, match="not an adapter directory"):
        check_adapter(tmp_path / "nowhere", base_dir=base.path)


def test_client_preflight_proof_and_residents_import_no_torch():
    names = ", ".join(f"cltrain.deploy.{name}" for name in ("client", "preflight", "proof", "residents", "protocol"))
    code = f"import {names}, sys; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
