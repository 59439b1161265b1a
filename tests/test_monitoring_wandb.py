"""wandb in offline mode, read back from its own file: every update exactly once, also after a kill."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cltrain.monitoring.outbox import Pump, emit, watermark
from cltrain.monitoring.rows import update_event
from cltrain.monitoring.wandb_sink import WandbSink
from cltrain.records import BoundReport, Check, Code, Decision, Verdict
from cltrain.store.database import Store, open_store

pytest.importorskip("wandb")

BOUNDS = BoundReport(0.06, 0.1, 0.2, 0.5, 0.05, 0.1, 0.1, 0.5, 0.1, 0.25, 0.2, 0.25, 0.06, 1.0, 100, 200, 24, 100, 0.8)
CHECK = Check("gain", Code.GAIN, Verdict.PROMOTE, "better", 0.8, 0.6, 0.2, 0.1, 0.3, 240)
DECISION = Decision(Verdict.PROMOTE, ("better",), (CHECK,))


def file_records(path: Path) -> Iterator[Any]:
    """The protobuf records of a .wandb file: a LevelDB log in blocks of 32 KiB behind a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2 as proto

    data, at, partial = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _crc, length, kind = struct.unpack("<IHB", data[at : at + 7])
        partial = (partial if kind in (3, 4) else b"") + data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            record = proto.Record()
            record.ParseFromString(partial)
            yield record


def rows(directory: Path) -> list[dict[str, Any]]:
    found = []
    for path in sorted(directory.rglob("*.wandb")):
        for record in file_records(path):
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                found.append({".".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items})
    return found


def sink_in(directory: Path, segment: int = 100) -> WandbSink:
    return WandbSink(
        directory, agent="support", project="cltrain-test", mode="offline", segment=segment
    )  # fmt: skip


def say(store: Store, number: int) -> int:
    with store.write() as connection:
        event = update_event({"number": number, "metrics": {"loss": 1 / number}}, DECISION, BOUNDS)
        return emit(connection, "support", "update", event, 100.0)


def test_offline_run_holds_every_update_with_its_numbers(tmp_path: Path) -> None:
    store = open_store(tmp_path / "state")
    pump = Pump(store, [sink_in(tmp_path / "wandb")])
    seqs = [say(store, number) for number in (1, 2, 3)]
    with store.write() as connection:
        emit(connection, "sales", "update", {"number": 9}, 101.0)  # another agent's run, not this one
    pump.drain()
    pump.close()
    assert pump.problems() == {}
    found = rows(tmp_path / "wandb")
    assert [row["_step"] for row in found] == seqs
    assert [row["update/index"] for row in found] == [1, 2, 3]
    first = found[0]
    assert first["gate/verdict"] == "promote"
    assert first["gate/gain/low"] == 0.1
    assert first["adapter/drift_kl"] == 0.2
    assert first["train/loss"] == 1.0
    assert watermark(store, "wandb:support") == seqs[-1] + 1
    store.close()


@pytest.mark.parametrize("num_after", [0, 3])
def test_updates_survive_the_death_of_wandbs_own_process(tmp_path: Path, num_after: int) -> None:
    psutil = pytest.importorskip("psutil")
    store = open_store(tmp_path / "state")
    pump = Pump(store, [sink_in(tmp_path / "wandb")])
    say(store, 1)
    pump.drain()
    services = [p for p in psutil.Process().children(recursive=True) if "wandb" in p.name()]
    assert services, "wandb keeps its run in a process of its own"
    for service in services:
        service.kill()
    psutil.wait_procs(services, timeout=10)
    for number in range(2, 2 + num_after):
        say(store, number)
        pump.drain()
    pump.close()
    again = Pump(store, [sink_in(tmp_path / "wandb")])  # the next start
    again.drain()
    again.close()
    everything = {number: number for number in range(1, 2 + num_after)}
    assert {row["_step"]: row["update/index"] for row in rows(tmp_path / "wandb")} == everything
    assert watermark(store, "wandb:support") == 1 + num_after
    store.close()


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import test_monitoring_wandb as t
from cltrain.monitoring.outbox import Pump
from cltrain.store.database import open_store
home = Path(sys.argv[1])
store = open_store(home / "state")
pump = Pump(store, [t.sink_in(home / "wandb", segment=2)])
for number in range(1, 6):
    t.say(store, number)
    pump.drain()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_process_leaves_no_hole_and_repeats_land_on_themselves(tmp_path: Path) -> None:
    here = str(Path(__file__).parent)
    env = {k: v for k, v in os.environ.items() if k != "WANDB_SERVICE"}  # a service of its own, that dies unasked
    command = [sys.executable, "-c", KILLED, str(tmp_path), here]
    done = subprocess.run(command, env=env, capture_output=True, timeout=120)
    assert done.returncode == -9, done.stderr.decode()
    store = open_store(tmp_path / "state")
    assert watermark(store, "wandb:support") == 4  # two finished segments of two; the fifth was in flight
    pump = Pump(store, [sink_in(tmp_path / "wandb")])
    say(store, 6)
    pump.drain()
    pump.close()
    by_step = {row["_step"]: row["update/index"] for row in rows(tmp_path / "wandb")}
    assert by_step == {n: n for n in range(1, 7)}
    assert watermark(store, "wandb:support") == 6
    store.close()
