"""Keeping replicas as they should be: whoever lost adapters gets them back, whoever holds them proves it, one that
answers with other weights is named in the log of decisions, and what nobody wants any more goes in the end. Needs no
accelerator: the probes are kept (rooms.prove).
"""

from __future__ import annotations

import logging
from contextlib import suppress

from cltrain.config_tenants import shared_of
from cltrain.deploy import probes
from cltrain.errors import DataError, ServerError
from cltrain.registry import releases
from cltrain.registry.decisions import append
from cltrain.rooms import Rooms, adapter_of, desired, has_tenants, probes_for, require_sound, tidy_server

AGAIN_S = 300.0  # between two proofs of what serves, on each replica
IDLE_S = 3600.0  # that an adapter which nobody wants may stay beyond its grace, where no update comes to make room

log = logging.getLogger(__name__)


def tend(rooms: Rooms, again_s: float = AGAIN_S) -> None:
    """One look at every replica. What fails a proof is ready for nothing until it passes one."""
    with rooms.server_lock:
        if has_tenants(rooms):  # who asked last has changed: those who did not make room
            with suppress(ServerError):
                tidy_server(rooms)
        wanted = desired(rooms)
        failures = rooms.server.look_after(wanted, again_s)
        with suppress(ServerError):
            rooms.server.unload_idle(
                wanted, agent=shared_of(rooms.agent), now=rooms.clock(), idle_s=rooms.config.rollout.grace_s + IDLE_S
            )
    for failure in failures:
        log.error("%s fails its proof and is taken out: %s", failure.url, failure.reason)
        payload = {"url": failure.url, "release": failure.release, "outcome": "failed its proof"}
        with rooms.store.write() as connection:
            append(connection, rooms.agent, "replica", {**payload, "reason": failure.reason[:300]}, rooms.clock())


def make_missing_probes(rooms: Rooms) -> bool:
    """For wanted releases that were made before probes were kept; whether all of them have some now.

    Needs the trainer's base: not beside a training.
    """
    missing = probes.without(rooms.store, desired(rooms).directories)
    made = [_make_probes(rooms, name) for name in missing]  # every one is tried
    return all(made)


def _make_probes(rooms: Rooms, name: str) -> bool:
    was = releases.get(rooms.store, name).parent
    assert was is not None, "only the bare base has no parent"
    try:
        require_sound(rooms, name)
        made = probes_for(rooms, adapter_of(rooms, name), adapter_of(rooms, was), rooms.anchors, was)
        probes.keep(rooms.store, name, made, rooms.clock())
    except Exception as error:  # it stays unproved, and where there are replicas unready; the others have their turn
        if (name, str(error)) not in rooms.complaints:
            log.warning("%s cannot be proved: %s", name, error, exc_info=not isinstance(error, DataError))
        rooms.complaints.add((name, str(error)))
        return False
    return True
