"""A tiny OpenAI-compatible server for tests: it answers by a function of the request and keeps what it was asked."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = dict[str, Any] | str | int | None
"""The text of the answer; or a whole choice; or a status; or None: no answer at all while the client waits."""


class ChatServer:
    def __init__(self, answer: Callable[[dict[str, Any]], Reply]) -> None:
        self.answer, self.asked, self.headers = answer, list[dict[str, Any]](), list[dict[str, str]]()
        self.url, self.closing = "", threading.Event()


@contextmanager
def chat_server(answer: Callable[[dict[str, Any]], Reply], port: int = 0) -> Iterator[ChatServer]:
    server = ChatServer(answer)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            server.asked.append(body)
            server.headers.append(dict(self.headers))
            reply = server.answer(body) if self.path == "/v1/chat/completions" else 404
            if reply is None:
                server.closing.wait(30)
                return
            status = reply if isinstance(reply, int) else 200
            choice = {"message": {"role": "assistant", "content": reply}, "finish_reason": "stop"}
            whole = {"id": "x", "object": "chat.completion", "created": 1, "model": body["model"]}
            whole["choices"] = [{"index": 0, **(reply if isinstance(reply, dict) else choice)}]
            whole["usage"] = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
            data = json.dumps(whole if status == 200 else {"error": {"message": "no"}}).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    http.daemon_threads = True
    server.url = f"http://127.0.0.1:{http.server_address[1]}/v1"
    thread = threading.Thread(target=http.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        http.shutdown()
        http.server_close()
        thread.join(5)
