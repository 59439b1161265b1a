"""The demo: one deployment, one stream of tickets, two learners, one table.

Starts the processes that `cltrain run` starts, works the tickets window by window, asks the worker for an update after
each, and goes on working the next window meanwhile, so every swap happens under traffic. A second process learns
naively from the same records.
"""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import select

from cltrain import launch
from cltrain.api import Deployment
from cltrain.config import Config
from cltrain.demo import summary, world
from cltrain.demo.agent import Desk, Outcome, opinions
from cltrain.demo.inputs import write_inputs
from cltrain.errors import DataError, ServerError
from cltrain.store.schema import records

NUM_CHATTING = 1  # tickets in flight while an update runs, so that the swap meets traffic
CHAT_PAUSE_S = 1.5


@dataclass
class WindowLog:
    """What happened to one window: its tickets' records and what the update that read it said."""

    window: world.Window
    success: float
    records: list[str]
    bad_tickets: dict[str, world.Ticket]  # by record: those whose correction feed lies
    update: dict[str, Any] = field(default_factory=dict)


@dataclass
class Stream:
    """The running demo: the desk, the deployment, and what has been seen so far."""

    deployment: Deployment
    desk: Desk
    naive: NaiveProcess
    seed: int
    rng: random.Random
    logs: list[WindowLog] = field(default_factory=list)
    trial: dict[str, Any] = field(default_factory=dict)
    late: list[dict[str, Any]] = field(default_factory=list)
    learned: dict[str, float] = field(default_factory=dict)  # naive's skill right after its phase
    naive_tasks: list[asyncio.Task[Any]] = field(default_factory=list)

    async def run(self, windows: Sequence[world.Window]) -> None:
        """Work every window; the update of one runs while the next is worked."""
        pending: int | None = None
        for number, window in enumerate(windows):
            hold = asyncio.Event()
            work = asyncio.create_task(self.desk.work(window.tickets, hold if pending is not None else None))
            if pending is not None:
                await self.finish_update(pending)
            hold.set()
            log = self.note(window, await work)
            self.say_window(number + 1, len(windows), log)
            soon, late = opinions(self.outcomes, self.rng)
            await self.desk.say([*self.late, *soon])
            self.late = late
            self.teach_naive(
                window, log, is_last=number + 1 == len(windows) or windows[number + 1].phase != window.phase
            )
            upto = self.newest_record()
            if window.kind == "poison" and not self.trial:
                self.trial = await self.wait_for(self.deployment.post_request("trial", {"upto": upto, "filter": False}))
                say(f"       unfiltered, the gate says {self.trial['verdict']}: {self.trial['reasons'][0]}")
            pending = self.deployment.post_request("update", {"upto": upto})
        assert pending is not None
        await self.finish_update(pending)
        await asyncio.gather(*self.naive_tasks)

    def note(self, window: world.Window, outcomes: list[Outcome]) -> WindowLog:
        self.outcomes = outcomes
        success = sum(outcome.success for outcome in outcomes) / max(1, len(outcomes))
        bad = {
            o.trajectory: o.ticket
            for o in outcomes
            if o.ticket.kind != "clean" and o.ticket.claimed != o.ticket.expected
        }
        self.logs.append(WindowLog(window, success, [o.trajectory for o in outcomes], bad))
        return self.logs[-1]

    async def finish_update(self, request: int) -> None:
        log = self.logs[-1]
        stop = asyncio.Event()
        chatter = [asyncio.create_task(self.chat(stop, i)) for i in range(NUM_CHATTING)]
        log.update = await self.wait_for(request)
        stop.set()
        await asyncio.gather(*chatter)
        say("       " + summary.describe_update(log.update))

    async def chat(self, stop: asyncio.Event, number: int) -> None:
        """Ordinary tickets that nobody comments on, until told to stop."""
        round_number = 0
        while not stop.is_set():
            name = f"chat{len(self.logs)}-{number}-{round_number}"
            await self.desk.work(world.training_tickets("find", seed=self.seed, count=1, name=name))
            round_number += 1
            await asyncio.sleep(CHAT_PAUSE_S)

    async def wait_for(self, request: int) -> dict[str, Any]:
        deadline = time.monotonic() + 180
        while (outcome := self.deployment.request_outcome(request)) is None:
            if time.monotonic() > deadline:
                raise ServerError(
                    f"the worker did not answer within 180 s; see {self.deployment.config.state_dir}/logs"
                )
            await asyncio.sleep(0.05)
        if "error" in outcome:
            raise ServerError(f"the worker could not update: {outcome['error']}")
        return outcome

    def teach_naive(self, window: world.Window, log: WindowLog, *, is_last: bool) -> None:
        async def teach() -> None:
            await self.naive.ask({"learn": log.records})
            if is_last and window.skill not in self.learned:
                self.learned |= await self.naive.ask({"skills": [window.skill]})

        self.naive_tasks.append(asyncio.create_task(teach()))

    def newest_record(self) -> int:
        with self.deployment.store.read() as connection:
            return int(connection.execute(select(records.c.seq).order_by(records.c.seq.desc()).limit(1)).scalar() or 0)

    def say_window(self, number: int, total: int, log: WindowLog) -> None:
        window = log.window
        kind = "" if window.kind == "clean" else f"  [{window.kind}]"
        say(f"{number:>2}/{total}  {window.skill:<8} {len(log.records)} tickets, {log.success:.0%} solved{kind}")


class NaiveProcess:
    """The second learner, one command at a time."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.lock = asyncio.Lock()

    @classmethod
    async def start(cls, config: Config, seed: int, log: Path) -> NaiveProcess:
        with log.open("ab") as errors:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "cltrain.demo.naive", config.model_dump_json(), str(seed),
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=errors, limit=1 << 24,
            )  # fmt: skip
        return cls(process)

    async def ask(self, command: dict[str, Any]) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        async with self.lock:
            self.process.stdin.write(json.dumps(command).encode() + b"\n")
            await self.process.stdin.drain()
            line = await self.process.stdout.readline()
        if not line:
            raise ServerError("the naive learner ended early; see logs/naive.log")
        return json.loads(line)

    async def stop(self) -> None:
        if self.process.returncode is None:
            self.process.terminate()
            await self.process.wait()


def run_demo(out: Path, seed: int, settings: Sequence[str] = ()) -> dict[str, Any]:
    """Run the whole demo into `out` (emptied first if an earlier demo filled it); returns what summary.json holds.

    `settings`: `section.key=value`, over the demo's own.
    """
    started = time.monotonic()
    out = out.resolve()
    _empty(out)
    server, gateway = _free_ports(2)
    ports = f"[server]\nport = {server}\nmax_batch = 32\n[gateway]\nport = {gateway}\n"
    config_file = write_inputs(out, seed, ports)
    deployment = Deployment.open([f"--config={config_file}", *(f"--set={setting}" for setting in settings)])
    say(f"seed {seed}; everything goes to {out}")
    result = asyncio.run(_run(deployment, out, seed, started))
    (out / "summary.json").write_text(json.dumps(result, indent=2) + "\n")
    summary.print_table(result, out, deployment)
    return result


async def _run(deployment: Deployment, out: Path, seed: int, started: float) -> dict[str, Any]:
    config = deployment.config
    (config.state_dir / "logs").mkdir(parents=True, exist_ok=True)
    naive = await NaiveProcess.start(config, seed, config.state_dir / "logs" / "naive.log")
    try:
        with launch.Fleet(config, deployment.arguments, launch.PROCESSES, on_event=say) as fleet:
            desk = Desk(launch.gateway_url(config), config.agent.name)
            stream = Stream(deployment, desk, naive, seed, random.Random(f"{seed}/opinions"))
            await stream.run(world.phases(seed))
            assert fleet.restarts == 0, "a process of the demo died; see its log"
        say("the stream is over; examining every adapter that served, and the naive one")
        served = summary.served_releases(deployment)
        exams = await naive.ask({"releases": served})
        naive_exam = await naive.ask({"finish": True})
        return summary.build(stream, exams, naive_exam, seconds=time.monotonic() - started)
    finally:
        await naive.stop()


def _empty(out: Path) -> None:
    if out.exists() and any(out.iterdir()):
        if not (out / "demo.toml").exists():
            raise DataError(f"{out} is not empty and holds no earlier demo: choose another --out")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def say(line: str) -> None:
    print(line, flush=True)
