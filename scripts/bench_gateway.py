"""What the gateway costs: 64 streams of 30 tokens/s through it and past it in turns, and the most it alone carries.

The server is a fake in a process of its own, the gateway a real one in another; clients speak HTTP over bare sockets,
which costs little. `--json F` gets every stream and every request as raw rows beside the figures.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import httpx

AGENT = "support"
TOKEN = "tok "
TOKENS_PER_S = 30.0
SILENCE_S = 30.0  # after it a stream or an answer counts as failed


# ------------------------------------------------------------ the fake server


def serve(pipe: Connection) -> None:
    """An inference server on a free port that speaks vLLM's dialect: every stream at TOKENS_PER_S, the rest at once."""

    async def run() -> None:
        server = await asyncio.start_server(_answer, "127.0.0.1", 0, backlog=2048)
        pipe.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(run())


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            body = json.loads(await reader.readexactly(_length(head)) or b"{}")
            if head.startswith(b"GET"):
                _send(writer, {"object": "list", "data": [{"id": "base", "root": "/base", "parent": None}]})
            elif body.get("stream"):
                await _stream(writer, body)
            else:
                said = {"role": "assistant", "content": TOKEN}
                _send(writer, {**_head(body), "choices": [{**_one(0, "stop"), "message": said}], "usage": _usage(1)})
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    finally:
        writer.close()


async def _stream(writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
    """Token i leaves i / TOKENS_PER_S after the first: a late one does not delay those after it."""
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
    head, start, num = _head(body), time.monotonic(), body["max_tokens"]
    for i in range(num):
        await asyncio.sleep(max(0.0, start + i / TOKENS_PER_S - time.monotonic()))
        choice = {**_one(i, "stop" if i == num - 1 else None), "delta": {"content": TOKEN}}
        _chunk(writer, {**head, "choices": [choice]} | ({"prompt_token_ids": [1, 2, 3]} if i == 0 else {}))
        await writer.drain()
    _chunk(writer, {**head, "choices": [], "usage": _usage(num)})
    writer.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")


def _head(body: dict[str, Any]) -> dict[str, Any]:
    return {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": body["model"]}


def _one(token: int, finish: str | None) -> dict[str, Any]:
    logprobs = {"content": [{"token": TOKEN, "logprob": -0.5, "bytes": [116, 111, 107], "top_logprobs": []}]}
    return {"index": 0, "finish_reason": finish, "token_ids": [token], "logprobs": logprobs}


def _usage(num: int) -> dict[str, int]:
    return {"prompt_tokens": 3, "completion_tokens": num, "total_tokens": 3 + num}


def _chunk(writer: asyncio.StreamWriter, data: dict[str, Any]) -> None:
    event = b"data: " + json.dumps(data).encode() + b"\n\n"
    writer.write(f"{len(event):x}\r\n".encode() + event + b"\r\n")


def _send(writer: asyncio.StreamWriter, data: dict[str, Any]) -> None:
    body = json.dumps(data).encode()
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body) + body)


def _length(head: bytes) -> int:
    lines = (line.partition(b":") for line in head.lower().split(b"\r\n"))
    return next((int(value) for name, _, value in lines if name == b"content-length"), 0)


# ------------------------------------------------------------ the clients


@dataclass(frozen=True)
class StreamRow:
    window: int
    through: str  # gateway | direct
    started_s: float  # since the window began
    first_ms: float | None  # from the request to the first token
    num_tokens: int
    num_in_window: int  # of them, before the window ended
    error: str | None = None


@dataclass(frozen=True)
class RequestRow:
    through: str
    started_s: float
    ms: float
    error: str | None = None


@dataclass
class Found:
    num_streams: int
    window_s: float
    streams: list[StreamRow] = field(default_factory=list)
    requests: list[RequestRow] = field(default_factory=list)

    def figures(self) -> dict[str, Any]:
        """Every figure is recomputable from the rows."""
        firsts = {t: [r.first_ms for r in self.streams if r.through == t and r.first_ms] for t in ("gateway", "direct")}
        tokens = {t: sum(r.num_in_window for r in self.streams if r.through == t) for t in ("gateway", "direct")}
        rates = {t: _rate([r for r in self.requests if r.through == t]) for t in ("gateway", "direct")}
        waits = sorted(r.ms for r in self.requests if r.through == "gateway")
        return {
            "streams": self.num_streams,
            "added_ttft_ms": median(firsts["gateway"]) - median(firsts["direct"]),
            "ttft_ms_gateway": median(firsts["gateway"]),
            "ttft_ms_direct": median(firsts["direct"]),
            "throughput_ratio": tokens["gateway"] / tokens["direct"],
            "max_requests_per_s": rates["gateway"],
            "direct_requests_per_s": rates["direct"],
            "answer_ms_p50": waits[len(waits) // 2],
            "answer_ms_p99": waits[int(len(waits) * 0.99)],
            "num_streams_measured": len(self.streams),
            "num_requests_measured": len(self.requests),
            "failed": sum(r.error is not None for r in (*self.streams, *self.requests)),
        }


def _rate(rows: list[RequestRow]) -> float:
    """Answers per second between the first request and the last answer."""
    good = [r for r in rows if r.error is None]
    span_s = max(r.started_s + r.ms / 1000 for r in good) - min(r.started_s for r in good)
    return len(good) / span_s


def _request(model: str, path: str, **fields: Any) -> bytes:
    asked = {"model": model, "messages": [{"role": "user", "content": "go on"}], **fields}
    body = json.dumps(asked).encode()
    kind = f"content-type: application/json\r\ncontent-length: {len(body)}"
    head = f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\n{kind}\r\n\r\n"
    return head.encode() + body


async def stream_window(
    found: Found, window: int, through: str, port: int, model: str, num_tokens: int, seed: int
) -> None:
    """`num_streams` clients for a window; each begins at a moment of its own and streams again and again."""
    asked = _request(model, "/v1/chat/completions", stream=True, max_tokens=num_tokens)
    begun, draw = time.monotonic(), random.Random(seed)
    end = begun + found.window_s

    async def one() -> StreamRow:
        start, times, error = time.monotonic(), [], None
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                writer.write(asked)
                async with asyncio.timeout(SILENCE_S):
                    while not (line := await reader.readline()).startswith(b"data: [DONE]"):
                        if TOKEN.encode() in line and line.startswith(b"data: "):
                            times.append(time.monotonic())
                        if not line:
                            raise ConnectionError("the stream broke off")
            finally:
                writer.close()
        except (OSError, TimeoutError) as problem:
            error = f"{type(problem).__name__}: {problem}"
        first_ms = 1000 * (times[0] - start) if times else None
        in_window = sum(at < end for at in times)
        return StreamRow(window, through, start - begun, first_ms, len(times), in_window, error)

    async def client(offset_s: float) -> None:
        await asyncio.sleep(offset_s)
        while time.monotonic() < end:
            found.streams.append(await one())

    stream_s = num_tokens / TOKENS_PER_S
    await asyncio.gather(*(client(draw.random() * stream_s) for _ in range(found.num_streams)))


async def request_window(found: Found, through: str, port: int, model: str, num_clients: int) -> None:
    """As many whole answers as `num_clients` kept-alive connections get, one after the other on each."""
    asked, begun = _request(model, "/v1/chat/completions", max_tokens=1), time.monotonic()

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while (start := time.monotonic()) < begun + found.window_s:
            error = None
            writer.write(asked)
            async with asyncio.timeout(SILENCE_S):
                head = await reader.readuntil(b"\r\n\r\n")
                await reader.readexactly(_length(head))
            if not head.startswith(b"HTTP/1.1 200") or (through == "gateway" and b"x-cltrain-recorded: 1" not in head):
                error = head.split(b"\r\n")[0].decode()
            took_ms = 1000 * (time.monotonic() - start)
            found.requests.append(RequestRow(through, start - begun, took_ms, error))
        writer.close()

    await asyncio.gather(*(client() for _ in range(num_clients)))


# ------------------------------------------------------------ all together


@contextmanager
def both(state: Path) -> Iterator[tuple[int, int]]:
    """(port of the fake server, port of a gateway in front of it), each a process of its own."""
    ours, theirs = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(theirs,), daemon=True)
    server.start()
    port = ours.recv()
    settings = {"home": state, "server.url": f"http://127.0.0.1:{port}", "server.kind": "vllm", "gateway.port": 0}
    words = [f"--set={name}={value}" for name, value in settings.items()]
    gateway = subprocess.Popen(
        [sys.executable, "-m", "cltrain.gateway", *words, f"--set=agent.name={AGENT}"],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert gateway.stdout is not None
        line = gateway.stdout.readline()
        assert line.startswith("gateway on "), f"the gateway did not start: {line}"
        url = line.split()[2].removesuffix(",").removesuffix("/v1")
        while not _is_up(url):
            time.sleep(0.05)
        yield port, int(url.rpartition(":")[2])
    finally:
        gateway.terminate()
        gateway.wait(30)
        server.terminate()
        server.join()


def _is_up(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=1.0, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def measure(num_streams: int, window_s: float, num_windows: int, num_tokens: int, seed: int = 0) -> Found:
    """`num_windows` of each kind, in turns: direct, gateway, direct, ...; then the requests alone."""
    found = Found(num_streams, window_s)
    with tempfile.TemporaryDirectory() as state, both(Path(state)) as (server, gateway):
        ways = {"direct": (server, "base"), "gateway": (gateway, AGENT)}
        asyncio.run(request_window(Found(num_streams, 1.0), "gateway", gateway, AGENT, 4))  # warm, and thrown away
        for window in range(2 * num_windows):
            through = ("direct", "gateway")[window % 2]
            asyncio.run(stream_window(found, window, through, *ways[through], num_tokens, seed + window // 2))
        for through in ("direct", "gateway"):
            asyncio.run(request_window(found, through, *ways[through], num_streams))
    return found


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="bench gateway", description=__doc__)
    parser.add_argument("--json", type=Path, help="write figures and raw rows here")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--window-s", type=float, default=15.0)
    parser.add_argument("--windows", type=int, default=4, help="of each kind, in turns")
    parser.add_argument("--tokens", type=int, default=90, help="of each stream")
    options = parser.parse_args(argv)
    found = measure(options.streams, options.window_s, options.windows, options.tokens)
    figures = found.figures()
    print(json.dumps(figures, indent=1))
    if options.json:
        rows = {"streams": [asdict(r) for r in found.streams], "requests": [asdict(r) for r in found.requests]}
        options.json.write_text(json.dumps({"figures": figures, **rows}, indent=1))
    is_good = figures["added_ttft_ms"] <= 5 and figures["throughput_ratio"] >= 0.95 and not figures["failed"]
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
