"""Budgets from the owner's own data: how far a few naive updates go on what is waiting, and the limits that follow.

Naive: the configured steps without replay, KL or bounds, each from where the one before ended, the first from what
serves. All of it happens in a scratch directory and on a store whose writes are taken back. The rules, rounded up to
two digits:

    bounds.step_frobenius, step_spectral, step_kl   90th percentile of the steps seen: what goes farther is shrunk
    bounds.drift_frobenius, drift_spectral          3 times the farthest that an update ended from the base
    bounds.drift_kl, gate.base_kl                   9 times the farthest: KL grows with the square of the distance

Not proposed: bounds.day_frobenius, which is a matter of how many updates a day the owner wants.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from sqlalchemy import Connection, select

from cltrain.config import Config
from cltrain.errors import DataError
from cltrain.experience.screens import screen, within_shares
from cltrain.experience.window import most_often, next_window
from cltrain.loop import render
from cltrain.models.adapter import AdapterFile, read_adapter
from cltrain.models.anchors import load_anchors
from cltrain.models.base import Base, load_base
from cltrain.records import BoundReport, Example, TokenRow
from cltrain.registry import releases
from cltrain.staleness import settle
from cltrain.store.database import Store
from cltrain.store.schema import aliases
from cltrain.trainer.reference import Reference
from cltrain.trainer.update import UpdateDiscarded, train_update

MIN_UPDATES, MAX_UPDATES = 3, 4
PERCENTILE = 0.9
DRIFT_MULTIPLE = 3.0
STEPS = ("step_frobenius", "step_spectral", "step_kl")
DRIFTS = {"drift_frobenius": DRIFT_MULTIPLE, "drift_spectral": DRIFT_MULTIPLE, "drift_kl": DRIFT_MULTIPLE**2}

T = TypeVar("T")


def calibrate(config: Config, store: Store, *, now: float, on_progress: Callable[[str], None]) -> dict[str, Any]:
    """Train naively on what is waiting and propose budgets by this module's rules; nothing of the deployment changes.

    Returns `num_missing` (records; 0 when there were enough), `num_records`, `updates` (what each measured), `proposed`
    (section -> setting -> value; empty while records are missing) and `reasons`. Raises DataError where a naive update
    cannot be made or moves nothing.
    """
    base = load_base(
        config.base.path, device=config.base.device, dtype=config.base.dtype, context=config.base.context,
        num_threads=config.base.num_threads,
    )  # fmt: skip
    incumbent = serving(config, store)
    examples, notes = waiting_examples(config, Unwritten(store.engine, store.path), base, incumbent, now)
    usable = [rows for rows in (render(base, [example])[0] for example in examples) if rows]
    least = config.experience.min_window
    num_missing = max(0, MIN_UPDATES * least - len(usable))
    found: dict[str, Any] = {
        "agent": config.agent.name, "num_records": len(usable), "num_missing": num_missing, "updates": [],
        "proposed": {}, "reasons": notes,
    }  # fmt: skip
    if num_missing:
        reason = (
            f"{len(usable)} learnable records are waiting; {MIN_UPDATES} updates of experience.min_window = {least} "
            f"need {num_missing} more"
        )
        return {**found, "reasons": [reason, *notes]}
    parts = split(usable, min(MAX_UPDATES, len(usable) // least))
    with tempfile.TemporaryDirectory(prefix="cltrain-calibrate-") as scratch:
        windows = [[row for rows in part for row in rows] for part in parts]
        reports = _naive_updates(
            config, base, weights_of(config, store, incumbent), windows, Path(scratch), on_progress
        )
    measured = [{name: getattr(report, name) for name in (*STEPS, *DRIFTS)} for report in reports]
    return {**found, "updates": measured, "proposed": proposed(measured)}


def proposed(updates: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Section -> setting -> budget by this module's rules, from what each update measured."""
    seen = {name: [update[name] for update in updates] for name in (*STEPS, *DRIFTS)}
    for name, values in seen.items():
        if not all(map(math.isfinite, values)) or max(values) <= 0:
            raise DataError(f"the naive updates measured {name} {values}: no budget follows; look at trainer.lr")
    budgets = {name: float(np.quantile(seen[name], PERCENTILE)) for name in STEPS}
    budgets |= {name: multiple * max(seen[name]) for name, multiple in DRIFTS.items()}
    bounds = {name: _round_up(value) for name, value in budgets.items()}
    return {"bounds": bounds, "gate": {"base_kl": bounds["drift_kl"]}}


def toml_lines(found: dict[str, Any]) -> list[str]:
    """The proposal as lines of a configuration file, what was measured as comments."""
    lines = [f"# {len(found['updates'])} naive updates on {found['num_records']} waiting records"]
    for name in (*STEPS, *DRIFTS):
        lines.append(f"# {name:<16} {'  '.join(f'{update[name]:.3g}' for update in found['updates'])}")
    for section, values in found["proposed"].items():
        lines += ["", f"[{section}]", *(f"{name} = {value:g}" for name, value in values.items())]
    return lines


class Unwritten(Store):
    """The same database, of which every write is taken back: reading a window also files what is of no use."""

    @contextmanager
    def write(self) -> Iterator[Connection]:
        with suppress(_TakenBack), super().write() as connection:
            yield connection
            raise _TakenBack


class _TakenBack(Exception):
    pass


def waiting_examples(
    config: Config, store: Store, base: Base, incumbent: str, now: float
) -> tuple[list[Example], list[str]]:
    """Up to MAX_UPDATES windows of what waits, oldest first, each screened and settled as by an update; and why a
    window was refused or other records are unusable."""
    agent, experience = config.agent, config.experience
    size = experience.max_window
    waiting = next_window(
        store, agent.name, experience.model_copy(update={"max_window": MAX_UPDATES * size}),
        learn_from=agent.learn_from, tools_allowed=agent.tools_allowed, now=now, objectives=config.trainer.objectives,
    )  # fmt: skip
    parts = split(waiting.examples, -(-len(waiting.examples) // size))
    windows = [screen(part, experience, tools_allowed=agent.tools_allowed) for part in parts]
    settled = [settle(store, config, base, incumbent, window.kept) for window in windows]
    kept = [example for examples, _ in settled for example in within_shares(examples, experience)[0]]
    notes = [f"a window is refused: {window.reason}" for window in windows if window.is_refused]
    unusable = Counter([reason for _, reason in waiting.unusable] + [one.reason for _, them in settled for one in them])
    return kept, [*notes, most_often(unusable)] if unusable else notes


def split(items: Sequence[T], num_parts: int) -> list[Sequence[T]]:
    """Consecutive parts whose sizes differ by at most one."""
    edges = [len(items) * i // num_parts for i in range(num_parts + 1)] if num_parts else []
    return [items[low:high] for low, high in pairwise(edges)]


def serving(config: Config, store: Store) -> str:
    """The release that serves; no name where nothing ever served."""
    with store.read() as connection:
        query = select(aliases.c.release).where(aliases.c.agent == config.agent.name)
        return connection.scalar(query) or ""


def weights_of(config: Config, store: Store, release: str) -> AdapterFile | None:
    """None for the bare base."""
    directory = releases.release_dir(config.state_dir, releases.get(store, release)) if release else None
    return None if directory is None else read_adapter(directory)


def _naive_updates(
    config: Config,
    base: Base,
    incumbent: AdapterFile | None,
    windows: Sequence[Sequence[TokenRow]],
    scratch: Path,
    on_progress: Callable[[str], None],
) -> list[BoundReport]:
    pinned = config.state_dir / "anchors"
    if pinned.is_dir():
        shutil.copytree(pinned, scratch / "anchors")
    anchors, _ = load_anchors(
        base, file=config.trainer.anchors, count=config.trainer.num_anchors, max_tokens=config.trainer.anchor_tokens,
        seed=config.seed, directory=scratch / "anchors",
    )  # fmt: skip
    trainer = config.trainer.model_copy(update={"method": "naive", "remember": None})
    of_base = Reference(base, base.model, anchors)
    reports: list[BoundReport] = []
    for number, rows in enumerate(windows, start=1):
        try:
            candidate = train_update(
                base, incumbent=incumbent, adapter=config.adapter, fresh=rows, replay=[], anchors=anchors,
                trainer=trainer, bounds=config.bounds, health=config.health, of_base=of_base,
                seed=config.seed + number, work_dir=scratch / str(number),
            )  # fmt: skip
        except UpdateDiscarded as error:
            raise DataError(f"naive update {number} of {len(windows)} cannot be made: {error}") from error
        incumbent = read_adapter(Path(candidate.path))
        reports.append(candidate.bounds)
        on_progress(f"naive update {number} of {len(windows)}: step {candidate.bounds.step_frobenius:.3g} of ||W0||")
    return reports


def _round_up(value: float) -> float:
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return float(f"{math.ceil(value / unit * (1 - 1e-9)) * unit:.2g}")
