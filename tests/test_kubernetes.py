"""The objects say what serves, what must be loaded and what must not, and run cltrain as this machine would."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from cltrain.errors import ConflictError
from cltrain.gateway.guard import check_may_listen
from cltrain.gateway.keys import FILE, add_key, read_keys
from cltrain.kubernetes import Cluster, manifests
from tests.command import Command, cltrain, promoted_home
from tests.rollout_parts import trial

__all__ = ["cltrain"]  # a fixture


def rendered(cltrain: Command, home: Path, *words: str) -> dict[str, dict[str, Any]]:
    done = cltrain("kubernetes", f"--home={home}", "--pool=llama", *words)
    assert done.code == 0, done
    listed = json.loads(done.out)
    assert (listed["apiVersion"], listed["kind"]) == ("v1", "List")
    assert all(one["metadata"]["namespace"] for one in listed["items"])
    return {f"{one['kind']}/{one['metadata']['name']}": one for one in listed["items"]}


def syncer(objects: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return yaml.safe_load(objects["ConfigMap/support-adapters"]["data"]["configmap.yaml"])["vLLMLoRAConfig"]


def test_the_alias_goes_to_what_serves_which_is_loaded_by_its_own_name(cltrain: Command, tmp_path: Path) -> None:
    _, release = promoted_home(tmp_path)
    objects = rendered(cltrain, tmp_path, "--adapters=/shared", "--namespace=agents")
    assert objects.keys() == {"ConfigMap/support-adapters", "InferenceModelRewrite/support"}
    rewrite = objects["InferenceModelRewrite/support"]
    assert rewrite["apiVersion"] == "inference.networking.x-k8s.io/v1alpha2"
    assert rewrite["metadata"]["namespace"] == "agents"
    assert rewrite["spec"]["poolRef"]["name"] == "llama"
    (rule,) = rewrite["spec"]["rules"]
    assert rule["matches"] == [{"model": {"type": "Exact", "value": "support"}}]
    assert rule["targets"] == [{"modelRewrite": release, "weight": 1}]
    assert syncer(objects)["ensureExist"]["models"] == [
        {"id": release, "source": f"/shared/releases/support/{release}"}
    ]
    assert syncer(objects)["ensureNotExist"]["models"] == []


def test_after_a_rollback_the_base_answers_and_what_was_rolled_back_goes(cltrain: Command, tmp_path: Path) -> None:
    _, release = promoted_home(tmp_path)
    assert cltrain("rollback", f"--home={tmp_path}").code == 0
    objects = rendered(cltrain, tmp_path, "--set=server.model=llama-8b")
    (rule,) = objects["InferenceModelRewrite/support"]["spec"]["rules"]
    assert rule["targets"][0]["modelRewrite"] == "llama-8b"
    assert syncer(objects)["defaultBaseModel"] == "llama-8b"
    assert syncer(objects)["ensureExist"]["models"] == []
    (gone,) = syncer(objects)["ensureNotExist"]["models"]
    assert gone == {"id": release, "source": str((tmp_path / "releases" / "support" / release).resolve())}


def test_what_was_rejected_must_not_be_loaded(cltrain: Command, tmp_path: Path) -> None:
    from cltrain.registry import releases
    from cltrain.store.database import open_store

    _, release = promoted_home(tmp_path)
    (tmp_path / "made" / "adapter_model.safetensors").write_text("others")
    store = open_store(tmp_path)
    bad = releases.seal(store, tmp_path, "support", tmp_path / "made", release, {}, now=4.0).name
    releases.set_status(store, bad, "rejected", now=5.0)
    store.close()
    listed = syncer(rendered(cltrain, tmp_path))
    assert [one["id"] for one in listed["ensureExist"]["models"]] == [release]
    assert [one["id"] for one in listed["ensureNotExist"]["models"]] == [bad]


def test_with_an_image_one_pod_runs_gateway_and_worker_on_one_volume(cltrain: Command, tmp_path: Path) -> None:
    promoted_home(tmp_path / "state")
    (tmp_path / "own.toml").write_text('[server]\nkind = "vllm"\nurl = "http://llama:8000"\nmodel = "llama-8b"\n')
    words = [f"--config={tmp_path / 'own.toml'}", "--image=registry.example/cltrain:1", "--storage=5Gi"]
    done = cltrain("kubernetes", f"--home={tmp_path / 'state'}", "--pool=llama", *words)
    assert (done.code, "so would not start: make one here first" in done.err) == (2, True), done
    add_key(tmp_path / "state", "anna", ["infer"], now=1.0)
    objects = rendered(cltrain, tmp_path / "state", *words)
    assert objects["ConfigMap/support-cltrain"]["data"] == {"0.toml": (tmp_path / "own.toml").read_text()}
    pod = objects["StatefulSet/support-cltrain"]["spec"]
    gateway, worker = pod["template"]["spec"]["containers"]
    assert (gateway["name"], worker["name"], pod["replicas"]) == ("gateway", "worker", 1)
    for container in (gateway, worker):
        assert container["command"][:4] == ["cltrain", "run", "--only", container["name"]]
        assert {"--config=/etc/cltrain/0.toml", "--set=home=/var/lib/cltrain"} <= set(container["command"])
        assert not any(str(tmp_path) in word for word in container["command"])
    (first,) = pod["template"]["spec"]["initContainers"]
    kept, volume = tmp_path / "keys", tmp_path / "volume"
    kept.mkdir()
    volume.mkdir()
    (kept / FILE).write_text(objects["Secret/support-cltrain-keys"]["stringData"][FILE])
    places = {"/etc/cltrain-keys": str(kept), "/var/lib/cltrain": str(volume)}
    command = [re.sub("|".join(places), lambda found: places[found[0]], word) for word in first["command"]]
    subprocess.run(command, check=True)
    check_may_listen("0.0.0.0", volume)  # the gateway starts on what was an empty volume
    assert (volume / FILE).stat().st_mode & 0o077 == 0
    add_key(volume, "ben", ["infer"], now=2.0)
    subprocess.run(command, check=True)
    assert [key.principal for key in read_keys(volume)] == ["anna", "ben"], "the volume's own keys stay"
    assert pod["volumeClaimTemplates"][0]["spec"]["resources"]["requests"]["storage"] == "5Gi"
    (port,) = objects["Service/support-cltrain"]["spec"]["ports"]
    assert port["port"] == gateway["ports"][0]["containerPort"] == 8100


def test_files_that_the_configuration_names_must_be_mounted_and_it_says_which(cltrain: Command, tmp_path: Path) -> None:
    promoted_home(tmp_path / "state")
    add_key(tmp_path / "state", "anna", ["infer"], now=1.0)
    (tmp_path / "own.toml").write_text(
        '[base]\npath = "/m/base"\n[[gate.suites]]\nname = "own"\npath = "/m/own.jsonl"\n'
    )
    words = [f"--config={tmp_path / 'own.toml'}", "--image=i", "--set=experience.rehearsal=/m/always.jsonl"]
    done = cltrain("kubernetes", f"--home={tmp_path / 'state'}", "--pool=llama", *words)
    note = json.loads(done.out)["items"][-2]["metadata"]["annotations"]["cltrain/mount"]
    for setting in ("base.path = /m/base", "gate.suites.path = /m/own.jsonl", "experience.rehearsal = /m/always.jsonl"):
        assert setting in note
    assert note in done.err
    assert str(tmp_path) not in note, "the state has a volume"


def test_no_objects_while_a_canary_has_its_share_of_the_episodes(tmp_path: Path) -> None:
    for kind, shown in (("canary", None), ("shadow", 2)):
        with trial(tmp_path / kind, kind=kind) as made:
            made.start()
            if shown is None:
                with pytest.raises(ConflictError, match=r"tried as canary at 0\.5"):
                    manifests(made.rooms.config, made.store, (), Cluster("pool"))
            else:
                assert len(manifests(made.rooms.config, made.store, (), Cluster("pool"))) == shown


@pytest.mark.parametrize("words", [["--namespace=Upper", "--pool=llama"], ["--pool=a b"]])
def test_a_name_that_kubernetes_would_not_take_is_said(cltrain: Command, tmp_path: Path, words: list[str]) -> None:
    promoted_home(tmp_path)
    done = cltrain("kubernetes", f"--home={tmp_path}", *words)
    assert (done.code, "no name of Kubernetes" in done.err) == (2, True), done


def test_no_objects_for_sglang_which_would_answer_with_the_base(cltrain: Command, tmp_path: Path) -> None:
    promoted_home(tmp_path)
    words = ["--set=server.kind=sglang", "--set=server.url=http://127.0.0.1:9"]
    done = cltrain("kubernetes", f"--home={tmp_path}", "--pool=llama", *words)
    assert (done.code, "these objects are for vLLM" in done.err) == (2, True), done
