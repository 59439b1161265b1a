"""Every knob but the gate's (config_gate.py) and the rollout's (config_rollout.py), and the strict TOML loader.

Imports no torch. Files merge left to right, `--set section.key=value` last. An unknown key is an error with a
suggestion, a setting that cannot be honoured is an error, and the resolved config's hash travels with every update.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError, model_validator

from cltrain import settings
from cltrain.config_gate import GateConfig
from cltrain.config_rollout import RolloutConfig
from cltrain.config_tenants import NAME, OF, TenantsConfig, is_tenants
from cltrain.errors import ConfigError
from cltrain.records import LearningMode, Objective
from cltrain.settings import Section

MethodName = Literal[
    "bounded_replay", "naive", "replay", "kl", "ewc", "l2sp", "oplora", "agem", "ema", "distill", "joint", "merge_reset"
]
Kernels = Literal["auto", "reference", "off"]
Remember = Literal["replay", "kl", "ewc", "l2sp", "oplora", "agem", "ema", "distill"]


Url = Annotated[  # no password: clients are shown it
    str,
    Field(pattern=r"^https?://[^/?#@\s]+(/[^?#@\s]*)?$"),
    AfterValidator(lambda url: url.rstrip("/").removesuffix("/v1")),
]
NOT_SHAPING = ("home", "server", "gateway", "signing", "monitoring")  # where an update happens and who hears of it
OF_TENANT = {"agent": {"name"}, "experience": {"principal_quota"}, "rollout": {"kind"}}  # what `of_agent` sets


class AgentConfig(Section):
    """Who learns, and from whose words."""

    name: str = Field("support", pattern=rf"^{NAME}({OF}{NAME})?$")  # support@acme: that of a tenant, for commands
    mode: LearningMode = LearningMode.OBSERVE
    updates: Literal["when_ready", "on_request"] = "when_ready"  # on_request: `cltrain update`, a timer, your own code
    learn_from: tuple[str, ...] = Field(("agent", "operator", "rehearsal"), min_length=1)  # whose turns may carry loss
    tools_allowed: tuple[str, ...] | None = None  # None: the tools that the episode itself declares


class BaseModelConfig(Section):
    """The frozen base. `path` is a local directory; None is the small base that ships with the demo."""

    path: Path | None = None
    device: str = "cpu"
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    context: int | None = Field(None, ge=16)  # tokens; None: the base's own limit
    num_threads: int = Field(1, ge=1)


class AdapterConfig(Section):
    rank: int = Field(8, ge=1, le=512)
    alpha: float = Field(16.0, gt=0)  # the delta is scaled by alpha / rank
    targets: tuple[str, ...] = Field(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), min_length=1
    )


class ExperienceConfig(Section):
    """Which records may be learned from, and when."""

    eval_share: float = Field(0.1, ge=0, lt=1)  # of the sessions, by keyed hash; never trained on
    idle_end_s: float = Field(1800.0, gt=0)  # an episode without X-Session-Done ends after this
    mature_after_s: float = Field(300.0, ge=0)  # how long a finished episode waits for late feedback
    min_window: int = Field(16, ge=1)  # records that an update would read, of every objective, before it is attempted
    max_window: int = Field(64, ge=1)
    max_negative_share: float = Field(0.25, ge=0, lt=1)  # of one window: what only says what was wrong, critiques too
    principal_quota: float = Field(0.25, gt=0, le=1)  # of one window, for every principal
    filter: bool = True  # verification, quotas and trigger scan; off only to compare
    max_flagged_share: float = Field(0.5, gt=0, le=1)  # above it the whole window is set aside
    trigger_min_count: int = Field(4, ge=2)  # a phrase this frequent from one principal alone is suspicious
    trigger_max_principals: int = Field(1, ge=1)
    buffer_per_stratum: int = Field(64, ge=1)  # bottom-k by keyed hash
    rare_stratum: int = Field(4, ge=1)  # strata with fewer records are pooled as `other`
    max_doubtful_share: float = Field(0.25, ge=0, lt=1)  # of a stratum; in doubt of more, the adapter does not know it
    rehearsal: Path | None = None  # JSONL of the owner's own episodes, always in replay


class ObjectivesConfig(Section):
    """What each kind of feedback is learned by; a coefficient multiplies its own term only."""

    # What is not listed is not learned; without sft no record is rehearsed either, only `experience.rehearsal`.
    use: tuple[Objective, ...] = Field(("sft", "dpo", "kto", "policy", "hindsight"), min_length=1)
    corrections: Literal["sft", "dpo"] = "sft"  # dpo: a correction beside the answer that it replaces
    sft: float = Field(1.0, gt=0)
    dpo: float = Field(1.0, gt=0)
    kto: float = Field(1.0, gt=0)
    policy: float = Field(1.0, gt=0)
    hindsight: float = Field(1.0, gt=0)
    dpo_beta: float = Field(0.1, gt=0)
    kto_beta: float = Field(0.1, gt=0)
    policy_kind: Literal["cispo", "ppo"] = "cispo"
    clip_low: float = Field(0.2, gt=0, lt=1)  # of ppo alone: cispo has no lower bound (arXiv:2506.13585, section 3.1)
    clip_high: float = Field(0.28, gt=0)
    truncate: float = Field(2.0, ge=1)  # cap on the importance weight
    max_lag: int = Field(2, ge=0)  # promotions between the record's adapter and the incumbent
    baseline_decay: float = Field(0.9, ge=0, lt=1)  # of the running mean score of a stratum
    hindsight_kind: Literal["forward", "reverse", "jsd"] = "forward"

    @model_validator(mode="after")
    def _corrections_are_learned(self) -> ObjectivesConfig:
        if self.corrections not in self.use and self.corrections == "dpo":
            raise ValueError(f"corrections = 'dpo', but use does not list dpo; it has {', '.join(self.use)}")
        return self

    @model_validator(mode="after")
    def _clip_is_used(self) -> ObjectivesConfig:
        if self.policy_kind == "cispo" and self.clip_low != type(self).model_fields["clip_low"].default:
            raise ValueError(f"clip_low = {self.clip_low}, but policy_kind = 'cispo' has no lower bound: leave it out")
        return self


class TrainerConfig(Section):
    method: MethodName = "bounded_replay"
    remember: tuple[Remember, ...] | None = None  # None: what the method names; any of them combine
    objectives: ObjectivesConfig = ObjectivesConfig()
    lr: float = Field(2e-3, gt=0)
    num_steps: int = Field(24, ge=1)
    warmup_steps: int = Field(3, ge=0)
    final_lr_share: float = Field(0.1, gt=0, le=1)  # of lr at the last step; 1 keeps it constant
    batch_size: int = Field(16, ge=1)  # rows per step; half fresh, half replay
    micro_batch: int | None = Field(None, ge=1)  # rows per forward; None: the whole batch
    replay_share: float = Field(0.5, ge=0, lt=1)
    kl_beta: float = Field(1.0, ge=0)
    kl_to: Literal["base", "incumbent"] = "base"
    kl_batch: int = Field(8, ge=1)  # anchor rows per step
    distill_beta: float = Field(1.0, ge=0)  # on the KL from the incumbent over the fresh rows
    l2sp_lambda: float = Field(2.0, ge=0)  # on ||dW - dW_incumbent||^2 / ||W0||^2
    ewc_lambda: float = Field(1000.0, ge=0)  # on the same distance, weighted by a Fisher of unit mean
    ewc_decay: float = Field(0.95, ge=0, lt=1)  # of the Fisher, per update
    oplora_rank: int = Field(16, ge=1)  # singular directions of each base matrix that no update touches
    ema_decay: float = Field(0.5, ge=0, lt=1)  # of the served adapter, per update
    max_grad_norm: float = Field(1.0, gt=0)
    num_anchors: int = Field(64, ge=1)
    anchor_tokens: int = Field(64, ge=8)
    anchors: Path | None = None  # JSONL of {"text"} or {"messages"}; None: sampled from the base
    checkpoint_every: int = Field(8, ge=1)  # steps
    kernels: Kernels = "auto"  # what an update runs by: fused ops, those in plain PyTorch, or PEFT's modules


class BoundsConfig(Section):
    """Hard limits, as fractions of ||W0||_F and nats per token; measured again on the exported file."""

    step_frobenius: float = Field(0.1, gt=0)
    drift_frobenius: float = Field(0.5, gt=0)
    step_spectral: float = Field(0.1, gt=0)
    drift_spectral: float = Field(0.5, gt=0)
    step_kl: float = Field(0.25, gt=0)
    drift_kl: float = Field(0.25, gt=0)
    day_frobenius: float = Field(1.0, gt=0)  # sum of the steps that served, any 24 hours
    max_tokens: int = Field(200_000, ge=1)  # supervised tokens per update; training ends before it
    max_steps: int = Field(1000, ge=1)
    min_shrink: float = Field(0.05, gt=0, le=1)  # a candidate that must shrink below this is rejected


class HealthConfig(Section):
    """Signs of collapse, on the anchors against the base; beyond them an update is discarded with its reason."""

    min_entropy_share: float = Field(0.5, gt=0, le=1)
    max_entropy_share: float = Field(2.0, gt=1)
    max_ending_ratio: float = Field(4.0, gt=1)  # of the chance to end an answer early, either way
    min_rank_share: float = Field(0.5, gt=0, le=1)  # of the incumbent's effective rank
    max_grad_norm: float = Field(1e4, gt=0)  # before clipping


class ServerConfig(Section):
    """One inference server, or several of one base. `embedded` is ours; the others are spoken to over HTTP."""

    kind: Literal["embedded", "vllm", "sglang", "openai"] = "embedded"
    url: Url | None = None  # None, and no urls: cltrain starts the embedded server itself
    urls: tuple[Url, ...] = ()  # instead of url: replicas of one base
    min_ready: int = Field(1, ge=1)  # replicas that must hold and prove a candidate before it may serve
    host: str = "127.0.0.1"
    port: int = Field(8101, ge=0, le=65535)
    model: str | None = None  # the base's name on that server
    api_key_env: str | None = Field(None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")  # the variable that holds its API key
    max_adapters: int = Field(6, ge=2)
    max_rank: int | None = Field(None, ge=1)  # of an adapter, e.g. vLLM's --max-lora-rank; None: what it says itself
    max_batch: int = Field(16, ge=1)
    timeout_s: float = Field(120.0, gt=0)

    @model_validator(mode="after")
    def _says_once_where(self) -> ServerConfig:
        if self.url is not None and self.urls:
            raise ValueError("server.url and server.urls are both given: urls alone names every replica")
        if self.min_ready > len(self.replicas):
            raise ValueError(f"min_ready = {self.min_ready}, but there are {len(self.replicas)} replicas")
        return self

    @property
    def api_key(self) -> str | None:
        """The server's own key. Raises ConfigError when it is named and the variable is not set."""
        if self.api_key_env is None:
            return None
        if not (key := os.environ.get(self.api_key_env)):
            name = self.api_key_env
            raise ConfigError(f"server.api_key_env = {name!r}, and that variable is not set: export {name}=KEY")
        return key

    @property
    def health_path(self) -> str:
        """Where it says at once whether it is up; SGLang's /health generates a token first, which takes a second."""
        return "/ready" if self.kind == "sglang" else "/health"

    @property
    def is_elsewhere(self) -> bool:
        """Whether somebody else starts it."""
        return self.url is not None or bool(self.urls)

    @property
    def replicas(self) -> tuple[str, ...]:
        """The URL of every server, also where there is one; by it worker and gateway mean the same replica."""
        return self.urls or (self.url or f"http://{self.host}:{self.port}",)


class GatewayConfig(Section):
    host: str = "127.0.0.1"
    port: int = Field(8100, ge=0, le=65535)
    max_in_flight: int = Field(256, ge=1)  # generations at a time, and as many intakes; beyond it 429 with Retry-After
    queue: int = Field(1024, ge=1)  # answers waiting to be recorded; beyond it they go out with recorded 0
    record_timeout_s: float = Field(5.0, gt=0)


class SigningConfig(Section):
    """Ed25519 keys, as PEM files. With any of them, only releases that one of them signed are loaded and promoted."""

    key: Path | None = None  # private: signs what this deployment seals
    trusted: tuple[Path, ...] = ()  # public ones, of others that seal for it

    @property
    def all_trusted(self) -> tuple[Path, ...]:
        return self.trusted if self.key is None else (self.key, *self.trusted)


class MonitoringConfig(Section):
    wandb: Literal["off", "offline", "online"] = "off"
    project: str = "cltrain"
    report: bool = True


class Config(Section):
    home: Path | None = None  # state; None: $CLTRAIN_HOME, else checkpoints/ of the working directory
    seed: int = 0
    agent: AgentConfig = AgentConfig()
    base: BaseModelConfig = BaseModelConfig()
    adapter: AdapterConfig = AdapterConfig()
    experience: ExperienceConfig = ExperienceConfig()
    trainer: TrainerConfig = TrainerConfig()
    bounds: BoundsConfig = BoundsConfig()
    health: HealthConfig = HealthConfig()
    gate: GateConfig = GateConfig()
    server: ServerConfig = ServerConfig()
    gateway: GatewayConfig = GatewayConfig()
    tenants: TenantsConfig = TenantsConfig()
    rollout: RolloutConfig = RolloutConfig()
    signing: SigningConfig = SigningConfig()
    monitoring: MonitoringConfig = MonitoringConfig()
    _files: tuple[Path, ...] = ()  # what `load` read it from
    _overrides: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _windows_fit(self) -> Config:
        if self.experience.max_window < self.experience.min_window:
            raise ValueError(
                f"experience.max_window ({self.experience.max_window}) is below experience.min_window "
                f"({self.experience.min_window})"
            )
        if self.trainer.num_steps > self.bounds.max_steps:
            raise ValueError(
                f"trainer.num_steps ({self.trainer.num_steps}) is above bounds.max_steps ({self.bounds.max_steps})"
            )
        if self.server.kind != "embedded" and not self.server.is_elsewhere:
            raise ValueError(f"server.kind = {self.server.kind!r} needs server.url")
        if self.server.max_rank is not None and self.adapter.rank > self.server.max_rank:
            raise ValueError(f"adapter.rank ({self.adapter.rank}) is above server.max_rank ({self.server.max_rank})")
        return self

    @model_validator(mode="after")
    def _servers_can_roll_out(self) -> Config:
        kind, server = self.rollout.kind, self.server
        if self.rollout.is_tried and server.max_adapters < 3:
            raise ValueError(
                f"rollout.kind = {kind!r} keeps the candidate loaded beside what serves and what a rollback would go "
                f"to: server.max_adapters = {server.max_adapters}, and it needs 3"
            )
        if kind in ("rolling", "blue_green") and len(server.replicas) < 2:
            raise ValueError(f"rollout.kind = {kind!r} needs two replicas or more: server.urls names one at most")
        return self

    @property
    def state_dir(self) -> Path:
        chosen = self.home or os.environ.get("CLTRAIN_HOME") or "checkpoints"
        return Path(chosen).expanduser().resolve()

    @property
    def tightest_bounds(self) -> BoundsConfig:
        """The bounds, the gate's own limit on the drift among them: what would fail there on drift alone is pulled back
        along its segment as by any bound, and measured again, before the gate sees it."""
        return self.bounds.model_copy(update={"drift_kl": min(self.bounds.drift_kl, self.gate.base_kl)})

    def resolved(self) -> dict[str, Any]:
        return self.model_dump(mode="json")

    def shaping(self) -> dict[str, Any]:
        """Everything that shapes an update; `home` and addresses do not."""
        return {name: value for name, value in self.resolved().items() if name not in NOT_SHAPING}

    def options(self) -> str:
        """The options of every command that opens this deployment again, from whatever directory."""
        own = ("home=", "agent.name=")
        words = [word for file in self._files for word in ("--config", str(file))]
        words += [word for one in self._overrides if not one.startswith(own) for word in ("--set", one)]
        return shlex.join([*words, "--home", str(self.state_dir), "--agent", self.agent.name])

    def of_agent(self, name: str) -> Config:
        """The same for another agent of the family. What a tenant's learns has one principal, whose quota is all; one
        tenant's traffic is too little to try candidates on: they take over at once."""
        agent = self.agent.model_copy(update={"name": name})
        if not is_tenants(name):
            return self.model_copy(update={"agent": agent})
        experience = self.experience.model_copy(update={"principal_quota": 1.0})
        rollout = self.rollout.model_copy(update={"kind": "all"}) if self.rollout.is_tried else self.rollout
        return self.model_copy(update={"agent": agent, "experience": experience, "rollout": rollout})

    def digest(self) -> str:
        """sha256 of `shaping`."""
        return hashlib.sha256(json.dumps(self.shaping(), sort_keys=True).encode()).hexdigest()

    def unlike(self, shaping: dict[str, Any]) -> list[str]:
        """Which settings, of those that somebody gave here, are others in that `shaping`; defaults do not count. Of a
        tenant's, `shaping` may be the shared agent's."""
        left_out: dict[str, Any] = dict.fromkeys(NOT_SHAPING, True)
        if is_tenants(self.agent.name):
            left_out |= OF_TENANT
        given = self.model_dump(mode="json", exclude_unset=True, exclude=left_out)
        return list(settings.differences(given, shaping))

    def check_files(self) -> None:
        """Raise ConfigError for a path that leads nowhere. Commands that read a file say so themselves, later."""
        for keys in settings.PATHS:
            path = reduce(getattr, keys, self)
            if isinstance(path, Path) and not path.expanduser().exists():
                raise ConfigError(f"{'.'.join(keys)} = {str(path)!r}: there is no such file or directory")
        for key in self.signing.all_trusted:
            if not key.expanduser().exists():
                raise ConfigError(f"signing: there is no key file {str(key)!r}")
        for suite in self.gate.suites:
            if suite.path is not None and not suite.path.expanduser().exists():
                raise ConfigError(f"suite {suite.name}: path = {str(suite.path)!r}: there is no such file or directory")


def load(files: Sequence[Path] = (), overrides: Sequence[str] = ()) -> Config:
    """Merge TOML files left to right, then `section.key=value` overrides, into one checked Config.

    Relative paths inside a file are relative to that file. Raises ConfigError naming the key, the value and a fix.
    """
    config = from_dict(settings.merged(files, overrides))
    config._files, config._overrides = tuple(Path(file).resolve() for file in files), tuple(overrides)
    return config


def from_dict(values: dict[str, Any]) -> Config:
    try:
        config = Config.model_validate(values)
        return config.of_agent(config.agent.name) if is_tenants(config.agent.name) else config
    except ValidationError as error:
        raise ConfigError("\n".join(settings.explain(problem, Config) for problem in error.errors())) from None
