"""What the demo's owner brings: a suite of held-out tickets, rehearsal episodes, anchors, and the configuration."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cltrain.demo import text, world

NUM_ANCHORS = 128  # half of them stories, half requests the base knows


def write_inputs(out: Path, seed: int, more: str = "") -> Path:
    """Write everything under `out`, with `more` TOML after the demo's own; returns the configuration file."""
    suite = [
        {
            "id": ticket.id,
            "stratum": ticket.skill,
            "kind": "retention" if ticket.skill in world.BASE_SKILLS else "gain",
            "messages": ticket.messages,
            "tools": world.TOOLS,
            "expected": world.call_message(ticket.expected, ticket.id),
        }
        for ticket in world.suite_items(seed)
    ]
    write_jsonl(out / "suite.jsonl", suite)
    known = [t for skill in world.BASE_SKILLS for t in world.training_tickets(skill, seed=seed, count=32, name="own")]
    write_jsonl(
        out / "rehearsal.jsonl",
        [{"id": t.id, "messages": world.episode(t), "tools": world.TOOLS, "principal": "owner"} for t in known],
    )
    write_jsonl(out / "anchors.jsonl", text.anchors(seed, NUM_ANCHORS))
    head = f"home = {json.dumps(str(out / 'state'))}\nseed = {seed}\n"
    file = out / "demo.toml"
    file.write_text(head + (Path(__file__).parent / "demo.toml").read_text() + more)
    return file


def write_jsonl(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    """One JSON object a line."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
