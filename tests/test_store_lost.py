"""A home whose store was moved away or lost is refused by whoever starts; a first start that died is gone on with."""

from __future__ import annotations

import subprocess
import sys
from itertools import count
from pathlib import Path

import pytest
from sqlalchemy import func, select

from cltrain.errors import DataError
from cltrain.experience.recording import load_secret
from cltrain.store.database import open_store
from cltrain.store.schema import releases
from tests.command import Command, cltrain, free_port, promoted_home
from tests.test_store_gone import move

__all__ = ["cltrain"]  # a fixture

STARTS = """
import sys
from pathlib import Path
from cltrain.experience.recording import load_secret
from cltrain.store.database import open_store

home, dies_at = Path(sys.argv[1]), int(sys.argv[2])
seen = 0

def die(event, words):
    global seen
    if event in ("open", "os.link", "os.remove", "os.mkdir", "sqlite3.connect") and str(home) in str(words[0]):
        seen += 1
        if seen == dies_at:
            import os
            os._exit(9)

sys.addaudithook(die)
print("ready", flush=True)
sys.stdin.readline()
store = open_store(home)
print(load_secret(home).hex(), flush=True)
sys.stdin.readline()
"""


def starting(home: Path, dies_at: int = 0) -> subprocess.Popen[str]:
    """A process that is ready to make its store and secret there, and goes on with every line that it is sent."""
    command = [sys.executable, "-c", STARTS, str(home), str(dies_at)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def go_on(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def lost(home: Path) -> Path:
    """A home with a release and a secret, and its store elsewhere; where to."""
    promoted_home(home)
    load_secret(home)
    move(home, home.parent / "away")
    return home.parent / "away"


@pytest.mark.parametrize(
    "words",
    ["status", "log", "freeze", "unfreeze", "rollback", "promote x", "approve", "report", "gate x", "audit",
     "calibrate", "update", "share", "import lines.jsonl", "kubernetes --pool=p", "run", "serve", "run --only=server",
     "run --only=gateway", "run --only=worker"],
)  # fmt: skip
def test_no_command_makes_an_empty_store_where_one_was_lost(cltrain: Command, tmp_path: Path, words: str) -> None:
    home = tmp_path / "state"
    lost(home)
    (tmp_path / "lines.jsonl").write_text("")
    typed = [word.replace("lines.jsonl", str(tmp_path / "lines.jsonl")) for word in words.split()]
    ports = [f"--set={name}.port={free_port()}" for name in ("server", "gateway")]
    done = cltrain(*typed, f"--home={home}", *ports)
    assert (done.code, f"{home / 'store.db'} is missing, and secret and releases beside it" in done.err) == (3, True), (
        done
    )
    assert "restore" in done.err
    assert "to start anew without them, move secret and releases away too" in done.err
    assert not list(home.glob("store.db*"))


def test_a_doctor_says_that_the_store_is_lost(cltrain: Command, tmp_path: Path) -> None:
    lost(tmp_path / "state")
    done = cltrain("doctor", f"--home={tmp_path / 'state'}", "--json")
    (found,) = (finding for finding in done.json["findings"] if finding["what"] == "decisions")
    assert (done.code, found["state"], "is missing, and secret" in found["detail"]) == (1, "bad", True)


def test_a_store_that_is_put_back_is_whole_and_what_is_left_moved_away_starts_anew(tmp_path: Path) -> None:
    home = tmp_path / "state"
    away = lost(home)
    with pytest.raises(DataError, match="is missing"):
        open_store(home)
    move(away, home)
    with open_store(home).read() as connection:
        assert connection.scalar(select(func.count()).select_from(releases)) == 2
    move(home, away)
    for name in ("secret", "releases"):
        (home / name).rename(away / name)
    open_store(home).close()


@pytest.mark.parametrize("left", ["secret", "releases", "store.db-wal"])
def test_an_empty_file_is_no_store_and_each_trace_of_one_that_was_there_is_enough(tmp_path: Path, left: str) -> None:
    (tmp_path / "releases").mkdir()
    open_store(tmp_path).close()  # a home whose first start went no further
    (tmp_path / "store.db").unlink()
    trace = tmp_path / "releases" / "support" if left == "releases" else tmp_path / left
    trace.write_text("ab" * 32)
    with pytest.raises(DataError, match=f"is missing, and {left} beside it is of a deployment"):
        open_store(tmp_path)
    (tmp_path / "store.db").touch()
    with pytest.raises(DataError, match=f"is empty, and {left} beside it is of a deployment"):
        open_store(tmp_path)
    assert trace.read_text() == "ab" * 32
    assert (tmp_path / "store.db").stat().st_size == 0


def test_keys_that_were_made_first_are_no_trace_of_a_store(cltrain: Command, tmp_path: Path) -> None:
    assert cltrain("keys", "add", f"--home={tmp_path}", "--principal=app", "--scope=infer").code == 0
    open_store(tmp_path).close()


def test_a_first_start_that_died_anywhere_is_followed_by_one_that_goes_on(tmp_path: Path) -> None:
    for dies_at in count(1):
        home = tmp_path / str(dies_at)
        first = starting(home, dies_at)
        first.communicate("\n\n", timeout=60)
        open_store(home).close()
        assert len(load_secret(home)) == 32
        if first.returncode == 0:
            break
        assert first.returncode == 9
    assert dies_at > 4, "it died before the store, and between it and the secret"


def test_processes_that_start_at_once_make_one_store_and_one_secret(tmp_path: Path) -> None:
    for number in range(3):
        processes = [starting(tmp_path / str(number)) for _ in range(3)]
        for process in processes:
            go_on(process)
        said = {process.communicate("\n", timeout=60)[0] for process in processes}
        assert [process.returncode for process in processes] == [0] * 3
        assert len(said) == 1, said
