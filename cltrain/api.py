"""The same things from Python: a `Deployment` is one state directory and one agent in it. Imports no torch.

What must work while everything else is down (status, freeze, unfreeze, rollback) touches the store alone.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from sqlalchemy import func, insert, select, update

from cltrain import launch
from cltrain.config import BoundsConfig, Config, load
from cltrain.errors import DataError, ServerError
from cltrain.models.digest import base_path
from cltrain.registry import aliases, decisions, releases
from cltrain.registry.reserve import make_reserve, reserve_freed
from cltrain.store import schema
from cltrain.store.database import Store, open_store

if TYPE_CHECKING:
    from cltrain.certificate import Certificate

Progress = Callable[[str], None]


def quiet(_line: str) -> None:
    """A progress callback that says nothing."""


def verify(
    release: Path,
    *,
    base: Path | None = None,
    anchors: Path | None = None,
    parent: Path | None = None,
    limits: BoundsConfig | None = None,
) -> Certificate:
    """Recompute a release's bounds from its directory, the base, the anchors and its parent's directory alone.

    Needs no deployment. See `cltrain.certificate.certify` for the defaults and what it raises. Imports torch.
    """
    from cltrain.certificate import certify

    return certify(release, base_dir=base, anchors=anchors, parent=parent, limits=limits)


class Deployment:
    """One agent's state: what serves, what is waiting, what was decided."""

    def __init__(self, config: Config, arguments: Sequence[str] = ()) -> None:
        self.config = config
        self.arguments = tuple(arguments)  # what a child process is started with to see the same configuration

    @cached_property
    def store(self) -> Store:
        """Opened at its first use, so that an emergency can make room on a full disk before. Raises DataError."""
        return open_store(self.config.state_dir)

    @classmethod
    def open(cls, arguments: Sequence[str] = ()) -> Deployment:
        """From `--config=FILE` and `--set=KEY=VALUE` words. Raises ConfigError naming what is wrong."""
        files = [Path(word.removeprefix("--config=")) for word in arguments if word.startswith("--config=")]
        overrides = [word.removeprefix("--set=") for word in arguments if word.startswith("--set=")]
        return cls(load(files, overrides), arguments)

    @property
    def agent(self) -> str:
        return self.config.agent.name

    # ------------------------------------------------------------ state

    def status(self) -> dict[str, Any]:
        """What serves, what is waiting, what the last five updates said; answers within a second.

        `immature`: ended episodes that wait for feedback or for `mature_after_s`; `late_feedback`: pieces that came
        after their episode was learned from; `sinks`: events that each has not kept yet.
        """
        from cltrain.experience import rows, waiting
        from cltrain.monitoring.outbox import lags

        agent, s, now = self.agent, schema, time.time()
        with self.store.read() as connection:
            alias = connection.execute(select(s.aliases).where(s.aliases.c.agent == agent)).first()
            switch = connection.execute(select(s.agents).where(s.agents.c.agent == agent)).first()
            recent = connection.execute(
                select(s.updates).where(s.updates.c.agent == agent).order_by(s.updates.c.number.desc()).limit(5)
            ).all()

            def count(table: Any, *where: Any) -> int:
                return int(connection.execute(select(func.count()).select_from(table).where(*where)).scalar_one())

            num_records = count(s.records, s.records.c.agent == agent)
            num_feedback = count(s.feedback, s.feedback.c.agent == agent)
            num_set_aside = rows.num_set_aside(connection, agent)
            sinks = lags(connection)
            screened = connection.execute(
                select(s.screenings.c.status, func.count()).where(s.screenings.c.agent == agent).group_by("status")
            ).all()
        try:
            chain = decisions.verify_chain(self.store)
            chain_state, num_decisions = "unbroken", chain.num_entries
        except DataError as error:
            chain_state, num_decisions = f"BROKEN: {error}", -1
        is_worked_on = switch is not None and switch.lease_until is not None and switch.lease_until > now
        return {
            "agent": agent,
            "mode": str(self.config.agent.mode),
            "frozen": bool(switch and switch.is_frozen),
            "frozen_reason": switch.frozen_reason if switch else None,
            "release": alias.release if alias else None,
            "previous": alias.previous if alias else None,
            "anchor": alias.anchor if alias else None,
            "high_water": alias.high_water if alias else None,
            "records": num_records,
            "immature": waiting.num_immature(self.store, agent, self.config.experience.mature_after_s, now),
            "screenings": {row[0]: int(row[1]) for row in screened},
            "feedback": num_feedback,
            "late_feedback": waiting.num_late_feedback(self.store, agent),
            "set_aside": num_set_aside,
            "sinks": sinks,
            "decisions": num_decisions,
            "chain": chain_state,
            "processes": {
                "gateway": _is_up(launch.gateway_url(self.config)),
                "server": _is_up(launch.server_url(self.config)),
                "worker": "up" if is_worked_on else "down",
            },
            "updates": [
                {
                    "number": row.number,
                    "id": row.id,
                    "state": row.state,
                    "verdict": row.verdict,
                    "candidate": row.candidate,
                    "reason": "; ".join((row.summary or {}).get("reasons", ())[:1]),
                }
                for row in recent
            ],
        }

    # ------------------------------------------------------------ switches

    def freeze(self, reason: str = "asked for by the owner") -> dict[str, Any]:
        """Nothing is learned until `unfreeze`; an update under way is discarded at its end."""
        with reserve_freed(self.config.state_dir):
            aliases.freeze(self.store, self.agent, now=time.time(), reason=reason)
        return {"agent": self.agent, "frozen": True, "reason": reason}

    def unfreeze(self) -> dict[str, Any]:
        aliases.unfreeze(self.store, self.agent, now=time.time())
        return {"agent": self.agent, "frozen": False, "mode": str(self.config.agent.mode)}

    def rollback(
        self, to: str | None = None, *, keep_learning: bool = False, reason: str = "asked for by the owner"
    ) -> dict[str, Any]:
        """Serve an earlier release again (default: the one before), with every process down if need be."""
        now = time.time()
        with reserve_freed(self.config.state_dir):
            done = aliases.rollback(self.store, self.agent, to=to, now=now, reason=reason, freeze=not keep_learning)
        # it is resident as a rule; a server that is away gets it when it is back
        with contextlib.suppress(ServerError):
            directory = releases.release_dir(self.config.state_dir, releases.get(self.store, done.alias.release))
            if directory is not None and _is_up(launch.server_url(self.config)) == "up":
                with self._client() as client:
                    client.load(done.alias.release, directory)
        return {
            **asdict(done.alias),
            "undone": done.undone,
            "quarantined": done.num_quarantined,
            "frozen": done.is_frozen,
        }

    def promote(self, release: str) -> dict[str, Any]:
        """A human's yes: every server gets the release first, then the alias moves and the anchor with it.

        Raises DataError when its files are not those that were sealed, ServerError when a server cannot load it,
        ConflictError when the gate said no.
        """
        from cltrain.deploy.preflight import check_adapter

        found = releases.get(self.store, release)
        alias = aliases.read_alias(self.store, self.agent)
        releases.verify_release(self.config.state_dir, found)
        directory = releases.release_dir(self.config.state_dir, found)
        if directory is not None:
            check_adapter(directory, base_dir=base_path(self.config.base.path))
        aliases.require_judged(self.store, self.agent, release, alias.release)
        if directory is not None:
            with self._client() as client:
                client.load(release, directory)
        now = time.time()
        moved = aliases.move_alias(
            self.store, self.agent, expected=alias, to=release, fence=None, now=now, is_human=True
        )
        aliases.file_approved(self.store, self.agent, release, now)
        return asdict(moved)

    # ------------------------------------------------------------ learning

    def update(self, *, trial: bool = False, wait_s: float = 3600.0, on_progress: Progress = quiet) -> dict[str, Any]:
        """One update now; by the running worker if there is one, else in this process (which then imports torch).

        A trial is trained and judged like any other and then thrown away. Returns verdict, reasons, candidate, ...
        """
        if self._worker_is_up():
            return self.request("trial" if trial else "update", wait_s=wait_s)
        with self._own_server(on_progress):
            from cltrain.worker import Worker

            with Worker(self.config, self.store, on_progress=on_progress) as worker:
                return worker.update(is_trial=trial)

    def gate(self, release: str, *, on_progress: Progress = quiet) -> dict[str, Any]:
        """Judge a release against what serves now; nothing moves."""
        launch.check_takes_adapters(self.config)
        releases.get(self.store, release)  # an unknown name is said before a server is started for it
        with self._own_server(on_progress):
            from cltrain.worker import Worker

            with Worker(self.config, self.store, on_progress=on_progress, takes_lease=False) as worker:
                return worker.judge_again(release)

    def calibrate(self, *, on_progress: Progress = quiet) -> dict[str, Any]:
        """Propose budgets from naive updates on what is waiting, made in a scratch directory; nothing here changes."""
        from cltrain.calibration import calibrate

        return calibrate(self.config, self.store, now=time.time(), on_progress=on_progress)

    def request(self, kind: str, options: dict[str, Any] | None = None, *, wait_s: float = 3600.0) -> dict[str, Any]:
        """Ask the running worker for something and wait for its answer. Raises ServerError after `wait_s` seconds."""
        request = self.post_request(kind, options)
        deadline = time.monotonic() + wait_s
        try:
            while (outcome := self.request_outcome(request)) is None:
                if time.monotonic() > deadline:
                    raise ServerError(f"the worker did not answer request {request} within {wait_s:g} s; see its log")
                time.sleep(0.05)
        except BaseException:
            self.withdraw_request(request)
            raise
        if "error" in outcome:
            raise ServerError(f"the worker could not do it: {outcome['error']}")
        return outcome

    def withdraw_request(self, request: int) -> None:
        """Nobody waits for it any more: a worker that has not begun with it leaves it."""
        unanswered = (schema.requests.c.id == request) & schema.requests.c.outcome.is_(None)
        with self.store.write() as connection:
            outcome = {"error": "withdrawn: the asker gave up"}
            connection.execute(update(schema.requests).where(unanswered).values(outcome=outcome))

    def post_request(self, kind: str, options: dict[str, Any] | None = None) -> int:
        """Leave a request for the worker; returns its number."""
        row = {"agent": self.agent, "kind": kind, "options": options or {}, "created_at": time.time()}
        with self.store.write() as connection:
            result = connection.execute(insert(schema.requests).values(**row))
            assert result.inserted_primary_key is not None
            return int(result.inserted_primary_key[0])

    def request_outcome(self, request: int) -> dict[str, Any] | None:
        with self.store.read() as connection:
            query = select(schema.requests.c.outcome).where(schema.requests.c.id == request)
            outcome: dict[str, Any] | None = connection.execute(query).scalar()
        return outcome

    # ------------------------------------------------------------ input and output

    def import_file(self, file: Path, *, producer: str | None = None) -> dict[str, Any]:
        """Take past episodes in; every line is imported, a duplicate, or set aside with a reason.

        With the base's tokenizer at hand the report also counts the new episodes that the base cannot take.
        """
        from cltrain.experience.ingest import import_file
        from cltrain.experience.reading import last_seq
        from cltrain.experience.recording import Recorder, load_secret

        store = self.store  # opened first: it makes the directory that the secret is kept in
        secret = load_secret(self.config.state_dir)
        before = last_seq(store)
        with Recorder(store, secret, self.config.experience.eval_share) as recorder:
            report = asdict(import_file(recorder, file, self.agent, producer=producer))
        from cltrain.worker import count_fitting

        return {**report, **count_fitting(self.config, self.store, self.agent, after_seq=before)}

    def report(self, number: int | None = None) -> Path:
        """Write the page of one update, or of the whole run; returns its path."""
        from cltrain.reporting import write_report

        return write_report(self.store, self.config, number)

    def run_process(self, name: str) -> None:
        """Be one of the processes until told to stop. Raises ConfigError for an unknown name."""
        from cltrain.processes import run_process

        run_process(name, self.config, self.store)

    def doctor(self) -> list[dict[str, str]]:
        """What would go wrong: one finding a line, `state` good, note or bad."""
        from cltrain.doctor import examine

        return examine(self.config, self.store)

    def keep_room(self) -> bool:
        """Set a few megabytes aside for a rollback or a freeze on a full disk; returns whether there was room.

        Raises DataError when there can be no store: said here, before any process is started.
        """
        with self.store.read():
            return make_reserve(self.config.state_dir)

    # ------------------------------------------------------------ inside

    def _worker_is_up(self) -> bool:
        with self.store.read() as connection:
            query = select(schema.agents.c.lease_until).where(schema.agents.c.agent == self.agent)
            until = connection.execute(query).scalar()
        return until is not None and until > time.time()

    def _own_server(self, on_progress: Progress) -> Any:
        """A server for as long as this process needs one, unless the configured one answers already."""
        launch.check_takes_adapters(self.config)
        if _is_up(launch.server_url(self.config)) == "up":
            return nullcontext()
        if "server" not in launch.needed(self.config):
            raise ServerError(f"{launch.server_url(self.config)} does not answer: start it, or leave server.url out")
        return launch.Fleet(self.config, self.arguments, ("server",), on_event=on_progress)

    def _client(self) -> Any:
        from cltrain.deploy.client import ServerClient

        model = self.config.server.model or "base"
        return ServerClient(launch.server_url(self.config), model, self.config.server.timeout_s)


def _is_up(url: str) -> str:
    """Whether a process answers there. A port is knocked at first: the HTTP client alone costs a fifth of a second."""
    place = urlsplit(url)
    try:
        socket.create_connection(
            (place.hostname or "", place.port or (443 if place.scheme == "https" else 80)), 0.3
        ).close()
    except OSError:
        return "down"
    import httpx

    try:
        return "up" if httpx.get(f"{url}/health", timeout=0.3, trust_env=False).status_code == 200 else "unwell"
    except httpx.HTTPError:
        return "unwell"
