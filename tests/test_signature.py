"""A release is taken only with a signature by a key that the owner trusts, and only as it was signed."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any, cast

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from cltrain import tending
from cltrain.api import Deployment
from cltrain.config import SigningConfig, from_dict, load
from cltrain.deploy import residents
from cltrain.deploy.client import ServerClient
from cltrain.deploy.replicas import Replicas
from cltrain.deploy.trust import bar_untrusted
from cltrain.errors import ConfigError, DataError
from cltrain.kubernetes import Cluster, manifests
from cltrain.loading import load_and_prove
from cltrain.models.base import load_base
from cltrain.models.signature import NotSignedError, check_signature, sign
from cltrain.registry import releases
from cltrain.registry.aliases import move_alias, read_alias
from cltrain.registry.releases import ensure_base_release, release_dir, seal, verify_release
from cltrain.rooms import Rooms, tidy_server
from cltrain.store.database import Store, open_store
from tests.command import free_port
from tests.deployments import base_server, config_for, corrected, record, tickets, worker
from tests.fleet_parts import Shelf
from tests.serving import random_adapter


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


def test_a_signature_covers_every_file_and_the_name(tmp_path: Path, keys: dict[str, Path]) -> None:
    directory = sealed(tmp_path, keys["own.private"])
    other = directory.with_name("support-v000009-000000000000")
    shutil.copytree(directory, other)
    with pytest.raises(DataError, match=f"was sealed as {directory.name}"):
        check_signature(other, [keys["own.public"]])
    weights = directory / "adapter_model.safetensors"
    weights.chmod(0o644)
    weights.write_text("WEIGHTS")
    with pytest.raises(DataError, match="is not the file that was sealed"):
        check_signature(directory, [keys["own.public"]])
    directory.chmod(0o755)
    weights.unlink()
    with pytest.raises(DataError, match="does not name the sha256 of every adapter file"):
        check_signature(directory, [keys["own.public"]])


def test_what_lost_its_manifest_is_worse_than_what_was_never_signed(tmp_path: Path, keys: dict[str, Path]) -> None:
    directory = sealed(tmp_path, None)
    with pytest.raises(NotSignedError, match=r"has no manifest\.sig"):
        check_signature(directory, [keys["own.public"]])
    directory.chmod(0o755)
    (directory / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"has no manifest\.json") as found:
        check_signature(directory, [keys["own.public"]])
    assert not isinstance(found.value, NotSignedError)


def served(store: Store, home: Path, seed: int, key: Path | None) -> tuple[str, Path]:
    """A release that serves from now on: (name, directory)."""
    serving = read_alias(store, "support")
    made = random_adapter(load_base(None), home / f"made-{seed}", seed)
    release = seal(store, home, "support", made, serving.release, {}, now=2.0, key=key)
    move_alias(store, "support", expected=serving, to=release.name, fence=None, now=3.0 + seed, is_human=True)
    directory = release_dir(home, release)
    assert directory is not None
    return release.name, directory


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = open_store(tmp_path / "state")
    ensure_base_release(store, "support", load_base(None).digest, now=1.0)
    return store


def test_what_no_trusted_key_signed_is_not_loaded_and_where_it_is_it_stays(
    store: Store, tmp_path: Path, keys: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    home, now = tmp_path / "state", [1e6]
    signed, _ = served(store, home, 1, keys["own.private"])
    unsigned, directory = served(store, home, 2, None)
    shelves = [Shelf("http://a"), Shelf("http://b")]
    servers = Replicas(store, shelves, clock=lambda: now[0])
    config = from_dict({"home": str(home), "signing": {"trusted": [str(keys["own.public"])]}})
    nothing: Any = None
    rooms = Rooms(
        config, store, nothing, servers, nothing, b"", (), "", (), nothing, 0, clock=lambda: now[0]
    )  # fmt: skip
    shelves[1].held[unsigned] = str(directory)  # from before there was a key
    for _ in range(3):
        tidy_server(rooms)
        tending.tend(rooms)
        now[0] += 1000.0
    assert [set(shelf.held) for shelf in shelves] == [{signed}, {signed, unsigned}]
    said = [line.getMessage() for line in caplog.records if "is not loaded" in line.getMessage()]
    assert said == [f"{unsigned} is not loaded: {directory} is not signed: it has no manifest.sig"]
    assert not tending.make_missing_probes(rooms), "nothing is measured on it either"
    directory.chmod(0o755)
    (directory / "manifest.sig").write_bytes(sign((directory / "manifest.json").read_bytes(), keys["own.private"]))
    tending.tend(rooms)
    assert [set(shelf.held) for shelf in shelves] == [{signed, unsigned}] * 2
    shelves[0].restart()
    (directory / "adapter_model.safetensors").chmod(0o644)
    (directory / "adapter_model.safetensors").write_bytes(b"others")
    tending.tend(rooms)
    assert [set(shelf.held) for shelf in shelves] == [{signed}, {signed, unsigned}]


def test_a_replica_is_ready_without_what_no_trusted_key_signed(
    store: Store, tmp_path: Path, keys: dict[str, Path]
) -> None:
    before, _ = served(store, tmp_path / "state", 1, None)
    serving, _ = served(store, tmp_path / "state", 2, keys["own.private"])
    with store.read() as connection:
        wanted = residents.desired(connection, tmp_path / "state", "support")
    assert wanted.needed == {serving, before}
    assert bar_untrusted(wanted, ()) == wanted, "sealed it is"
    found = bar_untrusted(wanted, [keys["own.public"]])
    assert (found.needed, found.barred, set(found.loadable)) == ({serving}, {before}, {serving})
    config = from_dict({"home": str(tmp_path / "state"), "signing": {"trusted": [str(keys["own.public"])]}})
    synced = json.loads(manifests(config, store, (), Cluster("pool"))[0]["data"]["configmap.yaml"])["vLLMLoRAConfig"]
    assert [model["id"] for model in synced["ensureExist"]["models"]] == [serving]
    assert synced["ensureNotExist"]["models"] == [], "where it is it stays"
    gone = bar_untrusted(wanted, [tmp_path / "no.pem"])
    assert set(gone.loadable) == set(), "a key that cannot be read lets nothing in"


def test_what_was_changed_on_disk_is_not_loaded_again_without_any_key(store: Store, tmp_path: Path) -> None:
    home = tmp_path / "state"
    serving, directory = served(store, home, 1, None)
    shelf = Shelf("http://a")
    config, nothing = from_dict({"home": str(home)}), cast(Any, None)
    servers = Replicas(store, [shelf])
    rooms = Rooms(config, store, nothing, servers, nothing, b"", (), "", (), nothing, 0)
    tending.tend(rooms)
    assert set(shelf.held) == {serving}
    weights = directory / "adapter_model.safetensors"
    was = weights.read_bytes()
    weights.chmod(0o644)
    weights.write_bytes(was[:-1] + bytes([was[-1] ^ 1]))
    shelf.restart()
    tending.tend(rooms)
    with pytest.raises(DataError, match="is not the file that was sealed"):
        load_and_prove(config, store, serving, directory)
    assert set(shelf.held) == set()
    weights.write_bytes(was)
    tending.tend(rooms)
    assert set(shelf.held) == {serving}


def test_the_embedded_server_loads_no_unsigned_release_and_a_rollback_to_one_is_done_all_the_same(
    store: Store, tmp_path: Path, keys: dict[str, Path]
) -> None:
    home = tmp_path / "state"
    first, _ = served(store, home, 1, None)
    second, directory = served(store, home, 2, keys["own.private"])
    words = [f"--set=home={home}", f"--set=server.port={free_port()}", f"--set=signing.key={keys['own.private']}"]
    deployment = Deployment.open(words)
    with (
        deployment._own_server(lambda line: None),
        ServerClient(deployment.config.server.replicas[0], "base") as server,
    ):
        assert server.list() == {second: str(directory)}
        done = deployment.rollback()
        assert done["release"] == first
        assert server.list() == {second: str(directory)}
    assert read_alias(store, "support").release == first


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
            assert unsigned["candidate"] not in {name for _, name, _ in learner.rooms.server.listings()}


def test_without_the_package_it_is_said_what_to_install(
    tmp_path: Path, keys: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("cryptography")]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=r"cltrain\[sign\]"):
        check_signature(tmp_path, [keys["own.public"]])


def test_the_doctor_finds_what_serves_unsigned_though_a_key_is_asked_for(
    store: Store, tmp_path: Path, keys: dict[str, Path]
) -> None:
    home = tmp_path / "state"
    asked_for = from_dict({"home": str(home), "signing": {"trusted": [str(keys["own.public"])]}})

    def said(config: Any) -> tuple[str, str]:
        (found,) = [(f["state"], f["detail"]) for f in Deployment(config).doctor() if f["what"] == "signing"]
        return found

    assert said(asked_for) == ("good", "nothing serves but the bare base, which needs no signature")
    name, directory = served(store, home, 1, None)
    assert said(from_dict({"home": str(home)}))[0] == "good"  # nothing is asked for
    state, detail = said(asked_for)
    assert (state, name in detail, "is not signed" in detail) == ("bad", True, True)
    directory.chmod(0o755)
    signature = sign((directory / "manifest.json").read_bytes(), keys["own.private"])
    (directory / "manifest.sig").write_bytes(signature)
    assert said(asked_for) == (
        "good",
        f"what serves, and what a rollback would go to, is signed by a trusted key ({name})",
    )
    other = from_dict({"home": str(home), "signing": {"trusted": [str(keys["other.public"])]}})
    assert said(other)[0] == "bad"
