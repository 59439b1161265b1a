"""The command line for tests: in this process with its exit code and output, or as a process of its own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cltrain import cli
from cltrain.registry.aliases import move_alias
from cltrain.registry.releases import ensure_base_release, seal
from cltrain.store.database import open_store

BASE_DIGEST = "ab" * 32


@dataclass(frozen=True)
class Said:
    """What a command left: its exit code, what went to stdout and to stderr."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one object on stdout."""
        return json.loads(self.out)


Command = Callable[..., Said]


@pytest.fixture
def cltrain(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """`cltrain(*words)` in this process, as the entry point runs it."""

    def call(*words: str) -> Said:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["cltrain", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        return Said(ended.value.code if isinstance(ended.value.code, int) else 0, said.out, said.err)

    return call


def run_cltrain(*words: str, timeout_s: float = 240) -> Said:
    """`cltrain` in a process of its own, with one thread and no network."""
    command = [sys.executable, "-m", "cltrain", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout_s)
    return Said(done.returncode, done.stdout, done.stderr)


def free_port() -> int:
    """A port that nobody has now."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


def promoted_home(home: Path, agent: str = "support") -> tuple[str, str]:
    """A state directory in which a release serves and the bare base did before: (base, release). No weights in it."""
    store = open_store(home)
    base = ensure_base_release(store, agent, BASE_DIGEST, now=1.0).name
    made = home / "made"
    made.mkdir()
    (made / "adapter_config.json").write_text("{}")
    (made / "adapter_model.safetensors").write_text("weights")
    release = seal(store, home, agent, made, base, {}, now=2.0).name
    move_alias(store, agent, expected=base, to=release, fence=None, now=3.0, is_human=True)
    store.close()
    return base, release
