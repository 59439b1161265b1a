"""The worker: holds the agent's lease, keeps servers as they should be, makes updates when there is something to learn.

One more thread renews the lease and does nothing else; another looks after the servers (tending.py). What an update
dies of is written down and the worker goes on: only a lost lease stops it.
"""

from __future__ import annotations

import contextlib
import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict
from typing import Any

from sqlalchemy import Row, select, update

from cltrain import audit, launch, plans, reporting, rollout, tending, unfinished
from cltrain.config import Config
from cltrain.deploy.client import clients_of
from cltrain.deploy.preflight import check_adapter
from cltrain.deploy.replicas import Replicas
from cltrain.errors import ConflictError, DataError, ServerError, UnavailableError, failure
from cltrain.evidence import Evidence
from cltrain.experience import waiting, window
from cltrain.experience.ingest import read_rehearsal
from cltrain.experience.recording import load_secret
from cltrain.loop import finish, run_share, run_update
from cltrain.models.adapter import read_adapter
from cltrain.models.anchors import load_anchors, pinned_at, read_anchors
from cltrain.models.base import load_base
from cltrain.monitoring.outbox import Pump
from cltrain.records import LearningMode
from cltrain.registry import aliases, releases, rollouts
from cltrain.registry.lease import LeaseKeeper
from cltrain.registry.reserve import remake_reserve
from cltrain.registry.tenants import incumbent
from cltrain.rooms import Rooms, adapter_of, collect_garbage
from cltrain.store.database import Store
from cltrain.store.schema import requests
from cltrain.trainer.reference import Reference
from cltrain.trainer.update import verify_bounds

TEND_S = 2.0  # between two looks at servers and records
POLL_S = 0.1
RETRY_S = 30.0  # after something failed that was not an update's own verdict
ROOM_S = 60.0  # between two looks at whether the room for an emergency is still set aside
ASKED_S = 3600.0  # as long as `Deployment.request` waits: nobody listens to a later answer
SERVER_WAIT_S = 120.0

log = logging.getLogger(__name__)


class Every:
    """Something that is due at once, and again `seconds` after it began."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._next = seconds, 0.0

    def begin(self) -> bool:
        """Whether it is due; then it has begun."""
        if time.monotonic() < self._next:
            return False
        self.wait(self._seconds)
        return True

    def wait(self, seconds: float) -> None:
        self._next = time.monotonic() + seconds


class Worker:
    """One agent's learner; use as a context manager. Takes the lease (ConflictError while another holds it)."""

    def __init__(
        self,
        config: Config,
        store: Store,
        *,
        on_progress: Callable[[str], None] = log.info,
        takes_lease: bool = True,
        retry_s: float = RETRY_S,
    ) -> None:
        self.config, self.store = config, store
        self.takes_lease, self._retry_s = takes_lease, retry_s
        self.on_progress = on_progress
        self._stack = ExitStack()
        self._stop = threading.Event()
        self._keeper: LeaseKeeper | None = None
        self._look, self._pages = Every(TEND_S), Every(TEND_S)
        self._audits, self._probes = Every(RETRY_S), Every(RETRY_S)  # whatever becomes of them, the rest has its turn
        self._room = Every(ROOM_S)
        self._answers, self._finishes = Every(0.0), Every(math.inf)

    def __enter__(self) -> Worker:
        config, agent = self.config, self.config.agent.name
        launch.check_takes_adapters(config)
        base = load_base(
            config.base.path, device=config.base.device, dtype=config.base.dtype, context=config.base.context,
            num_threads=config.base.num_threads,
        )  # fmt: skip
        releases.ensure_base_release(self.store, agent, base.digest, now=time.time())
        with ExitStack() as stack:  # what was opened is closed again when a later step fails
            if self.takes_lease:
                self._keeper = LeaseKeeper(self.store, agent, settings=config.shaping())
                stack.callback(self._keeper.close)
            anchors, anchors_digest = load_anchors(
                base, file=config.trainer.anchors, count=config.trainer.num_anchors,
                max_tokens=config.trainer.anchor_tokens, seed=config.seed, directory=config.state_dir / "anchors",
            )  # fmt: skip
            clients = clients_of(config.server)
            servers = Replicas(self.store, clients, config.server.min_ready)
            stack.callback(servers.close)
            rehearsal = read_rehearsal(config.experience.rehearsal) if config.experience.rehearsal else ()
            self.rooms = Rooms(
                config, self.store, base, servers, Evidence(config, self.store, base, servers, self.on_progress),
                load_secret(config.state_dir), anchors, anchors_digest, rehearsal, Reference(base, base.model, anchors),
                self._keeper.fence if self._keeper else 0, on_progress=self.on_progress,
            )  # fmt: skip
            self._wait_for_server()
            for client in clients:
                with suppress(UnavailableError):  # one of several may be away
                    client.check_takes(config.adapter.rank, config.adapter.targets, config.server.max_adapters)
            self.pump = Pump(self.store, reporting.sinks(config))
            stack.callback(self.pump.close)
            self.pump.start()
            if self.takes_lease:
                tender = threading.Thread(target=self._tend, name="cltrain-tender", daemon=True)
                stack.callback(tender.join, TEND_S)  # one that a server keeps hanging is left behind
                tender.start()
            stack.callback(self._stop.set)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    # ------------------------------------------------------------ what it does

    def update(
        self,
        *,
        is_trial: bool = False,
        upto: int | None = None,
        is_filtered: bool = True,
        share: Sequence[str] | None = None,
        request: int | None = None,
    ) -> dict[str, Any]:
        """One update now, with its page. Interrupted ones are finished first; one that this `request` led to is it.

        `share`: not of the agent's own records, but of what its tenants learned alike, in these strata (none: in all).
        """
        if (reason := aliases.frozen_reason(self.store, self.config.agent.name)) is not None:
            raise ConflictError(f"{self.config.agent.name} is frozen ({reason}): cltrain unfreeze lets it learn again")
        if self.config.agent.mode is LearningMode.OFF:
            raise ConflictError(f"{self.config.agent.name} has learning mode off: choose observe, approve or auto")
        self._check_anchors()
        self.finish_interrupted()
        if request is not None and (made := plans.answer_to(self.store, request)) is not None:
            return made
        rollouts.require_none(self.store, self.config.agent.name)  # one that was finished just now may be tried
        if share is not None:
            summary = run_share(self.rooms, strata=share, request=request)
        else:
            summary = run_update(self.rooms, is_trial=is_trial, upto=upto, is_filtered=is_filtered, request=request)
        self._after(summary)
        return summary

    def finish_interrupted(self) -> None:
        """Carry on with updates that a crash cut off, or discard them where that cannot end well."""
        base, anchors = self.rooms.base.digest, self.rooms.anchors_digest
        for left in unfinished.interrupted(self.store, self.config, base_digest=base, anchors_digest=anchors):
            if left.obstacle is not None:
                mode, now = self.config.agent.mode, time.time()
                summary = unfinished.discard(self.store, left, mode=mode, fence=self.rooms.fence, now=now)
            else:
                self._check_anchors()
                unfinished.count_start(self.store, left.plan)
                self.on_progress(f"update {left.plan.number}: carries on after an interruption")
                summary = finish(self.rooms, left.plan)
            self._after(summary)

    def judge_again(self, release: str) -> dict[str, Any]:
        """The gate's answer on a sealed release against what serves now; nothing moves."""
        found = releases.get(self.store, release)
        directory = releases.release_dir(self.config.state_dir, found)
        if directory is None:
            raise DataError(f"{release} is the bare base: there is nothing to judge")
        releases.verify_release(self.config.state_dir, found)
        check_adapter(
            directory, base_dir=self.rooms.base.path, base_digest=self.rooms.base.digest,
            trusted=self.config.signing.all_trusted,
        )  # fmt: skip
        after = read_adapter(directory)
        serving = incumbent(self.store, found.agent, aliases.read_alias(self.store, found.agent).release)
        with self.rooms.server_lock:
            self.rooms.server.load(release, directory)
        bounds = verify_bounds(
            self.rooms.base, after, adapter_of(self.rooms, serving), self.rooms.anchors, self.config.bounds
        )
        decision = self.rooms.evidence.judge(
            release,
            serving,
            taught=found.manifest.get("taught", ()),
            suspicious=plans.suspicions_of(found.manifest),
            base_kl=bounds.drift_kl,
            seed=int(time.time()),
        )
        return {**asdict(decision), "verdict": str(decision.verdict), "release": release, "incumbent": serving}

    def audit(self, trigger: str = "asked") -> dict[str, Any]:
        """Look at what serves now, as a whole (see cltrain.audit), frozen or not; an alarm acts as configured."""
        found = audit.run_audit(self.rooms, trigger=trigger)
        self.on_progress("; ".join([f"audit {found['audit']}: {found['outcome']}", *found["reasons"][:1]]))
        self._write_pages()
        return found

    def audit_when_due(self) -> None:
        """Audit if the timer or a promotion asks for it (see audit.due)."""
        if (trigger := audit.due(self.store, self.config, time.time())) is not None:
            self.audit(trigger)

    def run(self, between: Callable[[], object] = lambda: None) -> None:
        """Answer requests and learn by itself until SIGTERM or SIGINT; `between` two rounds it does that."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._stop.set())
        while not self._stop.wait(POLL_S):
            self._require_lease()
            try:
                self._keep_room()
                self._keep_probes()
                self._finish_what_is_open()
                self._keep_pages_true()
                if not self._answer_request():
                    self._audit_by_itself()
                    self._learn_by_itself()
                between()
            except Exception as error:  # the store, a broken release, our own mistake: serving and the next try go on
                self._go_on_after(error)

    # ------------------------------------------------------------ inside

    def _check_anchors(self) -> None:
        """Raise DataError when the pinned file is not what is measured on: nobody could verify the release."""
        read_anchors(pinned_at(self.config.state_dir / "anchors", self.rooms.base.digest, self.rooms.anchors_digest))

    def _require_lease(self) -> None:
        if self._keeper is not None:
            self._keeper.check()

    def _make_sure_of_lease(self) -> None:
        if self._keeper is not None:
            self._keeper.renew()
            self._keeper.check()

    def _go_on_after(self, error: Exception) -> None:
        """Log what failed and wait before the next try. Raises ConflictError when it failed for want of the lease."""
        self._make_sure_of_lease()
        log.warning("something failed; the next try comes in %g s", self._retry_s, exc_info=error)
        self._look.wait(self._retry_s)
        self._finishes.wait(self._retry_s)

    def _keep_room(self) -> None:
        """What an emergency on a full disk used is set aside again once there is space."""
        if self._room.begin():
            remake_reserve(self.config.state_dir)

    def _keep_probes(self) -> None:
        if self._probes.begin() and tending.make_missing_probes(self.rooms):
            self._probes.wait(TEND_S)

    def _finish_what_is_open(self) -> None:
        """At the start, and once more after something failed: a conclusion that was not written can be made up for."""
        if not self._finishes.begin():
            return
        if aliases.frozen_reason(self.store, self.config.agent.name) is None:
            self.finish_interrupted()
        else:
            self._finishes.wait(0.0)

    def _keep_pages_true(self) -> None:
        """What a person decided (a yes, a rollback, a freeze) shows on the pages soon after."""
        if self.config.monitoring.report and self._pages.begin() and not self._write_pages():
            self._pages.wait(RETRY_S)

    def _write_pages(self) -> bool:
        """Whether what is on the pages is true now, or nobody wants them."""
        try:
            if self.config.monitoring.report:
                reporting.refresh(self.store, self.config)
        except Exception:  # a full disk, most likely: no reason not to learn
            log.warning("the pages could not be written", exc_info=True)
            return False
        return True

    def _audit_by_itself(self) -> None:
        if self._audits.begin():  # the next is later where it cannot be written down
            self.audit_when_due()
            self._audits.wait(TEND_S)

    def _answer_request(self) -> bool:
        """Do what was asked for first; whether anything was. An answer that cannot be written is given later."""
        if not self._answers.begin():
            return False
        agent = self.config.agent.name
        query = select(requests).where(requests.c.agent == agent, requests.c.outcome.is_(None)).order_by(requests.c.id)
        with self.store.read() as connection:
            row = connection.execute(query.limit(1)).first()
        if row is None:
            return False
        try:
            outcome = self._outcome_of(row)
        except ConflictError as error:  # frozen, or learning is off
            self._make_sure_of_lease()  # who lost it leaves the answer to the next worker
            outcome = failure(error)
        except Exception as error:  # whoever asked must hear of it, whatever it was
            self._go_on_after(error)
            outcome = failure(error)
        try:
            with self.store.write() as connection:
                is_open = (requests.c.id == row.id) & requests.c.outcome.is_(None)
                connection.execute(update(requests).where(is_open).values(outcome=outcome))
        except Exception as error:  # a full disk, most likely
            self._go_on_after(error)
            self._answers.wait(self._retry_s)
        return True

    def _outcome_of(self, row: Row) -> dict[str, Any]:
        """What to answer: a worker that died may have left an update for it, or nobody waits for it any more."""
        if (summary := plans.answer_to(self.store, row.id)) is not None:
            return summary
        age_s = time.time() - row.created_at
        if age_s > ASKED_S:
            return {"error": f"asked {age_s / 60:.0f} minutes ago, and nobody waits that long: ask again"}
        if row.kind == "audit":
            return self.audit()
        options = row.options
        return self.update(
            is_trial=row.kind == "trial", upto=options.get("upto"), is_filtered=options.get("filter", True),
            share=options.get("strata", ()) if row.kind == "share" else None, request=row.id,
        )  # fmt: skip

    def _learn_by_itself(self) -> None:
        agent = self.config.agent
        if agent.mode is LearningMode.OFF or aliases.frozen_reason(self.store, agent.name) is not None:
            return
        if agent.updates == "on_request" or not self._look.begin():
            return
        if rollouts.read_open(self.store, agent.name) is not None:
            return
        if self._has_news() and self.rooms.server.health():  # training for a server that is away ends in an error
            self.update()

    def _has_news(self) -> bool:
        """Whether a whole window's worth of records came in since the last update looked."""
        agent, config = self.config.agent, self.config.experience
        found = window.next_window(
            self.store, agent.name, config, learn_from=agent.learn_from, tools_allowed=agent.tools_allowed,
            now=time.time(), objectives=self.config.trainer.objectives,
        )  # fmt: skip
        ids = {example.record for example in found.examples}
        return len(ids - waiting.looked_at(self.store, agent.name, ids)) >= config.min_window

    def _after(self, summary: dict[str, Any]) -> None:
        """What follows a conclusion; none of it can take the conclusion back."""
        if summary["number"] is None:
            return
        self.on_progress(f"update {summary['number']}: {summary['verdict']}: {summary['reasons'][0]}")
        self.pump.wake()
        try:
            with contextlib.suppress(ServerError):  # a server that is away is tidied after the next update
                collect_garbage(self.rooms)
            if self.config.monitoring.report:
                reporting.refresh(self.store, self.config)
        except Exception:  # a full disk, most likely: `cltrain report` writes the page again
            log.warning("update %d is concluded, but was not tidied up after", summary["number"], exc_info=True)

    def _wait_for_server(self) -> None:
        deadline = time.monotonic() + SERVER_WAIT_S
        while not self.rooms.server.health():
            if time.monotonic() > deadline:
                raise ServerError(f"{self.rooms.server.url} did not answer within {SERVER_WAIT_S:g} s")
            time.sleep(0.2)

    def _tend(self) -> None:
        """Look after the servers, and after what is tried on them. What is away is looked at again next time."""
        while not self._stop.wait(TEND_S):
            for look in (tending.tend, rollout.look):
                try:
                    look(self.rooms)
                except (ServerError, DataError, ConflictError):  # a conflict: a person or the next worker was first
                    continue
                except Exception:  # whatever a server answers, the next look may find it well
                    log.warning("the servers could not be looked after", exc_info=True)
