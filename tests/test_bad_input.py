"""What goes wrong outside: taken ports, full disks, adapters that do not fit, windows with too little or too much in
them, servers that give too little. Each gets a clear word, and nothing is lost."""

from __future__ import annotations

import json
import resource
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
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
from cltrain.experience.recording import Recorder, load_secret, read_trajectories
from cltrain.models.adapter import new_factors, write_adapter
from cltrain.models.base import Base, load_base
from cltrain.models.digest import ADAPTER_FILES
from cltrain.records import Trajectory
from cltrain.registry.aliases import move_alias, read_alias
from cltrain.registry.releases import ensure_base_release, release_dir, seal
from cltrain.store.database import Store, open_store
from cltrain.store.schema import screenings, updates
from cltrain.worker import Worker
from tests.command import BASE_DIGEST, Command, cltrain, free_port
from tests.deployments import base_server, corrected, tickets
from tests.gateway_parts import running, served

__all__ = ["cltrain"]  # a fixture

QUICK = (
    "agent.mode=auto", "trainer.num_steps=2", "trainer.num_anchors=2", "trainer.anchor_tokens=16",
    "experience.eval_share=0.0", "experience.min_window=1", "experience.principal_quota=1.0",
    "gate.max_answer_tokens=8",
)  # fmt: skip


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with base_server() as url:
        yield url


@pytest.fixture(scope="module")
def base() -> Base:
    return load_base(None)


def options(home: Path, url: str, *settings: str) -> list[str]:
    """Words of a command on this home and this server: updates of two steps, any window."""
    return [f"--home={home}", *(f"--set={setting}" for setting in (f"server.url={url}", *QUICK, *settings)), "--json"]


def with_records(home: Path, trajectories: list[Trajectory]) -> Store:
    store = open_store(home)
    with Recorder(store, load_secret(home), 0.0) as recorder:
        for trajectory in trajectories:
            assert recorder.add_trajectory(trajectory)
    return store


def standing(store: Store) -> dict[str, tuple[str, str]]:
    """Record -> (status, reason)."""
    with store.read() as connection:
        return {row.record: (row.status, row.reason) for row in connection.execute(select(screenings))}


# ---------------------------------------------------------------- ports


@pytest.mark.parametrize("name", ["server", "gateway"])
@pytest.mark.parametrize("command", ["run", "serve"])
def test_a_busy_port_ends_with_code_2_and_names_the_setting(
    cltrain: Command, tmp_path: Path, name: str, command: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ports = {"server": free_port(), "gateway": free_port(), name: port}
        settings = [f"--set={each}.port={number}" for each, number in ports.items()]
        done = cltrain(command, f"--home={tmp_path}", *settings)
    assert done.code == 2
    assert f"{name}.port = {port} cannot be used on 127.0.0.1" in done.err
    assert f"--set {name}.port=PORT" in done.err


@pytest.mark.parametrize("name", ["server", "gateway"])
def test_a_busy_port_of_one_process_alone_names_the_setting_too(cltrain: Command, tmp_path: Path, name: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = cltrain("run", f"--only={name}", f"--home={tmp_path}", f"--set={name}.port={port}")
    assert (done.code, f"{name}.port = {port}" in done.err) == (2, True), done


def test_a_port_that_nobody_could_find_is_refused(cltrain: Command, tmp_path: Path) -> None:
    done = cltrain("serve", f"--home={tmp_path}", "--set=gateway.port=0", "--set=server.url=http://127.0.0.1:9")
    assert (done.code, "gateway.port = 0" in done.err) == (2, True), done


def test_what_a_process_ends_with_at_its_start_is_what_the_command_ends_with(cltrain: Command, tmp_path: Path) -> None:
    """The embedded server cannot load this base: data, not a server that is away."""
    words = ("update", f"--home={tmp_path}", f"--base={tmp_path}", f"--set=server.port={free_port()}", "--json")
    done = cltrain(*words)
    assert (done.code, done.json["error"]) == (3, "DataError"), done
    assert "not a model directory" in done.json["message"]


# ---------------------------------------------------------------- a full disk


@dataclass
class Disk:
    """A place that can be filled and freed again."""

    path: Path
    fill: Callable[[], None]
    free: Callable[[], None]


@contextmanager
def small_tmpfs(path: Path, size: str) -> Iterator[Disk]:
    """A real file system of that size; skips where none may be mounted."""
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("no file system may be mounted here")

    def fill() -> None:
        with (path / "filler").open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(4096))
        assert shutil.disk_usage(path).free == 0

    try:
        yield Disk(path, fill, lambda: (path / "filler").unlink())
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


@contextmanager
def limited_files(path: Path) -> Iterator[Disk]:
    """Files that may not grow beyond what the store's log has now: what anybody can have for a full disk."""
    path.mkdir()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, ((path / "store.db-wal").stat().st_size, hard))

    def free() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    try:
        yield Disk(path, fill, free)
    finally:
        free()


@pytest.mark.parametrize("kind", ["tmpfs", "limit"])
def test_on_a_full_disk_answers_go_out_unrecorded_and_the_store_stays_whole(tmp_path: Path, kind: str) -> None:
    with ExitStack() as stack:
        where = tmp_path / "state"
        disk = stack.enter_context(small_tmpfs(where, "4m") if kind == "tmpfs" else limited_files(where))
        gateway = stack.enter_context(running(disk.path, gateway={"record_timeout_s": 2.0}))
        before = [gateway.chat(f"before {i}") for i in range(3)]
        disk.fill()
        during = [gateway.chat(f"during {i} " + "x" * 20_000) for i in range(3)]
        during += [gateway.chat("streamed " + "x" * 20_000, stream=True)]
        refused = gateway.http.post(
            "/v1/feedback", json={"target": before[0].headers["x-cltrain-record"], "text": "x" * 20_000}
        )
        disk.free()
        threading.Event().wait(2.1)  # the gateway looks again after two seconds
        after = [gateway.chat(f"after {i}") for i in range(3)]
        assert {a.status_code for a in [*before, *during, *after]} == {200}
        assert [a.headers["x-cltrain-recorded"] for a in [*before, *during[:3], *after]] == [*"111", *"000", *"111"]
        assert "heard during 0" in during[0].json()["choices"][0]["message"]["content"]
        assert '"recorded":0' in during[3].text
        assert refused.status_code >= 500
        acknowledged = {a.headers["x-cltrain-trajectory"] for a in [*before, *after]}
        assert {t.id for t in read_trajectories(gateway.store, "support")} == acknowledged
        with sqlite3.connect(disk.path / "store.db") as database:
            assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_an_update_on_a_full_disk_says_so_and_works_once_there_is_space(
    cltrain: Command, tmp_path: Path, url: str
) -> None:
    with small_tmpfs(tmp_path / "state", "16m") as disk:
        store = with_records(disk.path, [corrected(ticket) for ticket in tickets("repair", 4)])
        assert cltrain("status", f"--home={disk.path}").code == 0
        disk.fill()
        done = cltrain("update", *options(disk.path, url))
        assert done.code == 3, done
        assert "free some" in done.json["message"]
        assert cltrain("status", f"--home={disk.path}").code == 0
        disk.free()
        done = cltrain("update", *options(disk.path, url))
        assert done.code in (0, 10, 11), done
        assert done.json["num_kept"] == 4
        store.close()


def test_a_disk_that_fills_during_training_loses_no_record_and_moves_nothing(tmp_path: Path, url: str) -> None:
    with small_tmpfs(tmp_path / "state", "16m") as disk:
        store = with_records(disk.path, [corrected(ticket) for ticket in tickets("repair", 4)])
        config = from_dict(
            {
                "home": str(disk.path),
                "agent": {"mode": "auto"},
                "server": {"url": url},
                "experience": {"min_window": 1, "principal_quota": 1.0},
                "trainer": {"num_steps": 3, "checkpoint_every": 1, "num_anchors": 2, "anchor_tokens": 16},
            }
        )
        filled: list[str] = []

        def fill_once(line: str) -> None:
            if "trained" in line and not filled:
                filled.append(line)
                disk.fill()

        with Worker(config, store, on_progress=fill_once) as worker:
            with pytest.raises(DataError, match="free some"):
                worker.update()
            disk.free()
        assert filled
        assert read_alias(store, "support").release.startswith("support-v000000-")
        with Worker(config, store, on_progress=lambda _: None) as worker:
            worker.finish_interrupted()
        with store.read() as connection:
            rows = connection.execute(select(updates.c.state, updates.c.verdict)).all()
        assert {row.state for row in rows} <= {"done", "discarded"}
        assert {status for status, _ in standing(store).values()} <= {"waiting", "replay"}
        store.close()


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


def test_a_rank_other_than_the_incumbents_is_a_setting_to_put_back_and_costs_nothing(
    cltrain: Command, tmp_path: Path, url: str, base: Base
) -> None:
    home = tmp_path / "state"
    store = with_records(home, [corrected(ticket) for ticket in tickets("repair", 4)])
    bare = ensure_base_release(store, "support", base.digest, now=1.0)
    served_now = seal(store, home, "support", written(base, tmp_path / "made", rank=4), bare.name, {}, now=2.0).name
    move_alias(store, "support", expected=bare.name, to=served_now, fence=None, now=3.0, is_human=True)
    done = cltrain("update", *options(home, url))
    assert done.code == 2, done
    assert "adapter.rank = 8, but the incumbent has 4" in done.json["message"]
    assert read_alias(store, "support").release == served_now
    back = ("adapter.rank=4", "adapter.alpha=8.0", 'adapter.targets=["q_proj","v_proj"]')
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
    assert status in ("quarantined", "unusable")
    assert f"record {long.id} has" in reason
    assert f"the base takes {base.context} (base.context)" in reason
    with store.read() as connection:
        (manifest,) = connection.scalars(select(updates.c.manifest))
    assert [record for record, _ in manifest["set_aside"]] == [long.id]


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


# ---------------------------------------------------------------- processes that keep ending


class Ending(launch.Fleet):
    """Processes that end at once, as one does whose settings are wrong."""

    def start(self, name: str) -> None:
        self.log_file(name).parent.mkdir(parents=True, exist_ok=True)
        self.log_file(name).write_text("it ended\n")
        self.processes[name] = subprocess.Popen([sys.executable, "-S", "-c", ""])

    def wait_until_up(self, name: str, timeout_s: float = 120.0) -> None:
        self.processes[name].wait()


def test_a_worker_that_keeps_ending_is_given_up_and_serving_goes_on(tmp_path: Path) -> None:
    said: list[str] = []
    fleet = Ending(from_dict({"home": str(tmp_path)}), (), ("worker",), on_event=said.append)
    fleet.start("worker")
    for _ in range(launch.MAX_RESTARTS + 1):
        fleet.processes["worker"].wait()
        fleet.revive()
    assert fleet.revive() == []
    assert fleet.processes == {}
    assert "serving goes on" in said[-1]
