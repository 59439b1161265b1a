"""Adapters that do not fit, windows with too little or too much, servers that give too little: a clear word each, and
nothing is lost."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import Response
from sqlalchemy import select

from cltrain import launch
from cltrain.config import from_dict
from cltrain.errors import DataError
from cltrain.experience.recording import read_trajectories
from cltrain.models.adapter import new_factors, write_adapter
from cltrain.models.base import Base, load_base
from cltrain.models.digest import ADAPTER_FILES
from cltrain.registry.aliases import move_alias, read_alias
from cltrain.registry.releases import ensure_base_release, release_dir, seal
from cltrain.store.database import open_store
from cltrain.store.schema import updates
from tests.command import BASE_DIGEST, Command, cltrain
from tests.deployments import base_server, corrected, tickets
from tests.gateway_parts import running, served
from tests.windows import options, standing, with_records

__all__ = ["cltrain"]  # a fixture


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with base_server() as url:
        yield url


@pytest.fixture(scope="module")
def base() -> Base:
    return load_base(None)


# ---------------------------------------------------------------- adapters


def written(base: Base, directory: Path, *, rank: int = 8, digest: str | None = None) -> Path:
    """A whole adapter with zero effect, for this base or for the one that `digest` names."""
    adapter = new_factors(base, rank, 2.0 * rank, ("q_proj", "v_proj"), 0)
    write_adapter(directory, replace(adapter, base_digest=digest or base.digest))
    return directory


def with_nan(directory: Path) -> None:
    file = directory / ADAPTER_FILES[1]
    raw = bytearray(file.read_bytes())
    raw[-4:] = np.float32("nan").tobytes()
    file.write_bytes(raw)


def with_rank(directory: Path, rank: int) -> None:
    file = directory / ADAPTER_FILES[0]
    file.write_text(json.dumps({**json.loads(file.read_text()), "r": rank}))


@pytest.mark.parametrize(
    ("fault", "words"),
    [("base", "was trained on base"), ("rank", "has shape"), ("nan", "NaN"), ("pickle", "pickle"), ("torn", "changed")],
)
def test_an_adapter_that_does_not_fit_is_refused_by_gate_and_promote_before_any_server_hears_of_it(
    cltrain: Command, tmp_path: Path, url: str, base: Base, fault: str, words: str
) -> None:
    made = written(base, tmp_path / "made", digest=BASE_DIGEST if fault == "base" else None)
    if fault == "nan":
        with_nan(made)
    if fault == "rank":
        with_rank(made, 4)
    home = tmp_path / "state"
    store = open_store(home)
    bare = ensure_base_release(store, "support", base.digest, now=1.0)
    release = seal(store, home, "support", made, bare.name, {}, now=2.0)
    sealed = release_dir(home, release)
    assert sealed is not None
    if fault == "pickle":
        sealed.chmod(0o755)
        (sealed / "adapter_model.bin").write_bytes(b"cos\nsystem\n")
    if fault == "torn":
        (sealed / ADAPTER_FILES[1]).chmod(0o644)
        with_nan(sealed)
    for command in ("gate", "promote"):
        done = cltrain(command, release.name, *options(home, url))
        assert (done.code, words in done.json["message"]) == (3, True), (command, done)
    assert read_alias(store, "support").release == bare.name
    assert release.name not in {card["id"] for card in httpx.get(f"{url}/v1/models").json()["data"]}


def test_a_directory_of_pickles_never_becomes_a_release(tmp_path: Path, base: Base) -> None:
    made = written(base, tmp_path / "made")
    (made / ADAPTER_FILES[1]).rename(made / "adapter_model.bin")
    store = open_store(tmp_path / "state")
    bare = ensure_base_release(store, "support", base.digest, now=1.0)
    with pytest.raises(DataError, match=r"adapter_model\.safetensors is missing"):
        seal(store, tmp_path / "state", "support", made, bare.name, {}, now=2.0)


def test_other_modules_than_the_incumbents_are_a_setting_to_put_back_and_cost_nothing(
    cltrain: Command, tmp_path: Path, url: str, base: Base
) -> None:
    home = tmp_path / "state"
    store = with_records(home, [corrected(ticket) for ticket in tickets("repair", 4)])
    bare = ensure_base_release(store, "support", base.digest, now=1.0)
    served_now = seal(store, home, "support", written(base, tmp_path / "made", rank=4), bare.name, {}, now=2.0).name
    move_alias(store, "support", expected=bare.name, to=served_now, fence=None, now=3.0, is_human=True)
    done = cltrain("update", *options(home, url))
    assert done.code == 2, done
    assert "but the incumbent has ('q_proj', 'v_proj')" in done.json["message"]
    assert read_alias(store, "support").release == served_now
    back = ('adapter.targets=["q_proj","v_proj"]',)  # another rank is no obstacle
    done = cltrain("update", *options(home, url, *back))
    assert done.code in (0, 10, 11), done
    with store.read() as connection:
        assert {row.state for row in connection.execute(select(updates.c.state))} <= {"done", "discarded"}


def test_another_base_under_the_same_agent_is_refused(cltrain: Command, tmp_path: Path, url: str) -> None:
    store = open_store(tmp_path)
    bare = ensure_base_release(store, "support", BASE_DIGEST, now=1.0)
    done = cltrain("update", *options(tmp_path, url))
    assert (done.code, "adapters do not carry over" in done.json["message"]) == (3, True), done
    assert read_alias(store, "support").release == bare.name


# ---------------------------------------------------------------- windows


def test_one_record_is_a_window_and_without_a_suite_the_hold_counts_what_is_missing(
    cltrain: Command, tmp_path: Path, url: str
) -> None:
    store = with_records(tmp_path, [corrected(ticket) for ticket in tickets("repair", 1)])
    done = cltrain("update", *options(tmp_path, url))
    assert done.code == 10, done
    assert (done.json["num_window"], done.json["num_kept"]) == (1, 1)
    assert any("no held-out item" in reason for reason in done.json["reasons"])
    assert done.json["num_missing"] > 0
    *words, _json = options(tmp_path, url)
    again = cltrain("gate", done.json["candidate"], *words)
    assert again.code == 10
    assert f"about {done.json['num_missing']} held-out items are missing" in again.out
    assert read_alias(store, "support").release == done.json["parent"]
    assert {status for status, _ in standing(store).values()} == {"waiting"}


def test_an_episode_longer_than_the_context_is_set_aside_whole_and_the_others_are_learned(
    cltrain: Command, tmp_path: Path, url: str, base: Base
) -> None:
    short = [corrected(ticket) for ticket in tickets("repair", 6)]
    first, *rest = short[0].messages
    long = replace(short[0], messages=({**first, "content": first["content"] + " really" * base.context}, *rest))
    store = with_records(tmp_path, [long, *short[1:]])
    done = cltrain("update", *options(tmp_path, url))
    assert done.code in (0, 10, 11), done
    assert (done.json["num_window"], done.json["num_kept"]) == (6, 5)
    assert done.json["window"]["set_aside"] == {"unusable": 1}
    status, reason = standing(store)[long.id]
    assert status == "unusable"
    assert f"record {long.id} has" in reason
    assert f"the base takes {base.context} (base.context)" in reason
    with store.read() as connection:
        (manifest,) = connection.scalars(select(updates.c.manifest))
    assert [aside["record"] for aside in manifest["set_aside"]] == [long.id]


def test_a_record_whose_tools_make_no_sense_is_set_aside_and_the_others_are_learned(
    cltrain: Command, tmp_path: Path, url: str
) -> None:
    good = [corrected(ticket) for ticket in tickets("repair", 6)]
    function = {"name": "repair", "parameters": {"type": [{"object": 1}]}}
    built_in = replace(good[0], tools=({"type": "web_search"},))
    broken = replace(good[1], tools=(*good[1].tools[:2], {"type": "function", "function": function}))
    store = with_records(tmp_path, [built_in, broken, *good[2:]])
    done = cltrain("update", *options(tmp_path, url))
    assert done.code in (0, 10, 11), done
    assert done.json["num_kept"] == 4
    found = standing(store)
    assert [found[one.id][0] for one in (built_in, broken)] == ["unusable", "unusable"]
    assert "its type is 'web_search'" in found[built_in.id][1]
    assert "TypeError" in found[broken.id][1]


# ---------------------------------------------------------------- servers that give too little


def test_a_server_that_takes_no_adapters_is_recorded_from_and_never_learned_on(
    cltrain: Command, tmp_path: Path, url: str
) -> None:
    store = with_records(tmp_path, [corrected(ticket) for ticket in tickets("repair", 2)])
    for words in (["update"], ["gate", "anything"]):
        done = cltrain(*words, *options(tmp_path, url, "server.kind=openai"))
        assert (done.code, "takes no adapters" in done.json["message"]) == (2, True), done
    config = from_dict({"home": str(tmp_path), "server": {"kind": "openai", "url": url}})
    assert launch.needed(config) == ("gateway",)
    assert standing(store) == {}


def test_without_token_truth_from_the_server_answers_are_recorded_all_the_same(tmp_path: Path) -> None:
    with running(tmp_path, kind="openai") as gateway:
        answer = gateway.chat("no ids")
        assert (answer.status_code, answer.headers["x-cltrain-recorded"]) == (200, "1")
        (kept,) = read_trajectories(gateway.store, "support")
    (generation,) = kept.generations
    assert generation.completion_ids is None
    assert generation.logprobs is None


@contextmanager
def without_prompt_logprobs(url: str) -> Iterator[str]:
    """The same server, whose completions leave the log-probs of the prompt out."""
    app = FastAPI()

    @app.api_route("/{path:path}", methods=["GET", "POST"])
    async def forward(path: str, request: Request) -> Response:
        async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=60) as client:
            answer = await client.request(request.method, f"/{path}", content=await request.body())
        if path != "v1/completions":
            return Response(answer.content, answer.status_code, media_type=answer.headers.get("content-type"))
        body: dict[str, Any] = answer.json()
        for choice in body.get("choices", ()):
            choice.pop("prompt_logprobs", None)
        return Response(json.dumps(body), answer.status_code, media_type="application/json")

    with served(app) as other:
        yield other


def test_without_log_probs_of_the_prompt_nothing_is_proved_and_nothing_moves(
    cltrain: Command, tmp_path: Path, url: str
) -> None:
    store = with_records(tmp_path, [corrected(ticket) for ticket in tickets("repair", 2)])
    with without_prompt_logprobs(url) as silent:
        done = cltrain("update", *options(tmp_path, silent))
    assert (done.code, done.json["verdict"]) == (12, "error"), done
    assert "gave no log-probs" in done.json["reasons"][0]
    assert read_alias(store, "support").release == done.json["parent"]
    assert {status for status, _ in standing(store).values()} == {"waiting"}
