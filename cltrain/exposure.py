"""Which doors of an inference server stand open, asked without a key and without changing anything there.

Routes that act on POST are asked with GET: 405 says that they are there, 401, 403 and 404 that we do not get in.
"""

from __future__ import annotations

import secrets
import socket
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Literal, NamedTuple
from urllib.parse import urlsplit

import httpx

from cltrain.gateway.guard import is_loopback

LOADING = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/adapters")  # vLLM's key never guards the last
ACTING = (
    "/pause", "/resume", "/sleep", "/wake_up", "/collective_rpc", "/abort_requests", "/reset_prefix_cache",
    "/update_weights", "/server_info",
)  # fmt: skip  # all of VLLM_SERVER_DEV_MODE
SGLANG = (
    "/load_lora_adapter", "/unload_lora_adapter", "/load_lora_adapter_from_tensors", "/update_weights_from_disk",
    "/pause_generation", "/abort_request",
)  # fmt: skip  # only routes that know no GET: its /flush_cache and others would act
SHUT = (401, 403, 404)
TIMEOUT_S = 2.0


class Finding(NamedTuple):
    state: Literal["good", "note", "bad"]
    detail: str  # what was seen, and how to mend it


def look(url: str, kind: str, key: str | None = None, own: Sequence[str] | None = None) -> list[Finding]:
    """What stands open on the server at `url`; empty when it does not answer.

    `key` is the server's own, used only where without it nothing can be told. `own` are the addresses by which other
    machines reach this one; None: as far as they can be found.
    """
    with httpx.Client(base_url=url.removesuffix("/v1"), timeout=TIMEOUT_S, trust_env=False) as http:
        try:
            return list(_findings(http, url, kind, key, own_addresses() if own is None else own))
        except httpx.HTTPError:
            return []


def _findings(http: httpx.Client, url: str, kind: str, key: str | None, own: Sequence[str]) -> Iterator[Finding]:
    outside = reached_at(url, own)
    is_sglang = kind == "sglang"
    if acting := [route for route in (() if is_sglang else ACTING) if _is_open(http, route)]:
        yield Finding(
            "bad",
            f"{', '.join(acting)} can be called without a key: whoever does stops or changes the server. Start it "
            "without VLLM_SERVER_DEV_MODE",
        )
    if loading := [route for route in (SGLANG if is_sglang else LOADING) if _is_open(http, route)]:
        if outside is None:
            yield Finding("note", f"{', '.join(loading)}: open without a key, to this machine alone as far as it shows")
        else:
            key_helps = "with --admin-api-key" if is_sglang else "(an API key does not guard /adapters)"
            yield Finding(
                "bad",
                f"{', '.join(loading)}: open without a key at {outside}: whoever gets there swaps what answers. Let it "
                f"listen on 127.0.0.1 or a network of its own {key_helps}, and give others the gateway",
            )
    as_owner = {"authorization": f"Bearer {key}"} if key else {}
    if kind == "vllm":
        code = http.get(LOADING[0], headers=as_owner).status_code
        if code == 404:
            yield Finding(
                "bad",
                "it takes no adapters at run time: start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 --enable-lora",
            )
        elif code in SHUT:
            yield Finding(
                "note", f"whether it takes adapters cannot be told without its key (server.api_key_env; {code})"
            )
        yield from _tools(http, as_owner)
    if not is_sglang:  # it answers any name without a colon as the bare base, and looks none up
        yield from _resolver(http, as_owner)


def _tools(http: httpx.Client, as_owner: dict[str, str]) -> Iterator[Finding]:
    """vLLM refuses requests with tools until it was told how its model writes calls: asked with one token."""
    listed = http.get("/v1/models", headers=as_owner)
    names = [card["id"] for card in listed.json()["data"]] if listed.status_code == 200 else []
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    asked = {"messages": [{"role": "user", "content": "a"}], "tools": [tool], "max_tokens": 1}
    for name in names[:1]:
        with suppress(httpx.TimeoutException):  # a refusal comes at once
            answer = http.post("/v1/chat/completions", json={"model": name, **asked}, headers=as_owner)
            if "--enable-auto-tool-choice" in answer.text and answer.status_code == 400:
                yield Finding(
                    "bad",
                    "it refuses requests with tools, the gate's as well: start it with --enable-auto-tool-choice "
                    "--tool-call-parser NAME (the one of its model's format, such as hermes)",
                )


def _resolver(http: httpx.Client, as_owner: dict[str, str]) -> Iterator[Finding]:
    """A name that leads out of a directory must be unknown. A resolver that finds nothing there says 404 as well."""
    name = f"../cltrain-doctor-{secrets.token_hex(4)}"
    answer = http.post("/v1/completions", json={"model": name, "prompt": "a", "max_tokens": 1}, headers=as_owner)
    if answer.status_code == 200 or (answer.status_code not in SHUT and "was found but" in answer.text):
        yield Finding(
            "bad",
            f"the model name {name!r} was looked up as a path ({answer.status_code}): whoever asks chooses a directory "
            "to load. Start it without lora_filesystem_resolver in VLLM_PLUGINS",
        )
    elif answer.status_code == 404:
        yield Finding("good", "a model name that is a path is unknown there (a resolver without that path says so too)")
    else:
        yield Finding("note", f"whether model names are looked up as paths cannot be told ({answer.status_code})")


def _is_open(http: httpx.Client, route: str) -> bool:
    code = http.get(route).status_code
    return code not in SHUT and (code < 300 or 400 <= code < 500)


def reached_at(url: str, own: Sequence[str]) -> str | None:
    """An address at which other machines reach the server, or None."""
    place = urlsplit(url)
    host, port = place.hostname or "", place.port or (443 if place.scheme == "https" else 80)
    if not is_loopback(host):
        return f"{host}:{port}"
    for address in own:
        try:
            socket.create_connection((address, port), TIMEOUT_S).close()
        except OSError:
            continue
        return f"{address}:{port}"
    return None


def own_addresses() -> list[str]:
    """This machine's addresses on its networks: of its name, and those that a packet to elsewhere would leave from."""
    found: set[str] = set()
    with suppress(OSError):
        found |= {str(address[0]) for *_, address in socket.getaddrinfo(socket.gethostname(), None)}
    for family, somewhere in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):  # RFC 5737, RFC 3849
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect((somewhere, 9))  # a route is looked up, nothing is sent
                found.add(str(probe.getsockname()[0]))
        except OSError:
            continue
    return sorted(address for address in found if not is_loopback(address))
