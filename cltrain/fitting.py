"""How many episodes a base can take whole: what an import is told at once, and an update would find out later."""

from __future__ import annotations

from typing import Any

from cltrain.config import Config
from cltrain.errors import guarded
from cltrain.experience.reading import read_trajectories
from cltrain.models.base import load_base
from cltrain.models.chat import render_rows
from cltrain.records import Example, TokenRow, Trajectory
from cltrain.store.database import Store


def count_fitting(config: Config, store: Store, agent: str, *, after_seq: int = 0) -> dict[str, Any]:
    """How many of the agent's episodes after that one the base can take whole, and why it cannot take the others."""
    base = load_base(config.base.path, context=config.base.context)

    def rows_of(trajectory: Trajectory) -> tuple[TokenRow, ...]:
        targets = tuple(i for i, message in enumerate(trajectory.messages) if message["role"] == "assistant")
        example = Example(trajectory.id, trajectory.principal, "all", trajectory.messages, targets, trajectory.tools)
        return render_rows(base.tokenizer, base.context, example)

    found = [guarded(rows_of, trajectory) for trajectory in read_trajectories(store, agent, after_seq=after_seq)]
    unusable = [reason for reason in found if isinstance(reason, str)]
    return {"num_fitting": len(found) - len(unusable), "num_unusable": len(unusable), "unusable": unusable}
