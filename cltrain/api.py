"""The same things from Python: a `Deployment` is one state directory and one agent in it. Imports no torch.

What must work while everything else is down (status, freeze, unfreeze, rollback) touches the store alone.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cltrain import launch
from cltrain.config import BoundsConfig, Config, load
from cltrain.config_tenants import is_tenants, shared_of
from cltrain.errors import CltrainError, ConfigError, ConflictError, DataError, ServerError
from cltrain.models.digest import base_path
from cltrain.registry import aliases, approvals, decisions, lease, releases, requests
from cltrain.registry.reserve import make_reserve, reserve_freed
from cltrain.registry.tenants import incumbent, tenants_in
from cltrain.store.database import STORE_FILE, Store, open_store, require_not_lost

if TYPE_CHECKING:
    from cltrain.certificate import Certificate
    from cltrain.worker import Worker

Progress = Callable[[str], None]

log = logging.getLogger(__name__)


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
        """What serves, what is waiting and why, what the last updates said; see `cltrain.status.read_status`."""
        from cltrain.status import read_status

        return read_status(self.config, self._existing())

    def tenants(self) -> list[Deployment]:
        """One for every tenant that was set up: freeze, rollback and the rest then are about it alone."""
        with self._existing().read() as connection:
            names = tenants_in(connection, self.agent)
        found = [Deployment(self.config.of_agent(name), self.arguments) for name in names]
        for one in found:
            one.store = self.store
        return found

    def require_shared(self) -> None:
        """Raise ConfigError where this is about a tenant alone, which has no processes and shares nothing itself."""
        if is_tenants(self.agent):
            raise ConfigError(f"agent.name = {self.agent!r} is a tenant's: this takes {shared_of(self.agent)!r}")

    # ------------------------------------------------------------ switches

    def freeze(self, reason: str = "asked for by the owner") -> dict[str, Any]:
        """Nothing is learned until `unfreeze`; an update under way is discarded at its end."""
        with reserve_freed(self.config.state_dir):
            aliases.freeze(self._existing(), self.agent, now=time.time(), reason=reason)
        return {"agent": self.agent, "frozen": True, "reason": reason}

    def unfreeze(self) -> dict[str, Any]:
        aliases.unfreeze(self._existing(), self.agent, now=time.time())
        return {"agent": self.agent, "frozen": False, "mode": str(self.config.agent.mode)}

    def rollback(
        self, to: str | None = None, *, keep_learning: bool = False, reason: str = "asked for by the owner"
    ) -> dict[str, Any]:
        """Serve an earlier release again (default: the one before), with every process down if need be.

        `to` may be the beginning of a name, if there is only one.
        """
        now = time.time()
        with reserve_freed(self.config.state_dir):
            store = self._existing()
            to = None if to is None else releases.find(store, self.agent, to).name
            done = aliases.rollback(store, self.agent, to=to, now=now, reason=reason, freeze=not keep_learning)
        # it is resident as a rule; a server that is away gets it when it is back
        try:
            directory = releases.release_dir(self.config.state_dir, releases.get(self.store, done.alias.release))
            if directory is not None and launch.any_server_up(self.config):
                from cltrain.loading import load_and_prove

                load_and_prove(self.config, self.store, done.alias.release, directory)
        except CltrainError as error:  # a full disk, a key that is not set: none of it costs a rollback
            log.warning("%s serves, and was not loaded just now: %s", done.alias.release, error)
        return {
            **asdict(done.alias),
            "undone": done.undone,
            "quarantined": done.num_quarantined,
            "frozen": done.is_frozen,
        }

    def promote(self, release: str, *, again: bool = False) -> dict[str, Any]:
        """A human's yes: every server gets the release first, then the alias moves and the anchor with it.

        Raises DataError when its files are not those that were sealed, ServerError when a server cannot load or prove
        it, ConflictError when the gate said no, or it was rolled back and this is not said to be done `again`.
        """
        from cltrain.deploy.preflight import check_adapter
        from cltrain.loading import load_and_prove

        found = releases.find(self._existing(), self.agent, release)
        release = found.name
        if found.status == "rolled_back":
            if (reason := aliases.frozen_reason(self.store, self.agent)) is not None:
                raise ConflictError(f"{release} was rolled back, and {self.agent} is frozen ({reason}): unfreeze it")
            if not again:
                raise ConflictError(f"{release} was rolled back: `cltrain promote --again` serves it all the same")
        alias = aliases.read_alias(self.store, self.agent)
        releases.verify_release(self.config.state_dir, found)
        directory = releases.release_dir(self.config.state_dir, found)
        if directory is not None:
            check_adapter(directory, base_dir=base_path(self.config.base.path))  # who signed it: see loading.py
        approvals.require_judged(self.store, self.agent, release, incumbent(self.store, self.agent, alias.release))
        if directory is not None:
            load_and_prove(self.config, self.store, release, directory)
        with self.store.write() as connection:
            moved = aliases.move_alias_in(
                connection, self.agent, expected=alias, to=release, fence=None, now=time.time(),
                file_as="promoted by a human", is_human=True,
            )  # fmt: skip
        return asdict(moved)

    def approve(self, release: str | None = None) -> dict[str, Any]:
        """A human's yes to the candidate that waits in mode approve; without a name to the newest of them.

        Raises ConflictError when none waits, or those that do were compared with what serves no more.
        """
        waiting = approvals.waiting_for_yes(self._existing(), self.agent)
        if release is not None:
            release = releases.find(self.store, self.agent, release).name
            if release == aliases.read_alias(self.store, self.agent).release:
                raise ConflictError(f"{release} already serves")
            if release not in waiting:
                raise ConflictError(
                    f"{release} does not wait for a yes: `cltrain status` says what became of it, `cltrain promote` "
                    "serves what the gate would promote in other modes too"
                )
        elif not waiting:
            raise ConflictError(
                f"nothing of {self.agent} waits for a yes: the gate said promote to none in mode approve"
            )
        return self.promote(release or waiting[-1])

    def log(self, *, verify: bool = False, head: str | None = None) -> dict[str, Any]:
        """The decisions about this agent, oldest first, and the head of the whole log, which every agent shares.

        `head`: one that was noted elsewhere; `num_since` says how many entries came after it. Raises DataError where
        the chain is broken or no entry has that head (with `verify` or `head`).
        """
        return decisions.read_log(self._existing(), self.agent, verify=verify, head=head)

    def unquarantine(
        self, records: Sequence[str] = (), *, dry_run: bool = False, reason: str = "asked for by the owner", **of: Any
    ) -> dict[str, Any]:
        """Let quarantined records be learned from again; `of`: `numbers` of updates, a `release`. See
        `cltrain.quarantine.give_back`, also for what it raises."""
        from cltrain.quarantine import give_back

        store, now = self._existing(), time.time()
        return give_back(store, self.agent, records, reason=reason, now=now, is_dry=dry_run, **of)

    # ------------------------------------------------------------ learning

    def update(self, *, trial: bool = False, wait_s: float = 3600.0, on_progress: Progress = quiet) -> dict[str, Any]:
        """One update now; by the running worker if there is one, else in this process (which then imports torch).

        A trial is trained and judged like any other and then thrown away. Returns verdict, reasons, candidate, ...
        """

        def here(worker: Worker) -> dict[str, Any]:
            summary = worker.update(is_trial=trial)
            try:
                worker.audit_when_due()
            except Exception:  # the update is concluded, whatever the audit dies of; it stays due
                log.warning("the audit that was due failed", exc_info=True)
            return summary

        return self._by_worker("trial" if trial else "update", here, wait_s, on_progress)

    def share(
        self, strata: Sequence[str] = (), *, wait_s: float = 3600.0, on_progress: Progress = quiet
    ) -> dict[str, Any]:
        """Propose to the shared agent what at least `tenants.min_contributors` tenants learned, in these strata (none:
        in all); as `update`. Too few contributors: a hold whose reasons say how many are missing."""
        self.require_shared()
        self._existing()
        return self._by_worker(
            "share", lambda worker: worker.update(share=strata), wait_s, on_progress, {"strata": list(strata)}
        )

    def audit(self, *, wait_s: float = 3600.0, on_progress: Progress = quiet) -> dict[str, Any]:
        """Look at what serves now, as a whole; by the running worker if there is one, else in this process.

        Returns what `cltrain.audit.run_audit` does: outcome, reasons, codes, checks, scores, trends, ...
        """
        self._existing()
        return self._by_worker("audit", lambda worker: worker.audit(), wait_s, on_progress)

    def gate(self, release: str, *, on_progress: Progress = quiet) -> dict[str, Any]:
        """Judge a release against what serves now; nothing moves."""
        launch.check_takes_adapters(self.config)
        release = releases.find(self._existing(), self.agent, release).name  # said before a server is started for it
        with self._own_server(on_progress):
            from cltrain.worker import Worker

            with Worker(self.config, self.store, on_progress=on_progress, takes_lease=False) as worker:
                return worker.judge_again(release)

    def calibrate(self, *, on_progress: Progress = quiet) -> dict[str, Any]:
        """Propose budgets from naive updates on what is waiting, made in a scratch directory; nothing here changes."""
        from cltrain.calibration import calibrate

        return calibrate(self.config, self._existing(), now=time.time(), on_progress=on_progress)

    def request(
        self,
        kind: str,
        options: dict[str, Any] | None = None,
        *,
        wait_s: float = 3600.0,
        on_progress: Progress = quiet,
    ) -> dict[str, Any]:
        """Ask the running worker for something and wait for its answer.

        Raises ConfigError when it learns with other settings than were given here, ServerError after `wait_s` seconds
        and when there is no worker any more.
        """
        theirs = lease.settings_of(self.store, shared_of(self.agent))  # the same worker has tenants in turn
        if theirs is not None and (unlike := self.config.unlike(theirs)):
            raise ConfigError(
                f"the running worker learns with settings of its own: {'; '.join(unlike)}. Stop it and start it with "
                "yours, or ask without them"
            )
        request = self.post_request(kind, options)
        return requests.wait_for(self.store, self.agent, request, wait_s=wait_s, on_progress=on_progress)

    def post_request(self, kind: str, options: dict[str, Any] | None = None) -> int:
        """Leave a request for the worker; returns its number."""
        return requests.post(self.store, self.agent, kind, options or {}, time.time())

    def request_outcome(self, request: int) -> dict[str, Any] | None:
        """What the worker answered; None as long as it has not."""
        return requests.outcome_of(self.store, request)

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
            known = [release.name for release in releases.list_releases(store, self.agent)]
            report = asdict(import_file(recorder, file, self.agent, producer=producer, releases=known))
        from cltrain.fitting import count_fitting

        return {**report, **count_fitting(self.config, self.store, self.agent, after_seq=before)}

    def report(self, number: int | None = None) -> Path:
        """Write the page of one update, or of the whole run; returns its path."""
        from cltrain.reporting import write_report

        return write_report(self._existing(), self.config, number)

    def run_process(self, name: str) -> None:
        """Be one of the processes until told to stop. Raises ConfigError for an unknown name."""
        from cltrain.processes import run_process

        run_process(name, self.config, self.store)

    def doctor(self) -> list[dict[str, str]]:
        """What would go wrong: one finding a line, `state` good, note or bad."""
        from cltrain.doctor import examine

        return examine(self.config)

    def keep_room(self) -> bool:
        """Set a few megabytes aside for a rollback or a freeze on a full disk; returns whether there was room.

        Raises DataError when there can be no store: said here, before any process is started.
        """
        with self.store.read():
            return make_reserve(self.config.state_dir)

    # ------------------------------------------------------------ inside

    def _existing(self) -> Store:
        """The store, for what only looks or switches: nothing is created, and an agent that nobody knows is a mistake.

        Raises DataError where there is no deployment, one that lost its store, or one of other agents.
        """
        home = self.config.state_dir
        require_not_lost(home)
        if not (home / STORE_FILE).is_file():
            raise DataError(
                f"there is no deployment in {home} (home): --home or $CLTRAIN_HOME names another; "
                "`cltrain run`, `serve`, `update` and `import` make one"
            )
        if others := releases.other_agents(self.store, self.agent):
            raise DataError(f"{home} has no agent {self.agent!r}: --agent takes {', '.join(others)}")
        return self.store

    def _by_worker(
        self,
        kind: str,
        here: Callable[[Worker], dict[str, Any]],
        wait_s: float,
        on_progress: Progress,
        options: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """What the running worker answers to a request of that kind, or what `here` makes of a worker of our own."""
        if not self._worker_is_up():
            with ExitStack() as stack:
                stack.enter_context(self._own_server(on_progress))
                from cltrain.worker import Worker

                try:
                    worker = stack.enter_context(Worker(self.config, self.store, on_progress=on_progress))
                except ConflictError:
                    if not self._worker_is_up():
                        raise
                else:  # no worker took the lease while this one was being made
                    return here(worker)
        return self.request(kind, options, wait_s=wait_s, on_progress=on_progress)

    def kubernetes(self, pool: str, **cluster: Any) -> list[dict[str, Any]]:
        """What serves, as Kubernetes objects; `cluster`: see `cltrain.kubernetes.Cluster`."""
        from cltrain.kubernetes import Cluster, manifests

        return manifests(self.config, self.store, self.arguments, Cluster(pool, **cluster))

    def _worker_is_up(self) -> bool:
        return lease.lease_until(self.store, self.agent) > time.time()

    def _own_server(self, on_progress: Progress) -> Any:
        """A server for as long as this process needs one, unless the configured one answers already."""
        launch.check_takes_adapters(self.config)
        if launch.any_server_up(self.config):
            return nullcontext()
        if "server" not in launch.needed(self.config):
            urls = ", ".join(self.config.server.replicas)
            raise ServerError(f"{urls} does not answer: start it, or leave server.url out")
        return launch.Fleet(self.config, self.arguments, ("server",), on_event=on_progress)
