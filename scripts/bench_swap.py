"""Adapter swaps under constant load: each adapter answers a probe with its own number, and no answer may be wrong.

Windows without and with swaps take turns, so that both see the same machine. `run_swaps` is the test's core as well.
`--json F` gets the row, and every answer, swap and window it was made from.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import httpx
import numpy as np

from cltrain.demo import world
from cltrain.deploy.client import ServerClient
from cltrain.errors import ServerError
from cltrain.models.base import Base, load_base
from cltrain.models.digest import adapter_digest, base_path
from tests.engines import KINDS, Served

NUMBERS = {number: str(number) for number in (3, 5, 7, 8, 9)}  # each adapter's own number, and how it is said
ITEMS = {number: world.ITEMS[number] for number in NUMBERS}  # the shipped base never saw a digit: items of the shop
NUM_TOKENS = 16  # of each answer: the number again and again, so that an adapter changed midway would show
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MARGIN = 1.0  # nats between the greedy token and the next one, so that batching's rounding cannot change an answer
WINDOW_REQUESTS = 1000
ROUNDS = 2  # each a window without swaps and one with its share of them
P99_LIMITS = {"embedded": 1.5, "vllm": 1.2}
NUM_RESAMPLES = 2000
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
    took_ms: float  # from the call until the next request names the new adapter


@dataclass(frozen=True)
class WindowRow:
    kind: Literal["quiet", "swapping"]
    started_s: float
    ended_s: float


@dataclass
class SwapLog:
    answers: list[AnswerRow] = field(default_factory=list)
    swaps: list[SwapRow] = field(default_factory=list)
    windows: list[WindowRow] = field(default_factory=list)

    def row(self, server: str) -> dict[str, Any]:
        """Every figure is recomputable from the rows; p99_ratio is the lower 95% bound, None without quiet windows."""
        took = sorted(row.took_ms for row in self.swaps)
        swapping, quiet = self.latencies_s("swapping"), self.latencies_s("quiet")
        return {
            "server": server,
            "swaps": len(self.swaps),
            "requests": len(self.answers),
            "failed_requests": sum(row.error is not None for row in self.answers),
            "wrong_adapter_answers": sum(row.error is None and not row.is_right for row in self.answers),
            "p99_ratio": p99_ratio_bound(swapping, quiet) if swapping and quiet else None,
            "swap_ms_p50": took[len(took) // 2] if took else None,
        }

    def latencies_s(self, kind: str) -> list[float]:
        """Of the answers that lie whole in a window of this kind."""
        spans = [(window.started_s, window.ended_s) for window in self.windows if window.kind == kind]
        return [
            row.ended_s - row.started_s
            for row in self.answers
            if any(start <= row.started_s and row.ended_s <= end for start, end in spans)
        ]


def p99_ratio_bound(swapping_s: list[float], quiet_s: list[float], seed: int = 0) -> float:
    """What the ratio of the 99th percentiles exceeds with 95% confidence: percentile bootstrap over requests."""
    generator = np.random.default_rng(seed)

    def p99(sample: list[float]) -> Any:
        values = np.asarray(sample)
        return np.array([np.quantile(generator.choice(values, len(values)), 0.99) for _ in range(NUM_RESAMPLES)])

    return float(np.quantile(p99(swapping_s) / p99(quiet_s), 0.05))


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
    num_rounds: int = 1,
    num_quiet: int = 0,
    timeout_s: float = 60.0,
) -> SwapLog:
    """Swap `num_swaps` times while `num_clients` clients ask without pause; every other client streams.

    Each of `num_rounds` begins with `num_quiet` answers without a swap. Adapter number k is loaded again under a new
    name at each swap; the previous one stays resident, the one before is unloaded whatever still runs on it. The
    stamped model decides which number is right.
    """
    log, lock, stop = SwapLog(), threading.Lock(), threading.Event()
    words: dict[str, str] = {}  # release name -> what it must answer
    num_answers: Counter[str] = Counter()  # by release name
    current, names = [""], list[str]()

    def ask(client: int) -> None:
        with httpx.Client(base_url=server.url, timeout=timeout_s, trust_env=False) as http:
            turn = 0
            while not stop.is_set():
                asked, started = current[0], time.monotonic()
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
                    num_answers[model] += 1

    def load(number: int) -> SwapRow:
        """Bring in the number under a new name and point the clients at it."""
        path = adapters[number].resolve()
        name = f"probe-v{len(names) + 1:06d}-{adapter_digest(path)[:12]}"
        words[name] = numbers[number]
        begun = time.perf_counter()
        server.load(name, path)
        current[0] = name
        names.append(name)
        return SwapRow(name, number, 1000 * (time.perf_counter() - begun))

    def wait(count: int, count_now: Callable[[], int]) -> None:
        deadline = time.monotonic() + timeout_s
        while count_now() < count:
            if time.monotonic() > deadline:
                raise ServerError(f"{server.url} gave {count_now()} of {count} answers in {timeout_s:g} s")
            time.sleep(0.005)

    order = itertools.cycle(sorted(adapters))
    load(next(order))
    threads = [threading.Thread(target=ask, args=(client,)) for client in range(num_clients)]
    for thread in threads:
        thread.start()
    try:
        for turn in range(num_rounds):
            begun = time.monotonic()
            wait(len(log.answers) + num_quiet, lambda: len(log.answers))
            middle = time.monotonic()
            for _ in range(num_swaps * turn // num_rounds, num_swaps * (turn + 1) // num_rounds):
                log.swaps.append(load(next(order)))
                wait(answers_per_swap, lambda: num_answers[current[0]])
                if len(names) > 2:
                    server.unload(names[-3])
            log.windows += [WindowRow("quiet", begun, middle), WindowRow("swapping", middle, time.monotonic())]
    finally:
        stop.set()
        for thread in threads:
            thread.join()
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
            if "error" in chunk:
                raise ValueError(chunk["error"]["message"])
            models.add(chunk["model"])
            for choice in chunk["choices"]:
                text += choice["delta"].get("content") or ""
    if len(models) != 1:
        raise ValueError(f"one stream names the models {sorted(models)}")
    return models.pop(), text


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="bench swap", description=__doc__)
    parser.add_argument("--server", choices=KINDS, default="embedded", help="vllm needs scripts/setup --vllm")
    parser.add_argument("--json", type=Path, help="write the row and what it was made from here")
    parser.add_argument("--base", type=Path, help="model directory; default: the shipped base")
    parser.add_argument("--swaps", type=int, default=100)
    parser.add_argument("--clients", type=int, default=8)
    options = parser.parse_args(argv)
    numbers = ITEMS if options.base is None else NUMBERS
    with tempfile.TemporaryDirectory() as scratch:
        adapters = train_numbers(load_base(options.base), Path(scratch), numbers)
        with contextlib.closing(Served(KINDS[options.server], base_path(options.base))) as served:
            log = run_swaps(
                served.client, adapters, numbers=numbers, num_swaps=options.swaps, num_clients=options.clients,
                num_rounds=ROUNDS, num_quiet=WINDOW_REQUESTS + options.clients, timeout_s=600,
                answers_per_swap=-(-WINDOW_REQUESTS * ROUNDS // options.swaps),
            )  # fmt: skip
    row = log.row(options.server)
    print(json.dumps(row, indent=1))
    if options.json:
        parts = {"swaps": log.swaps, "windows": log.windows, "answers": log.answers}
        rows = {name: [asdict(part) for part in listed] for name, listed in parts.items()}
        options.json.write_text(json.dumps({"row": row, **rows}, indent=1))
    is_slow = row["p99_ratio"] > P99_LIMITS.get(options.server, float("inf"))
    return 1 if row["failed_requests"] or row["wrong_adapter_answers"] or is_slow else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
