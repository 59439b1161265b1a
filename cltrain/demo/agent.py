"""The agent of the demo, its customers and its operators, all talking to the gateway over real HTTP.

The agent uses the official `openai` client and knows nothing of learning. A ticket is one episode: a tool call, the
world's result, a closing answer; then perhaps a late thumb from the customer or a correction from an operator.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
from openai import APIError, AsyncOpenAI

from cltrain.demo import world
from cltrain.demo.world import Ticket

MAX_TOKENS = 40


@dataclass(frozen=True)
class Outcome:
    """What became of one ticket."""

    ticket: Ticket
    success: bool
    trajectory: str
    record: str  # the generation that made the call: what feedback points to
    releases: tuple[str, ...]  # who answered, turn by turn


@dataclass
class Desk:
    """The help desk: sends tickets, counts requests and failures, delivers feedback."""

    gateway: str
    agent: str
    in_flight: int = 8
    requests: int = 0
    failed: int = 0
    failures: list[str] = field(default_factory=list)

    async def work(self, tickets: Sequence[Ticket], hold: asyncio.Event | None = None) -> list[Outcome]:
        """Work tickets, `in_flight` at a time. With `hold`, the last ones stop mid-episode until it is set."""
        gate = asyncio.Semaphore(self.in_flight)
        async with AsyncOpenAI(base_url=f"{self.gateway}/v1", api_key="unused", max_retries=0, timeout=120.0) as client:

            async def one(position: int, ticket: Ticket) -> Outcome | None:
                is_held = hold is not None and position >= len(tickets) - self.in_flight
                async with gate:
                    return await self._episode(client, ticket, hold if is_held else None)

            outcomes = await asyncio.gather(*(one(position, ticket) for position, ticket in enumerate(tickets)))
        return [outcome for outcome in outcomes if outcome is not None]

    async def _episode(self, client: AsyncOpenAI, ticket: Ticket, hold: asyncio.Event | None) -> Outcome | None:
        headers = {"X-Session-Id": ticket.id, "X-Cltrain-Principal": ticket.principal}
        messages: list[Any] = list(ticket.messages)
        first = await self._ask(client, messages, headers)
        if first is None:
            return None
        message, response_headers = first
        releases = [response_headers["x-cltrain-adapter"]]
        messages.append(message)
        for call in message.get("tool_calls") or []:
            result = world.tool_result(ticket, message)
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": result})
        if hold is not None:
            await hold.wait()
        if messages[-1]["role"] == "tool":
            second = await self._ask(client, messages, {**headers, "X-Session-Done": "1"})
            if second is None:
                return None
            releases.append(second[1]["x-cltrain-adapter"])
        return Outcome(
            ticket,
            world.check(ticket, message),
            response_headers["x-cltrain-trajectory"],
            response_headers["x-cltrain-record"],
            tuple(releases),
        )

    async def _ask(
        self, client: AsyncOpenAI, messages: list[Any], headers: dict[str, str]
    ) -> tuple[dict[str, Any], Any] | None:
        self.requests += 1
        tools: Any = world.TOOLS
        try:
            raw = await client.chat.completions.with_raw_response.create(
                model=self.agent, messages=messages, tools=tools, max_tokens=MAX_TOKENS, temperature=0.0,
                extra_headers=headers,
            )  # fmt: skip
        except APIError as error:
            self.failed += 1
            self.failures.append(f"{type(error).__name__}: {error}")
            return None
        message = raw.parse().choices[0].message
        kept: dict[str, Any] = {"role": "assistant", "content": message.content}
        if message.tool_calls:
            kept["tool_calls"] = [call.model_dump(include={"id", "type", "function"}) for call in message.tool_calls]
        return kept, raw.headers

    async def say(self, feedback: Sequence[dict[str, Any]]) -> None:
        """Deliver feedback on finished tickets; each piece has its own id, so sending it twice changes nothing."""
        async with httpx.AsyncClient(base_url=self.gateway, timeout=60.0) as client:
            for piece in feedback:
                answer = await client.post("/v1/feedback", json=piece, headers={"X-Session-Done": "1"})
                answer.raise_for_status()


def opinions(outcomes: Sequence[Outcome], rng: random.Random) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What customers and operators say about these tickets: (at once, only after the next window)."""
    soon: list[dict[str, Any]] = []
    late: list[dict[str, Any]] = []
    for outcome in sorted(outcomes, key=lambda o: o.ticket.id):
        ticket = outcome.ticket
        common = {"target": outcome.record, "principal": ticket.principal}
        thumb = world.user_feedback(ticket, outcome.success, rng)
        if thumb is not None:
            box = late if rng.random() < 0.2 else soon
            box.append({**common, "id": f"{ticket.id}-thumb", "score": thumb, "source": "user"})
        correction = world.operator_correction(ticket, outcome.success, rng)
        if correction is not None:
            soon.append({**common, "id": f"{ticket.id}-fix", "correction": correction, "source": "operator"})
    return soon, late
