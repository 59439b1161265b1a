"""Shows events in Weights & Biases, online or offline. The store is the record; this is only a view.

One wandb run per agent. Each row's step is the event's seq in the store and each row carries `update/index`, so a row
sent twice (after a crash) lands on itself. A watermark moves only when a segment is finished: wandb keeps the last
rows in memory until then, and a killed process loses them (measured on 0.31: 37 of 500). Offline resume does not
exist in wandb, so every segment is its own directory with the same run id; `wandb sync` joins them.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from cltrain.errors import ConfigError
from cltrain.monitoring.outbox import Event

SEGMENT = 100  # events between two finished segments: at most this many are sent again after a crash


class WandbSink:
    """`directory` holds wandb's own files, under wandb/. `deployment` is a short id that tells two deployments of one
    agent name apart; None derives it from the directory. Raises ConfigError when wandb is not installed."""

    def __init__(
        self,
        directory: Path,
        *,
        agent: str,
        project: str,
        mode: Literal["offline", "online"],
        deployment: str | None = None,
        config: dict[str, Any] | None = None,
        segment: int = SEGMENT,
    ) -> None:
        try:
            import wandb  # noqa: F401
        except ImportError:
            raise ConfigError(
                'monitoring.wandb needs the wandb package: pip install wandb, or set it to "off"'
            ) from None
        if deployment is None:
            deployment = hashlib.sha256(str(directory.resolve()).encode()).hexdigest()[:8]
        self._directory = directory
        self._agent = agent
        self._project = project
        self._mode = mode
        self._id = re.sub(r"[^A-Za-z0-9_-]", "-", f"{agent}-{deployment}")
        self._config = config or {}
        self._segment = segment
        self._run: Any = None
        self._num_open = 0
        self._last: int | None = None

    @property
    def name(self) -> str:
        return f"wandb:{self._agent}"

    def write(self, events: Sequence[Event]) -> int | None:
        for event in events:
            if event.agent == self._agent:
                try:
                    self._open().log(_row(event), step=event.seq)
                except Exception:  # wandb lets every kind out; none is swallowed
                    self._abandon()  # the next write starts afresh: a run whose service died never recovers
                    raise
                self._num_open += 1
            self._last = event.seq
        if self._num_open == 0:
            return self._last  # nothing of ours in flight: another agent's events are none of our business
        return self.close() if self._num_open >= self._segment else None

    def close(self) -> int | None:
        if self._run is not None:
            try:
                self._run.finish()
            except Exception:  # as above
                self._abandon()
                raise
        self._run, self._num_open = None, 0
        return self._last

    def _abandon(self) -> None:
        """Forget a broken run and wandb's service process with it; what they held will be sent again."""
        import wandb

        self._run, self._num_open, self._last = None, 0, None
        with suppress(Exception):  # the service may be the very thing that broke
            wandb.teardown(exit_code=1)

    def _open(self) -> Any:
        if self._run is None:
            import wandb

            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
            self._directory.mkdir(parents=True, exist_ok=True)
            self._run = wandb.init(
                project=self._project,
                group=self._project,
                job_type="cltrain",
                id=self._id,
                name=self._agent,
                dir=str(self._directory),
                mode=self._mode,
                resume="allow" if self._mode == "online" else None,
                config=self._config,
                reinit="create_new",
                settings=wandb.Settings(
                    silent=True, console="off", x_disable_stats=True, x_disable_meta=True, disable_git=True,
                    init_timeout=30,
                ),
            )  # fmt: skip
            self._run.define_metric("update/index")
            for family in ("gate", "adapter", "train", "buffer", "time"):
                self._run.define_metric(f"{family}/*", step_metric="update/index")
        return self._run


def _row(event: Event) -> dict[str, Any]:
    values = event.payload.get("values") or {}
    return {**values, "update/index": event.payload["number"], "time/at": event.at}
