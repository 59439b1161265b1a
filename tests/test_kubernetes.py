"""The objects say what serves, what must be loaded and what must not, and run cltrain as this machine would."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.command import Command, cltrain, promoted_home

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
    objects = rendered(cltrain, tmp_path / "state", *words)
    assert objects["ConfigMap/support-cltrain"]["data"] == {"0.toml": (tmp_path / "own.toml").read_text()}
    pod = objects["StatefulSet/support-cltrain"]["spec"]
    gateway, worker = pod["template"]["spec"]["containers"]
    assert (gateway["name"], worker["name"], pod["replicas"]) == ("gateway", "worker", 1)
    for container in (gateway, worker):
        assert container["command"][:4] == ["cltrain", "run", "--only", container["name"]]
        assert {"--config=/etc/cltrain/0.toml", "--set=home=/var/lib/cltrain"} <= set(container["command"])
        assert not any(str(tmp_path) in word for word in container["command"])
    assert pod["volumeClaimTemplates"][0]["spec"]["resources"]["requests"]["storage"] == "5Gi"
    (port,) = objects["Service/support-cltrain"]["spec"]["ports"]
    assert port["port"] == gateway["ports"][0]["containerPort"] == 8100


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
