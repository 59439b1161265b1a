"""What the doctor says of a server's open doors, and that asking changed nothing there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from cltrain.deploy.client import ServerClient
from cltrain.errors import ConfigError
from cltrain.exposure import look, own_addresses
from cltrain.gateway.keys import FILE, add_key
from tests.command import Command, cltrain, free_port
from tests.gateway_parts import served

__all__ = ["cltrain"]  # a fixture
DEV = ("/pause", "/collective_rpc", "/reset_prefix_cache")
ALL = ("load", "adapters")
METRICS = """vllm:num_requests_running{engine="0",model_name="base"} 0.0
vllm:num_requests_running{engine="1",model_name="base"} 0.0
"""  # of vLLM 0.32, --data-parallel-size 2 --api-server-count 1


class FakeVllm:
    """As vLLM answers: routes that act take POST only, its key guards /v1 alone. `changes`: what probing did to it."""

    def __init__(self, *holes: str, key: str | None = None) -> None:
        self.changes: list[str] = []
        self.app = FastAPI()
        self.holes, self.key = holes, key
        if "load" in holes:
            for route in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
                self.app.post(route)(self.act)
        if "adapters" in holes:
            self.app.post("/adapters")(self.act)
            self.app.delete("/adapters/{name}")(self.act)
        for route in DEV if "dev" in holes else ():
            self.app.post(route)(self.act)
        self.app.post("/v1/completions")(self.complete)
        if "no parser" in holes:
            self.app.get("/v1/models")(lambda: {"data": [{"id": "base"}]})
            self.app.post("/v1/chat/completions")(self.refuse_tools)
        self.app.get("/metrics")(lambda: Response(METRICS if "data parallel" in holes else METRICS.splitlines()[0]))
        self.app.get("/health")(lambda: {})
        self.app.middleware("http")(self.check_key)

    async def check_key(self, request: Request, call_next: Any) -> Response:
        is_guarded = self.key is not None and request.url.path.startswith("/v1")
        if is_guarded and request.headers.get("authorization") != f"Bearer {self.key}":
            return JSONResponse({"error": "Unauthorized"}, 401)
        return await call_next(request)  # type: ignore[no-any-return]

    async def act(self, request: Request) -> Response:
        self.changes.append(request.url.path)
        return Response("Success")

    async def refuse_tools(self, request: Request) -> Response:
        said = '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set'  # vLLM 0.32
        assert (await request.json())["tools"]
        return JSONResponse({"error": {"message": said, "code": 400}}, 400)

    async def complete(self, request: Request) -> Response:
        model = (await request.json())["model"]
        if "resolver" in self.holes and ".." in model:
            return JSONResponse({"choices": []})
        if "resolver, empty adapter" in self.holes and ".." in model:
            return JSONResponse(
                {"error": {"message": f"LoRA adapter '{model}' was found but could not be loaded."}}, 400
            )
        return JSONResponse({"error": {"message": f"The model `{model}` does not exist.", "code": 404}}, 404)


@contextmanager
def fake(*holes: str, key: str | None = None) -> Iterator[tuple[FakeVllm, str]]:
    vllm = FakeVllm(*holes, key=key)
    with served(vllm.app) as url:
        yield vllm, url
    assert vllm.changes == []


def test_a_server_that_only_this_machine_reaches_is_noted_and_not_blamed() -> None:
    with fake(*ALL) as (_, url):
        found = look(url, "vllm", own=())
    assert [f.state for f in found] == ["note", "good"]
    assert "/v1/load_lora_adapter, /v1/unload_lora_adapter, /adapters: open without a key" in found[0].detail


def test_loading_routes_that_others_reach_are_bad_and_it_says_where_and_what_to_do() -> None:
    with fake(*ALL) as (_, url):
        found = look(url, "vllm", own=("127.0.0.1",))  # as if that were an address of this machine on a network
    assert [f.state for f in found] == ["bad", "good"]
    port = url.rpartition(":")[2]
    assert f"open without a key at 127.0.0.1:{port}" in found[0].detail
    assert "Let it listen on 127.0.0.1" in found[0].detail


@pytest.mark.skipif(not own_addresses(), reason="this machine has no address but loopback")
def test_a_server_on_a_network_address_is_found_there_by_itself() -> None:
    import threading
    import time

    import uvicorn

    vllm, port = FakeVllm(*ALL), free_port()
    server = uvicorn.Server(uvicorn.Config(vllm.app, host="0.0.0.0", port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 10
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.01)
    found = look(f"http://127.0.0.1:{port}", "vllm")
    server.should_exit = True
    thread.join(10)
    assert "bad" in [f.state for f in found], found
    assert vllm.changes == []


def test_vllms_own_key_leaves_adapters_open() -> None:
    with fake(*ALL, key="sk") as (_, url):
        found = look(url, "vllm", own=("127.0.0.1",))
        told = look(url, "vllm", "sk", own=("127.0.0.1",))
    assert [f.state for f in found] == ["bad", "note", "note"]
    assert found[0].detail.startswith("/adapters: open without a key")
    assert "without its key (server.api_key_env; 401)" in found[1].detail
    assert [f.state for f in told] == ["bad", "good"], "with the key the rest can be told"


def test_development_routes_are_bad_wherever_it_listens() -> None:
    with fake("load", "dev") as (_, url):
        found = look(url, "vllm", own=())
    assert found[0].state == "bad"
    assert found[0].detail.startswith("/pause, /collective_rpc, /reset_prefix_cache can be called without a key")
    assert "VLLM_SERVER_DEV_MODE" in found[0].detail


@pytest.mark.parametrize("hole", ["resolver", "resolver, empty adapter"])
def test_a_resolver_of_paths_is_bad(hole: str) -> None:
    with fake("load", hole) as (_, url):
        found = look(url, "vllm", own=())
    assert found[-1].state == "bad"
    assert "lora_filesystem_resolver" in found[-1].detail


def test_a_server_without_run_time_adapters_is_told_how_to_start() -> None:
    with fake() as (_, url):
        (found, _) = look(url, "vllm", own=())
        assert [f.state for f in look(url, "openai", own=())] == ["good"], "who takes none needs none"
    assert found.state == "bad"
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 --enable-lora" in found.detail


def test_a_data_parallel_vllm_is_refused_when_it_is_attached_and_by_the_doctor(
    cltrain: Command, tmp_path: Path
) -> None:
    with fake(*ALL) as (_, url), ServerClient(url, "base") as client:
        client.check_takes(16, ["q_proj"], 6)
    with fake(*ALL, "data parallel") as (_, url):
        with ServerClient(url, "base") as client, pytest.raises(ConfigError, match="one of its 2 engines"):
            client.check_takes(16, ["q_proj"], 6)
        words = [f"--home={tmp_path / 'state'}", f"--set=server.url={url}", "--set=server.kind=vllm"]
        found = [(state, detail) for what, state, detail in findings(cltrain, *words) if what == "server"]
    assert [detail for state, detail in found if state == "bad" and "without --data-parallel-size" in detail]
    assert [detail for state, detail in found if state == "note" and "--max-cpu-loras 6 or more" in detail]


def test_a_vllm_that_refuses_tools_is_told_how_to_start() -> None:
    with fake("load", "no parser") as (_, url):
        (found,) = [f for f in look(url, "vllm", own=()) if f.state == "bad"]
    assert "--enable-auto-tool-choice --tool-call-parser" in found.detail


def test_a_server_that_is_not_there_is_somebody_elses_finding() -> None:
    assert look(f"http://127.0.0.1:{free_port()}", "vllm", own=()) == []


def findings(cltrain: Command, *words: str) -> list[tuple[str, str, str]]:
    return [(f["what"], f["state"], f["detail"]) for f in cltrain("doctor", *words, "--json").json["findings"]]


def test_the_doctor_reports_the_doors_of_the_configured_server_and_the_keys(cltrain: Command, tmp_path: Path) -> None:
    home = f"--home={tmp_path / 'state'}"
    with fake("load", "dev", key=None) as (_, url):
        found = findings(cltrain, home, f"--set=server.url={url}", "--set=server.kind=vllm")
    assert ("bad", True) in [(state, "/pause" in detail) for what, state, detail in found if what == "server"]
    assert [(state, detail[:11]) for what, state, detail in found if what == "keys"] == [("good", "none needed")]
    assert not (tmp_path / "state").exists()
    open_to_all = "--set=gateway.host=0.0.0.0"
    assert ("keys", "bad") in [(what, state) for what, state, _ in findings(cltrain, home, open_to_all)]
    add_key(tmp_path / "state", "anna", ["infer"], now=1.0)
    assert ("keys", "good", "1 valid, of 1") in findings(cltrain, home, open_to_all)
    os.chmod(tmp_path / "state" / FILE, 0o644)
    assert [d for what, s, d in findings(cltrain, home) if (what, s) == ("keys", "bad") and "chmod 600" in d]
    shown = findings(cltrain, home, "--set=server.host=0.0.0.0")
    assert [d for what, s, d in shown if (what, s) == ("server", "bad") and "takes adapters from whoever" in d]
