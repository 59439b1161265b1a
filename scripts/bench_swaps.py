"""Adapter swaps under constant load: each adapter answers a probe with its own number, and no answer may be wrong.

`run_swaps` is the test's core as well. `--json F` gets every answer and every swap as raw rows beside the figures.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import httpx

from cltrain.demo import world
from cltrain.deploy.client import ServerClient
from cltrain.deploy.serve import run_server
from cltrain.errors import ServerError
from cltrain.models.base import Base, load_base
from cltrain.models.digest import adapter_digest

NUMBERS = {number: str(number) for number in (3, 5, 7, 8, 9)}  # each adapter's own number, and how it is said
ITEMS = {number: world.ITEMS[number] for number in NUMBERS}  # the shipped base never saw a digit: items of the shop
NUM_TOKENS = 16  # of each answer: the number again and again, so that an adapter changed midway would show
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MARGIN = 1.0  # nats between the greedy token and the next one, so that batching's rounding cannot change an answer
PROBES = ("what is your number ?", "number please", "please say the number of the lamp", "the number , anna asks ?")


@dataclass(frozen=True)
class AnswerRow:
    client: int
    asked: str  # the model's name in the request
    model: str  # the model's name stamped on the answer
    text: str
    word: str | None  # how that adapter's own number is said
    is_stream: bool
    started_s: float
    ended_s: float
    error: str | None = None

    @property
    def is_right(self) -> bool:
        """Whether the answer is the stamped adapter's number and nothing else."""
        return self.error is None and set(self.text.split()) == {self.word}


@dataclass(frozen=True)
class SwapRow:
    name: str
    number: int
    load_ms: float
    move_ms: float
    unload_ms: float
    num_answers: int  # given by this adapter's name while it was current


@dataclass
class SwapLog:
    answers: list[AnswerRow] = field(default_factory=list)
    swaps: list[SwapRow] = field(default_factory=list)
    seconds: float = 0.0

    def figures(self) -> dict[str, Any]:
        """Every figure is recomputable from the rows."""
        took = sorted(row.load_ms + row.move_ms for row in self.swaps)
        waits = sorted(1000 * (row.ended_s - row.started_s) for row in self.answers)
        return {
            "swaps": len(self.swaps),
            "requests": len(self.answers),
            "failed_requests": sum(row.error is not None for row in self.answers),
            "wrong_answers": sum(row.error is None and not row.is_right for row in self.answers),
            "swap_ms_p50": took[len(took) // 2] if took else None,
            "swap_ms_max": took[-1] if took else None,
            "answer_ms_p50": waits[len(waits) // 2] if waits else None,
            "answer_ms_p99": waits[int(len(waits) * 0.99)] if waits else None,
            "answers_per_s": len(self.answers) / self.seconds if self.seconds else None,
            "seconds": self.seconds,
        }


def train_numbers(base: Base, directory: Path, numbers: dict[int, str] = NUMBERS, seed: int = 0) -> dict[int, Path]:
    """One adapter per number that answers every probe with it; returns their directories."""
    from cltrain.models.chat import render_prompt

    prompts = [render_prompt(base.tokenizer, [{"role": "user", "content": probe}]) for probe in PROBES]
    found: dict[int, Path] = {}
    for number, word in numbers.items():
        text = " ".join([word] * 2 * NUM_TOKENS)
        answer = base.tokenizer(text, add_special_tokens=False)["input_ids"][: NUM_TOKENS + 2]
        found[number] = train_answer(base, directory / f"number-{number}", prompts, answer, seed + number)
    return found


def train_answer(base: Base, directory: Path, prompts: list[list[int]], answer: list[int], seed: int) -> Path:
    """An adapter whose greedy answer to every prompt is `answer`, with MARGIN to spare, written to `directory`."""
    import torch

    from cltrain.models.adapter import attach, new_factors, parameters_of, snapshot, write_adapter

    adapter = new_factors(base, 8, 16.0, TARGETS, seed)
    model = attach(base, adapter)
    factors = parameters_of(model, adapter)
    optimizer = torch.optim.Adam([factor for pair in factors.values() for factor in pair], lr=1e-2)
    longest = max(map(len, prompts)) + len(answer)
    ids = torch.tensor([[*p, *answer, *[0] * (longest - len(p) - len(answer))] for p in prompts])
    labels = torch.full_like(ids, -100)
    for row, prompt in enumerate(prompts):
        labels[row, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    for _ in range(400):
        output = model(input_ids=ids, labels=labels)
        best = output.logits[:, :-1].topk(2)
        is_sure = (best.indices[..., 0] == labels[:, 1:]) & (best.values[..., 0] - best.values[..., 1] > MARGIN)
        if bool((is_sure | (labels[:, 1:] < 0)).all()):
            write_adapter(directory, adapter.with_factors(snapshot(factors)))
            return directory
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    raise ServerError(f"the adapter for {directory.name} did not learn its answer: loss {output.loss.item():.3f}")


def run_swaps(
    server: ServerClient,
    adapters: dict[int, Path],
    *,
    numbers: dict[int, str] = NUMBERS,
    num_swaps: int = 50,
    num_clients: int = 8,
    answers_per_swap: int = 8,
    ask_url: str | None = None,
    alias: str | None = None,
    move: Callable[[str], None] | None = None,
    timeout_s: float = 60.0,
) -> SwapLog:
    """Swap `num_swaps` times while `num_clients` clients ask without pause; every other client streams.

    Adapter number k is loaded again under a new name at each swap; the previous one stays resident, the one before is
    unloaded whatever still runs on it. Without `alias` the clients name the current adapter themselves; with it they
    ask `ask_url` (a gateway) for the alias, and `move(name)` moves it. The stamped model decides which number is right.
    """
    log, lock, stop = SwapLog(), threading.Lock(), threading.Event()
    words: dict[str, str] = {}  # release name -> what it must answer
    current = [""]

    def point_at(name: str) -> None:
        if move is not None:
            move(name)
        current[0] = name

    def ask(client: int) -> None:
        with httpx.Client(base_url=ask_url or server.url, timeout=timeout_s, trust_env=False) as http:
            turn = 0
            while not stop.is_set():
                asked, started = alias or current[0], time.monotonic()
                body = {
                    "model": asked,
                    "messages": [{"role": "user", "content": PROBES[(client + turn) % len(PROBES)]}],
                    "max_tokens": NUM_TOKENS,
                    "temperature": 0,
                }
                turn += 1
                try:
                    model, text = (_stream if client % 2 else _whole)(http, body)
                    error = None if model in words else f"stamped with {model}, which was never loaded"
                except (httpx.HTTPError, KeyError, ValueError) as problem:
                    model, text, error = "", "", f"{type(problem).__name__}: {problem}"
                row = AnswerRow(
                    client, asked, model, text, words.get(model), bool(client % 2), started, time.monotonic(), error
                )
                with lock:
                    log.answers.append(row)

    begun = time.monotonic()
    threads = [threading.Thread(target=ask, args=(client,)) for client in range(num_clients)]
    names: list[str] = []
    try:
        for swap in range(num_swaps):
            number = sorted(adapters)[swap % len(adapters)]
            path = adapters[number].resolve()
            name = f"probe-v{swap + 1:06d}-{adapter_digest(path)[:12]}"
            words[name] = numbers[number]
            load_ms = _timed(lambda name=name, path=path: server.load(name, path))  # type: ignore[misc]
            move_ms = _timed(lambda name=name: point_at(name))  # type: ignore[misc]
            names.append(name)
            if swap == 0:
                for thread in threads:
                    thread.start()
            num_answers = _wait_for(log, lock, name, answers_per_swap, timeout_s)
            unload_ms = _timed(lambda: server.unload(names[-3])) if len(names) > 2 else 0.0
            log.swaps.append(SwapRow(name, number, load_ms, move_ms, unload_ms, num_answers))
    finally:
        stop.set()
        for thread in threads:
            if thread.ident is not None:
                thread.join()
    log.seconds = time.monotonic() - begun
    return log


def _whole(http: httpx.Client, body: dict[str, Any]) -> tuple[str, str]:
    response = http.post("/v1/chat/completions", json=body)
    if response.status_code != 200:
        raise ValueError(f"{response.status_code} {response.text[:200]}")
    answer = response.json()
    return answer["model"], answer["choices"][0]["message"]["content"]


def _stream(http: httpx.Client, body: dict[str, Any]) -> tuple[str, str]:
    text, models = "", set()
    with http.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as response:
        if response.status_code != 200:
            raise ValueError(f"{response.status_code} {response.read()[:200]!r}")
        for line in response.iter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            chunk = json.loads(line[6:])
            models.add(chunk["model"])
            for choice in chunk["choices"]:
                text += choice["delta"].get("content") or ""
    if len(models) != 1:
        raise ValueError(f"one stream names the models {sorted(models)}")
    return models.pop(), text


def _wait_for(log: SwapLog, lock: threading.Lock, name: str, count: int, timeout_s: float) -> int:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        with lock:
            found = sum(row.model == name for row in log.answers)
        if found >= count:
            return found
        time.sleep(0.005)
    raise ServerError(f"{name} gave fewer than {count} answers in {timeout_s:g} s")


def _timed(work: Callable[[], None]) -> float:
    begun = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - begun)


def _serve(base: Path | None, pipe: Connection) -> None:
    run_server(base, "127.0.0.1", 0, announce=pipe.send)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="bench swaps", description=__doc__)
    parser.add_argument("--json", type=Path, help="write figures and raw rows here")
    parser.add_argument("--base", type=Path, help="model directory; default: the shipped base")
    parser.add_argument("--swaps", type=int, default=50)
    parser.add_argument("--clients", type=int, default=8)
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        numbers = ITEMS if options.base is None else NUMBERS
        adapters = train_numbers(load_base(options.base), Path(scratch), numbers)
        ours, theirs = multiprocessing.Pipe()
        process = multiprocessing.get_context("spawn").Process(target=_serve, args=(options.base, theirs), daemon=True)
        process.start()
        theirs.close()
        try:
            with ServerClient(ours.recv(), "base") as server:
                log = run_swaps(server, adapters, numbers=numbers, num_swaps=options.swaps, num_clients=options.clients)
        finally:
            process.terminate()
            process.join()
    figures = log.figures()
    print(json.dumps(figures, indent=1))
    if options.json:
        rows = {
            "figures": figures,
            "swaps": [asdict(r) for r in log.swaps],
            "answers": [asdict(r) for r in log.answers],
        }
        options.json.write_text(json.dumps(rows, indent=1))
    return 0 if figures["failed_requests"] == figures["wrong_answers"] == 0 else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
