"""What serves, as Kubernetes objects, for whoever lets a cluster reconcile it. They are printed, not applied.

Two objects of the Gateway API Inference Extension: the ConfigMap that its LoRA syncer reads beside every vLLM server
(which adapters must be loaded, which must not) and an InferenceModelRewrite (v1alpha2) that sends the agent's alias to
the release that serves. With an image also the plain ones that run cltrain itself. A cluster knows no proof: apply the
ConfigMap first, and the rewrite when every server lists the release (`cltrain doctor`). It knows no episodes either:
what is tried on a share of them is not rendered.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cltrain import launch
from cltrain.config import Config
from cltrain.deploy import residents
from cltrain.deploy.trust import bar_untrusted
from cltrain.errors import ConfigError, ConflictError
from cltrain.gateway import keys
from cltrain.registry import aliases, releases, rollouts
from cltrain.store.database import Store

Manifest = dict[str, Any]

GROUP = "inference.networking.x-k8s.io"
STATE_DIR, CONFIG_DIR, KEYS_DIR = "/var/lib/cltrain", "/etc/cltrain", "/etc/cltrain-keys"
MOUNT = "cltrain/mount"  # the annotation that says which files the pod needs beside its configuration
NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,51}[a-z0-9])?")  # what Kubernetes takes for a name, with room for a suffix
PROBE_S = 10


@dataclass(frozen=True, slots=True)
class Cluster:
    """What the objects must name. `adapters`: where the state directory is mounted in the pods of the servers."""

    pool: str  # the InferencePool of the servers
    namespace: str = "default"
    adapters: Path | None = None
    image: str | None = None  # of cltrain; None leaves the plain objects out
    storage: str = "10Gi"


def manifests(config: Config, store: Store, arguments: Sequence[str], cluster: Cluster) -> list[Manifest]:
    """The objects for what serves now. Raises ConfigError for a name that Kubernetes would not take, for SGLang, and
    for a pod whose gateway would have no key; ConflictError while a canary has a share of the episodes."""
    if config.server.kind == "sglang":
        raise ConfigError(
            "these objects are for vLLM: SGLang answers the bare name of a release with the base "
            "(server.kind = 'sglang'), and the rewrite would send it just that"
        )
    for what, name in (("--pool", cluster.pool), ("--namespace", cluster.namespace)):
        if NAME.fullmatch(name) is None:
            raise ConfigError(f"{what} {name!r} is no name of Kubernetes: a-z, 0-9 and -, 53 letters at most")
    tried = rollouts.read_open(store, config.agent.name)
    if tried is not None and tried.kind == "canary":
        raise ConflictError(
            f"{tried.release} is tried as canary at {tried.weight:g} of the traffic, and a rewrite would change "
            "adapters in the middle of an episode: print them when it serves, or take it back first (cltrain rollback)"
        )
    objects = [_syncer(config, store, cluster), _rewrite(config, store, cluster)]
    return objects + (_plain(config, arguments, cluster, cluster.image) if cluster.image else [])


def _syncer(config: Config, store: Store, cluster: Cluster) -> Manifest:
    """Loaded must be what serves, what a rollback needs and what open episodes are pinned to; not what was rejected."""
    agent, state = config.agent.name, config.state_dir.resolve()
    with store.read() as connection:
        wanted = residents.desired(connection, config.state_dir, agent)
    loadable = bar_untrusted(wanted, config.signing.all_trusted).loadable
    known = [release for release in releases.list_releases(store, agent) if release.path]
    gone = [r for r in known if r.name not in wanted.directories and r.status != "deleted"]

    def model(name: str, directory: Path) -> dict[str, str]:
        seen_at = cluster.adapters / directory.relative_to(state) if cluster.adapters else directory
        return {"id": name, "source": str(seen_at)}

    listed = {
        "name": f"{agent}-adapters",
        **({"defaultBaseModel": config.server.model} if config.server.model else {}),
        "ensureExist": {"models": [model(name, path) for name, path in loadable.items()]},
        "ensureNotExist": {"models": [model(r.name, state / str(r.path)) for r in gone]},
    }
    data = {"configmap.yaml": json.dumps({"vLLMLoRAConfig": listed}, indent=1)}  # JSON is YAML
    metadata = _metadata(f"{agent}-adapters", config, cluster)
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}


def _rewrite(config: Config, store: Store, cluster: Cluster) -> Manifest:
    agent = config.agent.name
    serving = releases.get(store, aliases.read_alias(store, agent).release)
    target = serving.name if serving.path else (config.server.model or "base")
    spec = {
        "poolRef": {"group": "inference.networking.k8s.io", "kind": "InferencePool", "name": cluster.pool},
        "rules": [
            {
                "matches": [{"model": {"type": "Exact", "value": agent}}],
                "targets": [{"modelRewrite": target, "weight": 1}],
            }
        ],
    }
    metadata = _metadata(agent, config, cluster)
    return {"apiVersion": f"{GROUP}/v1alpha2", "kind": "InferenceModelRewrite", "metadata": metadata, "spec": spec}


def _plain(config: Config, arguments: Sequence[str], cluster: Cluster, image: str) -> list[Manifest]:
    """One pod: the processes share a volume, because SQLite wants one machine; and the gateway's port as a service. The
    keys of this state directory go along, as hashes, for as long as the volume has none of its own."""
    name = f"{config.agent.name}-cltrain"
    if all(key.revoked_at is not None for key in keys.read_keys(config.state_dir)):
        raise ConfigError(
            "the pod's gateway would be reachable without an API key, and so would not start: make one here first with "
            "`cltrain keys add --principal NAME --scope infer`; its hash goes along as a Secret"
        )
    files = [Path(word.removeprefix("--config=")) for word in arguments if word.startswith("--config=")]
    words = [f"--config={CONFIG_DIR}/{number}.toml" for number in range(len(files))]
    words += [word for word in arguments if not word.startswith(("--config=", "--set=home="))]
    words += [f"--set=home={STATE_DIR}", "--set=gateway.host=0.0.0.0"]
    labels = {"app.kubernetes.io/name": name}
    mounts = [{"name": "state", "mountPath": STATE_DIR}, {"name": "config", "mountPath": CONFIG_DIR, "readOnly": True}]
    containers: list[Manifest] = [
        {
            "name": process, "image": image, "command": ["cltrain", "run", "--only", process, *words],
            "volumeMounts": mounts,
        }
        for process in launch.needed(config)
    ]  # fmt: skip
    port = config.gateway.port
    for container in containers:
        if container["name"] == "gateway":
            container["ports"] = [{"name": "http", "containerPort": port}]
            container["readinessProbe"] = {"httpGet": {"path": "/health", "port": "http"}, "periodSeconds": PROBE_S}
    copied = f"test -e {STATE_DIR}/{keys.FILE} || install -m 600 {KEYS_DIR}/{keys.FILE} {STATE_DIR}"
    first = {
        "name": "keys", "image": image, "command": ["sh", "-c", copied],
        "volumeMounts": [mounts[0], {"name": "keys", "mountPath": KEYS_DIR, "readOnly": True}],
    }  # fmt: skip
    claim = {
        "metadata": {"name": "state"},
        "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": cluster.storage}}},
    }
    pod = {
        "securityContext": {"runAsNonRoot": True, "runAsUser": 1000, "fsGroup": 1000},
        "initContainers": [first],
        "containers": containers,
        "volumes": [
            {"name": "config", "configMap": {"name": name}}, {"name": "keys", "secret": {"secretName": f"{name}-keys"}},
        ],
    }  # fmt: skip
    metadata = _metadata(name, config, cluster)
    missing = ", ".join(
        f"{setting} = {file}" for setting, file in _files_named(config.model_dump()) if setting != "home"
    )
    noted = {**metadata, "annotations": {MOUNT: f"mount under the same paths: {missing}"}} if missing else metadata
    return [
        {
            "apiVersion": "v1", "kind": "Secret", "metadata": _metadata(f"{name}-keys", config, cluster),
            "stringData": {keys.FILE: (config.state_dir / keys.FILE).read_text()},
        },
        {
            "apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata,
            "data": {f"{number}.toml": file.read_text() for number, file in enumerate(files)},
        },
        {
            "apiVersion": "apps/v1", "kind": "StatefulSet", "metadata": noted,
            "spec": {
                "serviceName": name, "replicas": 1, "selector": {"matchLabels": labels},
                "template": {"metadata": {"labels": labels}, "spec": pod}, "volumeClaimTemplates": [claim],
            },
        },
        {
            "apiVersion": "v1", "kind": "Service", "metadata": metadata,
            "spec": {"selector": labels, "ports": [{"name": "http", "port": port, "targetPort": "http"}]},
        },
    ]  # fmt: skip


def _files_named(settings: Any, at: str = "") -> Iterator[tuple[str, Path]]:
    """(setting, file) of every file that the configuration names: the objects hold none of them."""
    if isinstance(settings, Path):
        yield at, settings
    elif isinstance(settings, dict):
        for name, value in settings.items():
            yield from _files_named(value, f"{at}.{name}" if at else name)
    elif isinstance(settings, list | tuple):
        for value in settings:
            yield from _files_named(value, at)


def _metadata(name: str, config: Config, cluster: Cluster) -> Manifest:
    return {
        "name": name, "namespace": cluster.namespace,
        "labels": {"app.kubernetes.io/managed-by": "cltrain", "cltrain/agent": config.agent.name},
    }  # fmt: skip
