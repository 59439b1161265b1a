"""Clients that hammer one gateway, or several on one store, remember what was acknowledged, and check the store."""

from __future__ import annotations

import itertools
import json
import threading
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from sqlalchemy import func, select

from cltrain.experience.recording import read_trajectories
from cltrain.store.database import open_store
from cltrain.store.schema import feedback, generations, records


@dataclass
class Acknowledged:
    """What the gateway said is durable. Filled by the clients, read by `check`."""

    trajectories: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # id -> messages
    feedback: dict[str, str] = field(default_factory=dict)  # id -> target
    answers: dict[str, tuple[str, str]] = field(default_factory=dict)  # record -> (trajectory, text)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __len__(self) -> int:
        with self.lock:
            return len(self.trajectories) + len(self.feedback) + len(self.answers)


class Doors:
    """Posts to one gateway after the other: an episode goes on at another one than it began at."""

    def __init__(self, http: httpx.Client, urls: Sequence[str]) -> None:
        self._http = http
        self._urls = itertools.cycle(urls)

    def post(self, path: str, **given: Any) -> httpx.Response:
        return self._http.post(next(self._urls) + path, **given)


class Load:
    """`num_clients` threads; each repeats what was not acknowledged with the same id until it is."""

    def __init__(self, *urls: str, num_clients: int) -> None:
        self.urls = urls
        self.acknowledged = Acknowledged()
        self.failures: list[str] = []
        self.num_resent = 0
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._client, args=(i,), daemon=True) for i in range(num_clients)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(30)

    def _client(self, number: int) -> None:
        try:
            with httpx.Client(timeout=20.0, trust_env=False) as client:
                http = Doors(client, self.urls)
                for round_ in range(1_000_000):
                    if self._stop.is_set():
                        return
                    self._round(http, f"c{number}-{round_}")
        except Exception as error:  # a thread's failure must reach the test
            self.failures.append(f"client {number}: {error!r}")

    def _round(self, http: Doors, name: str) -> None:
        messages = [{"role": "user", "content": name}, {"role": "assistant", "content": f"done {name}"}]
        if self._until_taken(http, "/v1/trajectories", {"id": name, "messages": messages, "reward": 1}) is not None:
            with self.acknowledged.lock:
                self.acknowledged.trajectories[name] = messages
        history: list[dict[str, Any]] = []
        for turn in range(2):
            history.append({"role": "user", "content": f"{name} {turn}"})
            answer = self._chat(http, name, history, is_streamed=turn == 1)
            if answer is None:
                return
            record, text = answer
            history.append({"role": "assistant", "content": text})
            given = {"id": f"{name}-{turn}", "target": record, "score": 0.5}
            if self._until_taken(http, "/v1/feedback", given) is not None:
                with self.acknowledged.lock:
                    self.acknowledged.feedback[f"{name}-{turn}"] = record

    def _until_taken(self, http: Doors, path: str, body: dict[str, Any]) -> dict[str, Any] | None:
        """Send until there is a 2xx answer; None when the load ended first."""
        is_again = False
        while not self._stop.is_set():
            with suppress(httpx.TransportError):
                if is_again:
                    self.num_resent += 1
                answer = http.post(path, json=body)
                if answer.status_code == 200:
                    return dict(answer.json())
                if answer.status_code != 503:
                    raise AssertionError(f"{path} {body} -> {answer.status_code} {answer.text}")
            is_again = True
            self._stop.wait(0.05)
        return None

    def _chat(
        self, http: Doors, session: str, history: list[dict[str, Any]], *, is_streamed: bool
    ) -> tuple[str, str] | None:
        """(record, text) of an acknowledged answer; a broken request is sent again, as an agent would."""
        body = {"model": "support", "messages": history, "stream": is_streamed}
        while not self._stop.is_set():
            with suppress(httpx.TransportError):
                answer = http.post("/v1/chat/completions", json=body, headers={"X-Session-Id": session})
                text, is_recorded = _read(answer)
                if is_recorded:
                    record = answer.headers["x-cltrain-record"]
                    with self.acknowledged.lock:
                        self.acknowledged.answers[record] = (answer.headers["x-cltrain-trajectory"], text)
                    return record, text
            self._stop.wait(0.05)
        return None


def _read(answer: httpx.Response) -> tuple[str, bool]:
    if answer.status_code != 200:
        return "", False
    if not answer.headers["content-type"].startswith("text/event-stream"):
        return answer.json()["choices"][0]["message"]["content"], answer.headers["x-cltrain-recorded"] == "1"
    lines = [line[6:] for line in answer.text.split("\n") if line.startswith("data: ")]
    chunks = [json.loads(line) for line in lines if line != "[DONE]"]
    text = "".join(c["delta"].get("content") or "" for chunk in chunks for c in chunk.get("choices", []))
    return text, any(chunk.get("cltrain", {}).get("recorded") == 1 for chunk in chunks)


def check(state_dir: Path, acknowledged: Acknowledged) -> None:
    """Everything acknowledged is in the store exactly once, as it was acknowledged; the database is sound."""
    with acknowledged.lock:
        trajectories, said = dict(acknowledged.trajectories), dict(acknowledged.feedback)
        answers = dict(acknowledged.answers)
    store = open_store(state_dir)
    try:
        with store.read() as connection:
            assert connection.exec_driver_sql("PRAGMA integrity_check").scalar_one() == "ok"
            ids = Counter(connection.scalars(select(records.c.id)))
            stored_feedback = connection.execute(select(feedback.c.id, feedback.c.target)).all()
            num_answers = connection.scalar(select(func.count()).select_from(generations))
        by_id = {t.id: t for t in read_trajectories(store, "support")}
    finally:
        store.close()
    assert set(ids.values()) <= {1}
    assert num_answers == sum(len(t.generations) for t in by_id.values())
    lost = [name for name in trajectories if name not in by_id]
    assert lost == [], f"acknowledged trajectories are gone: {lost}"
    for name, messages in trajectories.items():
        assert list(by_id[name].messages) == messages
        assert [f.id for f in by_id[name].feedback] == [f"{name}:reward"]
    targets = Counter((row.id, row.target) for row in stored_feedback)
    assert [pair for pair in said.items() if targets[pair] != 1] == [], "acknowledged feedback is gone or doubled"
    generated = {g.id: (t, g) for t in by_id.values() for g in t.generations}
    missing = [record for record in answers if record not in generated]
    assert missing == [], f"acknowledged answers are gone: {missing}"
    for record, (trajectory, text) in answers.items():
        kept, generation = generated[record]
        assert kept.id.split("~")[0] == trajectory
        assert kept.messages[generation.turn]["content"] == text
        assert kept.producers[generation.turn] == "agent"
