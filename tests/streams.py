"""A short stream of the demo's skills on the shipped base, for the trainer alone: no gate, no server, no store."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cltrain.config import AdapterConfig, BoundsConfig, TrainerConfig
from cltrain.demo import world
from cltrain.models.adapter import AdapterFile, read_adapter
from cltrain.models.anchors import load_anchors
from cltrain.models.base import Base, load_base
from cltrain.models.chat import render_example
from cltrain.records import Candidate, Example, TokenRow
from cltrain.trainer.memory import read_memory
from cltrain.trainer.update import train_update

LOOSE = BoundsConfig(
    step_frobenius=99, drift_frobenius=99, step_spectral=99, drift_spectral=99, step_kl=99, drift_kl=99,
    day_frobenius=9999,
)  # fmt: skip


def rows_for(base: Base, tickets: Sequence[world.Ticket]) -> list[TokenRow]:
    """The claimed call after each ticket."""
    rows = []
    for ticket in tickets:
        messages = (*ticket.messages, world.call_message(ticket.claimed, ticket.id))
        example = Example(ticket.id, ticket.principal, ticket.skill, messages, (len(messages) - 1,), tuple(world.TOOLS))
        rows.append(render_example(base.tokenizer, base.context, example))
    return rows


@dataclasses.dataclass
class Learner:
    """One adapter and its updates: everything that it learned, clean or not, may come again as replay."""

    base: Base
    anchors: list[TokenRow]
    directory: Path
    trainer: TrainerConfig
    bounds: BoundsConfig = LOOSE
    seed: int = 0
    adapter: AdapterFile | None = None
    path: Path | None = None
    seen: list[TokenRow] = dataclasses.field(default_factory=list)
    number: int = 0

    def learn(self, rows: Sequence[TokenRow], **changes: Any) -> Candidate:
        self.number += 1
        arguments: dict[str, Any] = {
            "incumbent": self.adapter, "adapter": AdapterConfig(), "fresh": rows, "replay": self.seen[-256:],
            "anchors": self.anchors, "trainer": self.trainer, "bounds": self.bounds, "seed": self.seed + self.number,
            "memory": read_memory(self.path, self.adapter), "work_dir": self.directory / str(self.number),
        }  # fmt: skip
        candidate = train_update(self.base, **{**arguments, **changes})
        self.path = Path(candidate.path)
        self.adapter = read_adapter(self.path)
        self.seen += rows
        return candidate


def shipped(directory: Path, num_anchors: int = 16) -> tuple[Base, list[TokenRow]]:
    """The shipped base and texts of its own."""
    base = load_base(None)
    anchors, _ = load_anchors(base, file=None, count=num_anchors, max_tokens=48, seed=3, directory=directory)
    return base, anchors
