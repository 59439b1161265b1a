"""What is kept of an answer that is broken, cut short or never came, and of the tools that each one was offered."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cltrain.experience.examples import accepted, of_turns
from cltrain.experience.recording import read_trajectories
from cltrain.records import Example, Feedback
from cltrain.store.schema import record_faults
from tests.gateway_parts import BASE, R2, Gateway, running
from tests.rollout_parts import FIND, until
from tests.test_rollout_gateway import Broken, adapter, begin, said


def faults(gateway: Gateway) -> dict[str, str]:
    with gateway.store.read() as connection:
        return {row.record: row.reason for row in connection.execute(record_faults.select())}


OTHER = {"type": "function", "function": {"name": "other", "parameters": {"type": "object"}}}
STRICTER = {"type": "function", "function": {**FIND["function"], "parameters": {"required": ["colour"]}}}
NOTED = "calls 'find', which the episode does not declare"


@pytest.mark.parametrize("later", [OTHER, STRICTER])
def test_an_answer_is_judged_by_the_tools_of_its_own_request(tmp_path: Path, later: dict[str, Any]) -> None:
    with running(tmp_path) as gateway:
        first = gateway.chat("call find", tools=[FIND], headers={"X-Session-Id": "s"})
        gateway.chat("call find", said(first), "hello", tools=[later], headers={"X-Session-Id": "s"})
        assert faults(gateway) == {}
        broken = gateway.chat("call find", tools=[OTHER], headers={"X-Session-Id": "t"})
        gateway.chat("call find", said(broken), "hello", tools=[FIND], headers={"X-Session-Id": "t"})
        assert faults(gateway) == {broken.headers["x-cltrain-trajectory"]: NOTED}


def test_what_is_learned_was_offered_the_tools_that_its_own_request_offered(tmp_path: Path) -> None:
    with running(tmp_path) as gateway:
        first = gateway.chat("call find a lamp", tools=[FIND])
        messages: list[Any] = ["call find a lamp", said(first)]
        for order, tools in (("call other a lamp", [OTHER]), ("say so", [OTHER]), ("bye", [])):
            answer = gateway.chat(*messages, order, tools=tools)
            messages += [order, said(answer)]
        (kept,) = read_trajectories(gateway.store, "support")
        assert [kept.tools_at(turn) for turn in (1, 3, 5, 7)] == [(FIND,), (OTHER,), (OTHER,), ()]
        for turns, targets in (((1,), (1,)), ((1, 3, 5), (3, 5)), ((1, 3, 5, 7), (7,))):
            example = of_turns(kept, turns, "good", "user")
            assert (example.targets, example.tools) == (targets, kept.tools_at(turns[-1]))
        fixed = Feedback("fix", kept.generations[0].id, correction=said(first), source="operator")
        producers = ("user", "operator") * 4
        right = accepted(replace(kept, end="ok", producers=producers, feedback=(fixed,)),
                         learn_from=["operator"], tools_allowed=None)  # fmt: skip
        assert isinstance(right, Example)
        assert right.tools == (FIND,)


def test_no_client_breaks_an_answer_by_how_it_says_it_again(tmp_path: Path) -> None:
    with running(tmp_path) as gateway:
        first = gateway.chat("call find", tools=[FIND])
        again = said(first)
        again["tool_calls"][0]["function"]["arguments"] = {"item": "lamp"}  # an object and no text
        second = gateway.chat("call find", again, "hello", tools=[FIND])
        assert second.headers["x-cltrain-trajectory"] == first.headers["x-cltrain-trajectory"]
        assert faults(gateway) == {}


@pytest.mark.parametrize("is_streamed", [False, True])
def test_what_the_client_cut_short_is_no_fault(tmp_path: Path, is_streamed: bool) -> None:
    with running(tmp_path, fake=Broken(BASE)) as gateway:
        for most in (1, 400):
            answer = gateway.chat("say <tool_call>", max_tokens=most, stream=is_streamed)
            assert answer.status_code == 200
        whole = answer.headers["x-cltrain-trajectory"]
        assert faults(gateway) == {whole: "a tool call that could not be read stands in the answer's text"}


@pytest.mark.parametrize("session", [{}, {"X-Session-Id": "s"}])
def test_a_servers_error_survives_the_clients_retry(tmp_path: Path, session: dict[str, str]) -> None:
    fake = Broken(R2, status=500)
    with running(tmp_path, fake=fake) as gateway:
        begin(gateway, weights=[0.999999])
        assert gateway.chat("hello", headers=session).status_code >= 500
        until(lambda: len(faults(gateway)) == 1, "it is not noted")
        fake.status = None
        answer = gateway.chat("hello", headers=session)
        assert adapter(answer) == R2
        (kept,) = read_trajectories(gateway.store, "support")
        assert (kept.id, len(kept.generations)) == (answer.headers["x-cltrain-trajectory"], 1)
        assert set(faults(gateway)) == {kept.id}
