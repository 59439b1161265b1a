"""A release is taken only with a signature by a key that the owner trusts, and only as it was signed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from cltrain.api import Deployment
from cltrain.config import SigningConfig, from_dict, load
from cltrain.errors import ConfigError, DataError
from cltrain.models.signature import check_signature, sign
from cltrain.registry import releases
from cltrain.registry.releases import ensure_base_release, release_dir, seal, verify_release
from cltrain.store.database import open_store
from tests.deployments import base_server, config_for, corrected, record, tickets, worker


def make_key(directory: Path, name: str, kind: type[Any] = Ed25519PrivateKey) -> tuple[Path, Path]:
    """(private, public), in the format of `openssl genpkey` and `openssl pkey -pubout`."""
    private, public = directory / f"{name}.pem", directory / f"{name}.pub"
    key, pem = kind.generate(), serialization.Encoding.PEM
    private.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
    return private, public


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, Path]:
    return {
        f"{name}.{part}": key
        for name in ("own", "other")
        for part, key in zip(("private", "public"), make_key(tmp_path, name), strict=True)
    }


def sealed(tmp_path: Path, key: Path | None) -> Path:
    store = open_store(tmp_path / "state")
    base = ensure_base_release(store, "support", "b" * 64, now=1.0).name
    (made := tmp_path / "made").mkdir()
    (made / "adapter_config.json").write_text("{}")
    (made / "adapter_model.safetensors").write_text("weights")
    release = seal(store, tmp_path / "state", "support", made, base, {"method": "naive"}, now=2.0, key=key)
    assert seal(store, tmp_path / "state", "support", made, base, {}, now=3.0, key=key) == release
    verify_release(tmp_path / "state", release)
    store.close()
    directory = release_dir(tmp_path / "state", release)
    assert directory is not None
    return directory


def test_what_is_sealed_with_a_key_is_trusted_by_its_public_half_alone(tmp_path: Path, keys: dict[str, Path]) -> None:
    directory = sealed(tmp_path, keys["own.private"])
    check_signature(directory, [keys["own.public"]])
    check_signature(directory, [keys["other.public"], keys["own.private"]])
    with pytest.raises(DataError, match="by none of the 1 keys"):
        check_signature(directory, [keys["other.public"]])


def test_a_manifest_that_was_changed_or_never_signed_is_not_trusted(tmp_path: Path, keys: dict[str, Path]) -> None:
    directory = sealed(tmp_path, keys["own.private"])
    directory.chmod(0o755)
    manifest = directory / "manifest.json"
    manifest.chmod(0o644)
    manifest.write_bytes(manifest.read_bytes().replace(b"naive", b"NAIVE"))
    with pytest.raises(DataError, match="by none of"):
        check_signature(directory, [keys["own.public"]])
    (directory / "manifest.sig").unlink()
    with pytest.raises(DataError, match="is not signed"):
        check_signature(directory, [keys["own.public"]])


@pytest.mark.parametrize(
    "content", ["", "no key at all", "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"]
)
def test_a_file_that_is_no_key_is_named(tmp_path: Path, content: str) -> None:
    (file := tmp_path / "key.pem").write_text(content)
    with pytest.raises(ConfigError, match=r"key\.pem.* cannot be read as a PEM key"):
        sign(b"manifest", file)


def test_a_key_of_another_kind_and_a_public_one_do_not_sign(tmp_path: Path, keys: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="is no Ed25519 key"):
        sign(b"manifest", make_key(tmp_path, "x", X25519PrivateKey)[0])
    with pytest.raises(ConfigError, match="is a public key"):
        sign(b"manifest", keys["own.public"])


def test_key_files_are_looked_for_beside_the_configuration(tmp_path: Path, keys: dict[str, Path]) -> None:
    (tmp_path / "own.toml").write_text('[signing]\nkey = "own.pem"\ntrusted = ["other.pub"]\n')
    config = load([tmp_path / "own.toml"])
    assert config.signing.all_trusted == (keys["own.private"], keys["other.public"])
    config.check_files()
    assert from_dict({}).signing.all_trusted == ()
    with pytest.raises(ConfigError, match="no key file"):
        from_dict({"signing": {"trusted": [str(tmp_path / "gone")]}}).check_files()


def test_an_update_is_signed_and_one_that_nobody_trusted_signed_is_never_loaded(
    tmp_path: Path, keys: dict[str, Path]
) -> None:
    with base_server() as url:
        small = {"trainer": {"num_steps": 2, "num_anchors": 4}}
        signing = {"key": str(keys["own.private"])}
        config = config_for(tmp_path / "demo", url, signing=signing, **small)
        deployment = Deployment(config)
        record(deployment.store, config, [corrected(ticket) for ticket in tickets("repair", 24)])
        with worker(config, deployment.store) as learner:
            signed = learner.update()
            assert signed["verdict"] != "error", signed["reasons"]
            released = releases.get(deployment.store, signed["candidate"])
            check_signature(release_dir(config.state_dir, released), [keys["own.public"]])
            careful = SigningConfig(trusted=(keys["other.public"],))
            learner.rooms.config = learner.rooms.evidence.config = config.model_copy(update={"signing": careful})
            record(deployment.store, config, [corrected(ticket) for ticket in tickets("repair", 24, seed=6)])
            unsigned = learner.update()
            assert unsigned["verdict"] == "error"
            assert "is not signed" in unsigned["reasons"][0]
            assert unsigned["candidate"] not in learner.rooms.server.list()
