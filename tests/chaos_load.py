"""Clients of a deployment that is killed: episodes from elsewhere and chats, both corrected by an operator, so there
is always something to learn. What was acknowledged is remembered in `Load.acknowledged`.
"""

from __future__ import annotations

import random
from contextlib import suppress
from typing import Any

import httpx

from cltrain.demo import world
from tests.gateway_load import Doors, Load

ELSEWHERE = "elsewhere"  # who wrote the answers of the posted episodes
PAUSE_S = 0.3
MAX_TOKENS = 40


class TicketLoad(Load):
    """Each round posts one ticket as an episode, or works one through the gateway; then an operator corrects it."""

    def __init__(self, url: str, num_clients: int, seed: int) -> None:
        super().__init__(url, num_clients=num_clients)
        self.seed = seed

    def _round(self, http: Doors, name: str) -> None:
        skill = random.Random(f"{self.seed}/{name}").choice(world.NEW_SKILLS)
        (ticket,) = world.training_tickets(skill, seed=self.seed, count=1, name=name)
        number = int(name.rpartition("-")[2])
        target = self._work(http, ticket) if number % 3 == 2 else self._post(http, ticket)
        if target is not None:
            correction = world.call_message(ticket.claimed, ticket.id)
            given = {"id": f"{ticket.id}-fix", "target": target, "correction": correction, "source": "operator"}
            if self._until_taken(http, "/v1/feedback", given) is not None:
                with self.acknowledged.lock:
                    self.acknowledged.feedback[str(given["id"])] = target
        self._stop.wait(PAUSE_S)

    def _post(self, http: Doors, ticket: world.Ticket) -> str | None:
        """The ticket as an episode in which somebody else's model called the wrong tool."""
        wrong = world.call_message({**ticket.expected, "name": "find"}, "x")
        messages = [*ticket.messages, wrong, {"role": "tool", "tool_call_id": "call-x", "content": "ok"}]
        body = {"id": ticket.id, "messages": messages, "tools": world.TOOLS, "model": ELSEWHERE}
        if self._until_taken(http, "/v1/trajectories", {**body, "principal": ticket.principal}) is None:
            return None
        with self.acknowledged.lock:
            self.acknowledged.trajectories[ticket.id] = messages
        return ticket.id

    def _work(self, http: Doors, ticket: world.Ticket) -> str | None:
        """One answer of the agent itself; asked again until one is recorded."""
        headers = {"X-Session-Id": ticket.id, "X-Session-Done": "1", "X-CLTrain-Principal": ticket.principal}
        while not self._stop.is_set():
            with suppress(httpx.TransportError):
                answer = http.post("/v1/chat/completions", json=chat_body(ticket), headers=headers)
                if answer.status_code == 200 and answer.headers["x-cltrain-recorded"] == "1":
                    record = answer.headers["x-cltrain-record"]
                    text = answer.json()["choices"][0]["message"].get("content") or ""
                    with self.acknowledged.lock:
                        self.acknowledged.answers[record] = (answer.headers["x-cltrain-trajectory"], text)
                    return record
            self.num_resent += 1
            self._stop.wait(0.2)
        return None


def chat_body(ticket: world.Ticket) -> dict[str, Any]:
    return {"model": "support", "messages": ticket.messages, "tools": world.TOOLS, "max_tokens": MAX_TOKENS}
