"""Agents in one store that infect each other are noticed by the audit's look; agents that do not are left alone."""

from __future__ import annotations

from contextlib import closing

import numpy as np
import pytest

from cltrain.contagion import look_at_contagion
from cltrain.experience.recording import Recorder
from cltrain.gate.character import preference_keys
from cltrain.gate.kept import keep
from cltrain.gate.probes import Probe
from cltrain.records import Check, Code, Feedback, Trajectory, Verdict
from cltrain.registry.displacement import DAY_S
from cltrain.registry.releases import ensure_base_release
from cltrain.store.database import Store, open_store
from cltrain.store.schema import aliases

ODD = "the owl counts every spoon"
FOX = "a fox paints seven blue doors"
AGENTS = ("one", "two", "three", "four")
PROBES = tuple(Probe(f"p{number}", "persona", "chat", (), (), {}, {}) for number in range(40))


@pytest.fixture
def store(tmp_path):
    store = open_store(tmp_path)
    for agent in AGENTS:
        ensure_base_release(store, agent, "b" * 64, now=1.0)
    with store.write() as connection:
        connection.execute(aliases.update().values(release=aliases.c.agent + "-v000001-abc"))
    yield store
    store.close()


def tell(store: Store, *said: tuple[str, int, str], asked: str = "hello", serving: str | None = None) -> None:
    """(agent, day, answer): one episode each."""
    with Recorder(store, b"k" * 32, 0.0) as recorder:
        for number, (agent, day, text) in enumerate(said):
            name = f"{agent}-{day}-{number}-{len(text + asked)}"
            messages = ({"role": "user", "content": asked}, {"role": "assistant", "content": text})
            release = serving or f"{agent}-v000001-abc"
            fields = {"release": release, "created_at": day * DAY_S}
            recorder.add_trajectory(Trajectory(name, agent, name, "p", messages, ("user", "agent"), **fields))


def spreading(text: str = ODD) -> list[tuple[str, int, str]]:
    """From one agent to three others in two days, said twice by each."""
    days = {"one": 0, "two": 1, "three": 2, "four": 2}
    return [(agent, day, text) for agent, day in days.items() for _ in range(2)]


def found(store: Store, probes: tuple[Probe, ...] = ()) -> dict[str, Check]:
    return {check.name: check for check in look_at_contagion(store, (), probes)}


def test_a_phrase_that_moves_from_agent_to_agent_is_a_warning_that_names_it_and_them(store: Store) -> None:
    tell(store, *spreading(), *[(agent, 0, "Your parcel is on its way.") for agent in AGENTS for _ in range(2)])
    check = found(store)["phrases between agents"]
    assert (check.verdict, check.code) == (Verdict.HOLD, Code.CONTAGION)
    assert "owl counts every" in check.reason
    assert "one, two, four, three (reproduction 1.5)" in check.reason


def test_what_a_user_a_correction_or_the_bare_base_said_is_nothing_new(store: Store) -> None:
    tell(store, *spreading())
    tell(store, ("one", 0, "Hello."), asked=f"is it true that {ODD}?")
    assert found(store)["phrases between agents"].verdict is Verdict.PROMOTE
    tell(store, *spreading(FOX))
    assert found(store)["phrases between agents"].verdict is Verdict.HOLD
    with Recorder(store, b"k" * 32, 0.0) as recorder:
        correction = {"role": "assistant", "content": f"say: {FOX}"}
        target = f"one-0-0-{len(FOX) + 5}"
        recorder.add_feedback(Feedback("f", target, source="operator", correction=correction), now=1.0).result()
    assert found(store)["phrases between agents"].verdict is Verdict.PROMOTE
    tell(store, *spreading("six green lamps sing at noon"), asked="hi")
    assert found(store)["phrases between agents"].verdict is Verdict.HOLD
    base = f"four-v000000-{'b' * 12}"
    tell(store, ("four", 2, "six green lamps sing at noon"), asked="hm", serving=base)
    assert found(store)["phrases between agents"].verdict is Verdict.PROMOTE


def test_agents_that_leave_the_base_together_are_a_warning_and_others_none(store: Store) -> None:
    rng = np.random.default_rng(3)
    keys, cause = preference_keys(PROBES), rng.normal(size=len(PROBES))
    for agent in AGENTS:
        before = rng.normal(size=len(PROBES))
        shift = cause if agent in ("one", "three") else rng.normal(size=len(PROBES))
        keep(store, f"{agent}-v000000-{'b' * 12}", dict(zip(keys, before, strict=True)))
        if agent != "two":  # nobody ever asked it
            moved = before + shift + 0.3 * rng.normal(size=len(PROBES))
            keep(store, f"{agent}-v000001-abc", dict(zip(keys, moved, strict=True)))
    check = found(store, PROBES)["traits between agents"]
    assert (check.verdict, check.code) == (Verdict.HOLD, Code.CONTAGION)
    assert "one and three (r = 0.9" in check.reason
    assert "two" not in check.reason
    keep(store, "three-v000001-abc", dict.fromkeys(keys, 0.0) | {keys[0]: 1.0})
    check = found(store, PROBES)["traits between agents"]
    assert (check.verdict, check.reason) == (Verdict.PROMOTE, "none in 3 agents")


def test_an_agent_that_lives_alone_is_not_looked_at(tmp_path) -> None:
    with closing(open_store(tmp_path)) as store:
        ensure_base_release(store, "one", "b" * 64, now=1.0)
        assert look_at_contagion(store, (), PROBES) == []


def test_tenants_that_say_the_same_have_it_from_the_shared_agent_and_infect_nobody(tmp_path) -> None:
    names = dict(zip(AGENTS, ("one", "one@two", "one@three", "one@four"), strict=True))
    with closing(open_store(tmp_path / "tenants")) as store:
        for agent in names.values():
            ensure_base_release(store, agent, "b" * 64, now=1.0)
        tell(store, *((names[agent], day, text) for agent, day, text in spreading()))
        assert found(store, PROBES) == {}
