"""What else comes in at the door: feedback, episodes that happened elsewhere, and which models there are."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import uuid
from collections import Counter
from collections.abc import Awaitable
from concurrent.futures import Future
from typing import Any

from sqlalchemy import select
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from cltrain.errors import ConflictError, DataError
from cltrain.experience.recording import RecorderFull, UnknownTarget
from cltrain.gateway import bodies
from cltrain.gateway.chat import Door, read_body
from cltrain.gateway.errors import Refusal, error_response
from cltrain.gateway.tenants import serving
from cltrain.records import Trajectory
from cltrain.store.database import Store
from cltrain.store.schema import releases

log = logging.getLogger(__name__)

MAX_REASONS = 20  # shown in one answer; all are kept in the store


async def answered(door: Door, request: Request, work: Awaitable[Response]) -> Response:
    """The answer, or the error that a refusal becomes: counted, and in the shape of the API asked."""
    try:
        return await work
    except Refusal as error:
        refusal = error
    except ClientDisconnect:
        refusal = Refusal(499, "the client left while its body was read")
    except RecorderFull as error:
        refusal = Refusal(503, str(error), kind="api_error")
    except UnknownTarget as error:
        refusal = Refusal(404, str(error), code="unknown_target", param="target")
    except ConflictError as error:
        refusal = Refusal(409, str(error))
    except DataError as error:
        refusal = Refusal(400, str(error))
    except Exception:  # what nobody foresaw: the log has where, the client learns that it happened
        log.exception("%s %s failed", request.method, request.url.path)
        said = "the gateway failed at this request; its log says where"
        refusal = Refusal(500, said, kind="api_error", code="internal")
    door.metrics.errors.labels(refusal.code).inc()
    return error_response(refusal, request.url.path)


async def take_feedback(door: Door, request: Request) -> Response:
    """Raises DataError (malformed), UnknownTarget, ConflictError (same id, other content), Refusal 503 (not stored)."""
    body = bodies.parse(await read_body(request))
    now = door.clock()
    learn_from = door.config.agent.learn_from
    given = bodies.feedback_of(body, request.headers, f"fb-{uuid.uuid4().hex}", now, request.state.key, learn_from)
    only_of = bodies.judges_only(request.state.key)
    is_new = await door.settle(door.recorder.add_feedback(given, now=now, only_of=only_of))
    if bodies.is_done(request.headers):
        await door.settle(door.recorder.end_episode(given.target, now=now))
    door.metrics.feedback.labels("new" if is_new else "duplicate").inc()
    return JSONResponse({"id": given.id, "target": given.target, "duplicate": not is_new})


async def take_trajectories(door: Door, request: Request) -> Response:
    """One episode as a JSON object, or many as NDJSON whose bad lines are kept aside and counted."""
    raw = await read_body(request)
    lines = bodies.lines_of(raw)
    is_ndjson = "ndjson" in request.headers.get("content-type", "") or "jsonl" in request.headers.get(
        "content-type", ""
    )
    if not is_ndjson and (len(lines) < 2 or _is_one_object(raw)):
        trajectory = bodies.trajectory_of(bodies.parse(raw), door.agent_of(request), door.clock(), request.state.key)
        (future,) = await _submitted(door, [trajectory])
        return JSONResponse({"id": trajectory.id, "duplicate": not await _settled(door, future)})
    if not lines:
        raise DataError("the body is empty: send one JSON object, or one per line")
    return JSONResponse(await _take_lines(door, raw, lines, request))


async def _take_lines(door: Door, raw: bytes, lines: list[tuple[int, bytes]], request: Request) -> dict[str, Any]:
    now, agent, key = door.clock(), door.agent_of(request), request.state.key
    good: list[tuple[int, bytes, Trajectory]] = []
    bad: list[tuple[int, bytes, str]] = []
    for number, line in lines:
        try:
            body = bodies.parse(line, f"line {number}")
            good.append((number, line, bodies.trajectory_of(body, agent, now, key)))
        except (DataError, Refusal) as error:
            bad.append((number, line, str(error)))
    outcomes: Counter[bool] = Counter()
    futures = await _submitted(door, [trajectory for _, _, trajectory in good])
    for (number, line, _), future in zip(good, futures, strict=True):
        try:
            outcomes[await _settled(door, future)] += 1
        except ConflictError as error:
            bad.append((number, line, str(error)))
    source = f"post:{hashlib.sha256(raw).hexdigest()[:16]}"  # the same body again sets nothing aside twice
    for number, line, reason in sorted(bad):
        await _in_thread(door, door.recorder.set_aside, agent, source, number, reason, line, now=now)
    door.metrics.trajectories.labels("set_aside").inc(len(bad))
    return {
        "num_lines": len(lines),
        "num_added": outcomes[True],
        "num_duplicates": outcomes[False],
        "num_set_aside": len(bad),
        "set_aside": [{"line": number, "reason": reason} for number, _, reason in sorted(bad)[:MAX_REASONS]],
    }


async def _submitted(door: Door, trajectories: list[Trajectory]) -> list[Future[bool]]:
    return await asyncio.to_thread(lambda: [door.recorder.submit_trajectory(t) for t in trajectories])


async def _settled(door: Door, future: Future[bool]) -> bool:
    is_new = await door.settle(future)
    door.metrics.trajectories.labels("new" if is_new else "duplicate").inc()
    return is_new


async def _in_thread(door: Door, submit: Any, *given: Any, now: float) -> Any:
    future: Future[Any] = await asyncio.to_thread(lambda: submit(*given, now=now))
    return await door.settle(future)


async def list_served(door: Door, store: Store, request: Request) -> Response:
    """The alias, and of the releases of the agent and of the tenant that asks those that the server lists; candidates
    are never shown."""
    listed = {str(m["id"]) for m in await door.upstream.models()}
    base, agent = door.episodes.base_release, door.agent_of(request)

    def read() -> tuple[str, list[tuple[str, float]]]:
        with store.read() as connection:
            urls = [place.upstream.url for place in door.upstream.places]
            alias = serving(connection, door.agent, agent, urls) or base
            mine = releases.c.agent.in_([door.agent, agent]) & (releases.c.status == "released")
            columns = (releases.c.name, releases.c.path, releases.c.created_at)
            rows = connection.execute(select(*columns).where(mine).order_by(releases.c.number)).all()
        return alias, [(r.name, r.created_at) for r in rows if r.path is None or r.name in listed]

    alias, served = await asyncio.to_thread(read)
    if base not in {name for name, _ in served}:
        served = [(base, 0.0), *served]
    models = [{"id": door.agent, "object": "model", "created": 0, "owned_by": "cltrain", "root": alias}]
    models += [
        {"id": name, "object": "model", "created": int(at), "owned_by": "cltrain", "root": name} for name, at in served
    ]
    return JSONResponse({"object": "list", "data": models})


def _is_one_object(raw: bytes) -> bool:
    try:
        bodies.parse(raw)
    except DataError:
        return False
    return True
