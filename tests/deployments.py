"""A small real deployment in one process: the shipped base behind the embedded server, and tickets as records."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cltrain.config import Config, from_dict
from cltrain.demo import world
from cltrain.demo.inputs import write_inputs
from cltrain.deploy.engine import Engine
from cltrain.deploy.serve import running_server
from cltrain.experience.recording import Recorder, load_secret
from cltrain.models.base import load_base
from cltrain.records import Feedback, Trajectory
from cltrain.store.database import Store
from cltrain.worker import Worker


def config_for(home: Path, url: str, **sections: dict[str, Any]) -> Config:
    """The demo's settings, cut down to seconds: 12 steps, 120 items."""
    home.mkdir(parents=True, exist_ok=True)
    write_inputs(home, 77)
    values: dict[str, Any] = {
        "home": str(home / "state"),
        "agent": {"mode": "auto", "updates": "on_request"},
        "experience": {
            "min_window": 8,
            "max_window": 48,
            "mature_after_s": 3600,
            "eval_share": 0.0,
            "rehearsal": str(home / "rehearsal.jsonl"),
        },
        "trainer": {"num_steps": 12, "lr": 2e-3, "num_anchors": 16, "checkpoint_every": 2},
        "gate": {"suite": str(home / "suite.jsonl"), "items_per_gate": 120},
        "server": {"url": url, "kind": "embedded"},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return from_dict(values)


@contextmanager
def base_server() -> Iterator[str]:
    engine = Engine(load_base(None), max_adapters=8)
    try:
        with running_server(engine) as url:
            yield url
    finally:
        engine.close()


def corrected(ticket: world.Ticket, *, agent: str = "support", claimed: world.Call | None = None) -> Trajectory:
    """The ticket as an episode in which the agent called the wrong tool and an operator corrected it."""
    wrong = world.call_message(
        {**ticket.expected, "name": "find"} if ticket.expected else {"name": "find", "arguments": {}}, "x"
    )
    fix = world.call_message(claimed or ticket.claimed, ticket.id)
    messages = (*ticket.messages, wrong, {"role": "tool", "tool_call_id": "call-x", "content": "ok"})
    return Trajectory(
        id=ticket.id,
        agent=agent,
        session=ticket.id,
        principal=ticket.principal,
        messages=messages,
        producers=("user", "agent", "tool"),
        tools=tuple(world.TOOLS),
        feedback=(Feedback(f"{ticket.id}-fix", ticket.id, correction=fix, source="operator", created_at=2.0),),
        created_at=1.0,
    )


def record(store: Store, config: Config, trajectories: Sequence[Trajectory]) -> None:
    with Recorder(store, load_secret(config.state_dir), config.experience.eval_share) as recorder:
        for trajectory in trajectories:
            assert recorder.add_trajectory(trajectory)


def tickets(skill: str, count: int, seed: int = 5) -> list[world.Ticket]:
    return world.training_tickets(skill, seed=seed, count=count, name=f"t{random.Random(seed).random():.6f}")


def worker(config: Config, store: Store) -> Worker:
    return Worker(config, store, on_progress=lambda line: None)
