"""Commands and records of small updates: two steps on any window, on a server that the test runs."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import select

from cltrain.experience.recording import Recorder, load_secret
from cltrain.records import Trajectory
from cltrain.store.database import Store, open_store
from cltrain.store.schema import screenings

QUICK = (
    "agent.mode=auto", "trainer.num_steps=2", "trainer.num_anchors=2", "trainer.anchor_tokens=16",
    "experience.eval_share=0.0", "experience.min_window=1", "experience.principal_quota=1.0",
    "gate.max_answer_tokens=8",
)  # fmt: skip


def options(home: Path, url: str, *settings: str) -> list[str]:
    """Words of a command on this home and this server: updates of two steps, any window."""
    return [f"--home={home}", *(f"--set={setting}" for setting in (f"server.url={url}", *QUICK, *settings)), "--json"]


def with_records(home: Path, trajectories: list[Trajectory]) -> Store:
    store = open_store(home)
    with Recorder(store, load_secret(home), 0.0) as recorder:
        for trajectory in trajectories:
            assert recorder.add_trajectory(trajectory)
    return store


def standing(store: Store) -> dict[str, tuple[str, str]]:
    """Record -> (status, reason)."""
    with store.read() as connection:
        return {row.record: (row.status, row.reason) for row in connection.execute(select(screenings))}
