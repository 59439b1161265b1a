"""Any small Llama, Qwen2, Qwen3 or Mistral directory is a base: one command learns on it, server included."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from cltrain.models.digest import base_digest
from cltrain.registry.releases import get
from cltrain.store.database import open_store
from tests.command import Command, Said, cltrain, free_port, run_cltrain
from tests.tiny import TOOLS, make_tiny_base, ticket

__all__ = ["cltrain"]  # a fixture

NUM_EPISODES = 12


def write_episodes(file: Path) -> None:
    lines = [
        {"id": f"e{i}", "reward": 1.0 if i % 3 else 0.0, "principal": f"p{i % 4}",
         "messages": ticket(f"A{i:02}", ("refund", "track")[i % 2]), "tools": TOOLS}
        for i in range(NUM_EPISODES)
    ]  # fmt: skip
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def update(base: Path, home: Path, port: int) -> Said:
    settings = (
        "trainer.num_steps=2", "trainer.num_anchors=4", "trainer.anchor_tokens=16", "experience.min_window=4",
        "experience.eval_share=0.2", "gate.max_answer_tokens=8", "agent.mode=auto", f"server.port={port}",
    )  # fmt: skip
    return run_cltrain(
        "update", f"--base={base}", f"--home={home}", "--json", *(f"--set={setting}" for setting in settings)
    )


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_one_update_runs_on_a_base_of_each_family_with_a_server_of_its_own(
    cltrain: Command, tmp_path: Path, family: str
) -> None:
    base, home, port = make_tiny_base(tmp_path / family, family), tmp_path / "home", free_port()
    write_episodes(tmp_path / "episodes.jsonl")
    file = str(tmp_path / "episodes.jsonl")
    done = cltrain("import", file, f"--home={home}", f"--base={base}", "--producer=agent", "--json")
    assert (done.code, done.json["num_imported"], done.json["num_unusable"]) == (0, NUM_EPISODES, 0), done
    done = update(base, home, port)
    summary = done.json
    assert summary["verdict"] in ("promote", "hold", "reject"), done
    assert done.code == {"promote": 0, "hold": 10, "reject": 11}[summary["verdict"]]
    digest = base_digest(base)
    assert summary["parent"] == f"support-v000000-{digest[:12]}"
    assert summary["proof"] in ("proved", "indistinguishable"), summary["proof"]
    release = get(open_store(home), summary["candidate"])
    assert release.parent == summary["parent"]
    assert release.manifest["base"] == digest
    assert summary["bounds"]["drift_kl"] <= 0.25  # config's default limit, nats per token
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0, "the server that the command started still runs"
