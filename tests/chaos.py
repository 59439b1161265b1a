"""Kill -9 of a real deployment's processes at chosen moments of an update, with what was not yet on disk taken back.

One of three processes dies, or all as in a power cut. What a lone victim had written is taken back while the others
stand still; its writes to the shared store only if no other process is in the middle of one.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import re
import shutil
import signal
import struct
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from cltrain.api import Deployment
from cltrain.config import Config, load
from cltrain.demo import world
from cltrain.demo.run import _free_ports
from cltrain.launch import PROCESSES, gateway_url, server_url
from cltrain.registry import aliases
from cltrain.store.database import open_store
from tests.chaos_checks import (
    AGENT,
    broken_serving,
    half_done,
    lost_or_doubled,
    read_only,
    served_without_a_row,
    updates_of,
)
from tests.chaos_load import ELSEWHERE, TicketLoad, chat_body
from tests.crash import Crashable, Dropped, build_library, drop_unsynced
from tests.deployments import config_for

NUM_STEPS, NUM_ITEMS = 6, 60
AIM_WAIT_S = 30.0  # for the moment of an update that a kill aims at
UP_WAIT_S = 90.0
STORE_LOCKS = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 120, 3, 0)  # SQLite's write, checkpoint, recover bytes
AIMS = {  # what the worker says just before -> the longest delay after it, seconds
    "training": (rf"trained [1-{NUM_STEPS - 1}] steps", 0.15),
    "sealing": (rf"trained {NUM_STEPS} steps", 0.6),
    "judging": (rf"judged on 0 of {NUM_ITEMS} items", 0.8),
    "deciding": (rf"judged on {NUM_ITEMS} of {NUM_ITEMS} items", 0.06),
    "planning": (r"update \d+: (promote|hold|reject|error)", 2.3),
    "any": ("", 5.0),
}
DECK = (  # (aim, victims): the first five are the test's
    ("sealing", "worker"), ("deciding", "all"), ("training", "gateway"), ("judging", "server"), ("training", "all"),
    ("deciding", "worker"), ("judging", "worker"), ("any", "all"), ("planning", "worker"), ("sealing", "all"),
    ("deciding", "worker"), ("training", "worker"), ("judging", "all"), ("deciding", "server"), ("sealing", "server"),
    ("any", "gateway"), ("deciding", "all"), ("training", "server"), ("judging", "gateway"), ("sealing", "worker"),
    ("deciding", "gateway"), ("planning", "all"), ("any", "server"), ("training", "worker"), ("sealing", "all"),
    ("deciding", "all"), ("judging", "server"), ("any", "worker"), ("planning", "gateway"), ("deciding", "worker"),
)  # fmt: skip


@dataclass
class KillRow:
    """One kill: what died when, what that cost, and what was wrong afterwards."""

    number: int
    victims: str
    aim: str
    was_aim_met: bool
    at_s: float  # since the deployment was up
    delay_s: float  # after the line that was aimed at
    last_line: str  # of the worker before it
    update: str | None  # the newest, and how far the store says it was
    update_state: str | None
    num_acknowledged: int
    num_writes_dropped: int
    num_files_dropped: int
    is_store_taken_back: bool
    incumbent: str = ""  # that answered after the restart
    answered_s: float = 0.0  # from the kill until then
    problems: list[str] = field(default_factory=list)


@dataclass
class ChaosLog:
    kills: list[KillRow] = field(default_factory=list)
    updates: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)  # found at the end
    num_acknowledged: int = 0
    num_resent: int = 0
    seconds: float = 0.0

    @property
    def all_problems(self) -> list[str]:
        return [f"kill {row.number}: {problem}" for row in self.kills for problem in row.problems] + self.problems

    def figures(self) -> dict[str, Any]:
        """Every figure is recomputable from the rows."""

        def counted(values: Sequence[Any]) -> dict[str, int]:
            return {str(value): values.count(value) for value in sorted(set(values), key=str)}

        waits = sorted(row.answered_s for row in self.kills)
        return {
            "kills": len(self.kills),
            "victims": counted([row.victims for row in self.kills]),
            "aims": counted([row.aim for row in self.kills if row.was_aim_met]),
            "update_states_at_kill": counted([row.update_state for row in self.kills]),
            "writes_dropped": sum(row.num_writes_dropped for row in self.kills),
            "acknowledged": self.num_acknowledged,
            "resent": self.num_resent,
            "updates": counted([f"{row['state']} {row['verdict']}" for row in self.updates]),
            "answered_s_p50": waits[len(waits) // 2] if waits else None,
            "answered_s_max": waits[-1] if waits else None,
            "problems": self.all_problems,
            "seconds": self.seconds,
        }


class Victims:
    """The three processes of one deployment, each under the library that can take unsynced writes back."""

    def __init__(self, home: Path, arguments: Sequence[str], config: Config) -> None:
        self.state, self.undo, self.logs = config.state_dir, home / "undo", home / "logs"
        self.logs.mkdir()
        self.arguments = arguments
        library = build_library(home)
        self.running = {name: Crashable(library, self.state, self.undo) for name in PROCESSES}

    def start(self, *names: str) -> None:
        for name in names:
            command = [sys.executable, "-m", "cltrain", "run", "--only", name, *self.arguments]
            environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
            self.running[name].start(command, environment, self.logs / f"{name}.log")

    def stop(self) -> None:
        for crashable in self.running.values():
            if crashable.process is not None:
                crashable.kill()

    def ended(self) -> dict[str, int]:
        """Processes that ended by themselves, with their exit codes."""
        found = {name: c.process.poll() for name, c in self.running.items() if c.process is not None}
        return {name: code for name, code in found.items() if code is not None}

    def crash(self, victims: str) -> tuple[Dropped, bool]:
        """Kill one process, or `all`, and take its unsynced writes back; also says whether those to the store went."""
        if victims == "all":
            for crashable in self.running.values():
                assert crashable.process is not None
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(crashable.process.pid, signal.SIGKILL)
            for crashable in self.running.values():
                crashable.kill()
            return drop_unsynced(self.state, self.undo), True
        with self._standing_still([name for name in self.running if name != victims]):
            self.running[victims].kill()
            is_store_free = not _is_locked(self.state / "store.db-shm")

            def is_lost(path: Path) -> bool:
                if path.name.endswith("-shm"):  # memory of those who live on
                    return False
                is_store = path.name.startswith("store.db")
                return is_store_free if is_store else victims == "worker"  # the others write nothing but the store

            return drop_unsynced(self.state, self.undo, is_lost), is_store_free

    @contextmanager
    def _standing_still(self, names: Sequence[str]) -> Iterator[None]:
        pids = [process.pid for name in names if (process := self.running[name].process) is not None]
        try:
            for pid in pids:
                os.killpg(pid, signal.SIGSTOP)
            while any(_is_moving(pid) for pid in pids):
                time.sleep(0.0005)
            yield
        finally:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGCONT)


def _is_moving(pid: int) -> bool:
    """Whether any thread of the process still runs, or waits for the disk."""
    with contextlib.suppress(OSError):
        stats = [(task / "stat").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]
        return any(stat.rpartition(")")[2].split()[0] not in "TtZX" for stat in stats)
    return False


def _is_locked(shared_memory: Path) -> bool:
    """Whether somebody is writing to the store, or moving its log into it. This process must not have it open."""
    with contextlib.suppress(FileNotFoundError), shared_memory.open("r+b") as file:
        found = fcntl.fcntl(file, fcntl.F_GETLK, STORE_LOCKS)
        return bool(struct.unpack("hhqqi4x", found)[0] != fcntl.F_UNLCK)
    return False


class Chaos:
    """A deployment under load, and the hand that kills it."""

    def __init__(self, home: Path, seed: int) -> None:
        home.mkdir(parents=True, exist_ok=True)
        self.config, arguments = deployment_in(home)
        open_store(self.config.state_dir).close()  # `cltrain run` too makes it before it starts anything
        self.home, self.rng = home, random.Random(seed)
        self.victims = Victims(home, arguments, self.config)
        self.load = TicketLoad(gateway_url(self.config), num_clients=2, seed=seed)
        self.http = httpx.Client(timeout=20.0, trust_env=False)
        self.log = ChaosLog()
        self.num_probes = 0

    def run(self, num_kills: int, on_kill: Callable[[KillRow], None] = lambda row: None) -> ChaosLog:
        begun = time.monotonic()
        deck = [DECK[i % len(DECK)] for i in range(num_kills)]
        self.rng.shuffle(deck)
        try:
            self.victims.start(*PROCESSES)
            self._until_answered()
            self.up_at = time.monotonic()
            with self.load:
                for number, (aim, victims) in enumerate(deck, 1):
                    row = self.kill(number, aim, victims)
                    self.log.kills.append(row)
                    on_kill(row)
            self._settle()
        finally:
            self.victims.stop()
            self.http.close()
            self.log.seconds = time.monotonic() - begun
        self.log.problems += [f"client: {failure}" for failure in self.load.failures]
        self.log.num_acknowledged, self.log.num_resent = len(self.load.acknowledged), self.load.num_resent
        return self.log

    def kill(self, number: int, aim: str, victims: str) -> KillRow:
        was_met, delay_s, line = self._take_aim(aim)
        row = KillRow(
            number, victims, aim, was_met, time.monotonic() - self.up_at, delay_s, line, None, None, 0, 0, 0, False
        )
        row.problems += [f"{name} had ended by itself with code {code}" for name, code in self.victims.ended().items()]
        killed_at = time.monotonic()
        dropped, row.is_store_taken_back = self.victims.crash(victims)
        row.num_writes_dropped, row.num_files_dropped = dropped.num_writes, dropped.num_files
        row.num_acknowledged = len(self.load.acknowledged)
        with self._as_found(is_alive=victims != "all") as store:
            row.problems += lost_or_doubled(store, self.load.acknowledged)
            row.problems += broken_serving(store, self.config.state_dir)
            if newest := updates_of(store)[-1:]:
                row.update, row.update_state = newest[0].id, newest[0].state
        self.victims.start(*(PROCESSES if victims == "all" else [victims]))
        row.incumbent, problems = self._until_answered()
        row.answered_s = time.monotonic() - killed_at
        row.problems += problems
        return row

    def _take_aim(self, aim: str) -> tuple[bool, float, str]:
        """Wait for the worker to say that the moment is near, then a random while; also its last line."""
        pattern, longest_s = AIMS[aim]
        log = self.victims.logs / "worker.log"
        start, deadline = log.stat().st_size, time.monotonic() + AIM_WAIT_S
        was_met = False
        skipped = self.rng.randrange(NUM_STEPS // 2) if aim == "training" else 0
        while not was_met and time.monotonic() < deadline and not self.victims.ended():
            new = log.read_bytes()[start:].decode(errors="replace")
            was_met = len(re.findall(pattern, new)) > skipped
            time.sleep(0.003)
        delay_s = self.rng.uniform(0.0, longest_s)
        time.sleep(delay_s)
        lines = [line for line in log.read_text(errors="replace").splitlines() if "cltrain.worker" in line]
        return was_met, delay_s, lines[-1].partition("cltrain.worker ")[2] if lines else ""

    @contextmanager
    def _as_found(self, *, is_alive: bool) -> Iterator[Any]:
        """The store to look at; after a power cut a copy, so that the processes themselves meet what was left."""
        directory = self.config.state_dir
        if not is_alive:
            directory = self.home / "found"
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir()
            for file in self.config.state_dir.glob("store.db*"):
                shutil.copy(file, directory)
        store = read_only(directory)
        try:
            yield store
        finally:
            store.close()

    def _alias(self) -> str:
        with self._as_found(is_alive=True) as store:
            return aliases.read_alias(store, AGENT).release

    def _until_answered(self) -> tuple[str, list[str]]:
        """Ask through the gateway until there is an answer; who gave it, and what is wrong with that."""
        deadline = time.monotonic() + UP_WAIT_S
        said: object = None
        while time.monotonic() < deadline:
            if ended := self.victims.ended():
                for name in ended:
                    self.victims.running[name].kill()
                    self.victims.start(name)
                return "", [f"{name} ended by itself with code {code}" for name, code in ended.items()]
            self.num_probes += 1
            (ticket,) = world.training_tickets("find", seed=0, count=1, name=f"probe{self.num_probes}")
            headers = {"X-Session-Id": ticket.id, "X-Session-Done": "1"}
            try:
                before = self._alias()
                url = f"{gateway_url(self.config)}/v1/chat/completions"
                answer = self.http.post(url, json=chat_body(ticket), headers=headers)
                said = f"{answer.status_code} {answer.text[:200]}"
                if answer.status_code == 200:
                    by = answer.headers["x-cltrain-adapter"]
                    problems = (
                        [] if by in (before, self._alias()) else [f"{by} answered, and {before} is the incumbent"]
                    )
                    return by, problems + self._listed()
            except Exception as error:  # whatever is not up yet; the last of them is reported
                said = repr(error)
            time.sleep(0.05)
        return "", [f"nobody answered within {UP_WAIT_S:g} s: {said}"]

    def _listed(self) -> list[str]:
        cards = self.http.get(f"{server_url(self.config)}/v1/models").json()["data"]
        listed = {card["id"]: card.get("root") or "" for card in cards if card.get("parent")}
        with self._as_found(is_alive=True) as store:
            return served_without_a_row(store, self.config.state_dir, listed)

    def _settle(self) -> None:
        """No more load: wait until no update runs, then look at everything once more."""
        deadline = time.monotonic() + UP_WAIT_S
        is_busy = True
        while is_busy and time.monotonic() < deadline and not self.victims.ended():
            time.sleep(0.2)
            with self._as_found(is_alive=True) as store:
                is_busy = any(u.state in ("training", "judging") for u in updates_of(store))
            is_busy = is_busy or "carries on" in "".join(self._worker_lines()[-1:])
        self.log.problems += [f"{name} ended by itself with code {code}" for name, code in self.victims.ended().items()]
        self.victims.stop()
        with self._as_found(is_alive=True) as store:
            self.log.problems += lost_or_doubled(store, self.load.acknowledged)
            self.log.problems += broken_serving(store, self.config.state_dir)
            self.log.problems += half_done(store, self.config.state_dir)
            shown = ("id", "state", "verdict", "candidate", "parent", "started_at", "finished_at")
            self.log.updates = [
                {**{key: getattr(u, key) for key in shown}, "reasons": (u.summary or {}).get("reasons")}
                for u in updates_of(store)
            ]
        deployment = Deployment(self.config)
        deployment.status()
        deployment.report()
        deployment.store.close()

    def _worker_lines(self) -> list[str]:
        return (self.victims.logs / "worker.log").read_text(errors="replace").splitlines()


def deployment_in(home: Path) -> tuple[Config, list[str]]:
    """The demo's deployment cut down to updates of a few seconds that start by themselves and mostly promote."""
    server, gateway = _free_ports(2)
    config = config_for(
        home,
        "",
        agent={"updates": "when_ready", "learn_from": ["agent", "operator", "rehearsal", ELSEWHERE]},
        experience={"min_window": 8, "max_window": 32, "idle_end_s": 20},
        trainer={"num_steps": NUM_STEPS, "batch_size": 8, "kl_batch": 4, "lr": 1e-3, "checkpoint_every": 2},
        bounds={"step_frobenius": 1.0, "drift_frobenius": 4.0, "step_kl": 4.0, "drift_kl": 4.0},
        gate={"items_per_gate": NUM_ITEMS, "promote_on": "non_inferior", "margin": 0.4,
              "stratum_margin": 0.9, "base_kl": 4.0, "max_uses": 1000},
        server={"url": None, "port": server, "max_adapters": 6},
        gateway={"port": gateway},
    )  # fmt: skip
    arguments = []
    for section, values in config.model_dump(mode="json", exclude_unset=True).items():
        keys = {section: values} if not isinstance(values, dict) else {f"{section}.{k}": v for k, v in values.items()}
        arguments += [f"--set={key}={json.dumps(value)}" for key, value in keys.items() if value is not None]
    return load([], [argument.removeprefix("--set=") for argument in arguments]), arguments
