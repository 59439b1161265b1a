"""The command line and its Python twin: quick where they must be, exit codes and JSON for scripts, usable at once."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import psutil
import pytest
import typer.main

from cltrain import cli
from cltrain.api import Deployment
from cltrain.config import from_dict
from cltrain.experience.recording import Recorder, load_secret
from cltrain.experience.window import mark
from cltrain.monitoring.outbox import emit
from cltrain.records import Feedback, Trajectory
from cltrain.registry.releases import ensure_base_release
from cltrain.registry.reserve import RESERVE_BYTES
from cltrain.store.database import open_store
from cltrain.store.schema import sink_marks
from tests.command import BASE_DIGEST, Command, cltrain, free_port, promoted_home
from tests.deployments import base_server
from tests.gateway_parts import FakeServer, served

__all__ = ["cltrain"]  # a fixture

REPO = Path(__file__).parent.parent
NUM_TRIES, MAX_TRIES = 3, 9  # more tries where the machine is busy with something else
QUIET_LIBRARIES_S = 0.2  # what importing the libraries computes where nothing else runs: seen .18-.26 on two cores
EPISODE = {
    "id": "one",
    "model": "old-agent",
    "reward": 1.0,
    "messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}],
}


def process_seconds(command: list[str]) -> tuple[float, float]:
    """(on the wall, computed by the process itself), with what was compiled kept beside the tests' own homes."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPYCACHEPREFIX"] = f"{tempfile.gettempdir()}/cltrain-tests-bytecode-{os.getuid()}"
    start, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, capture_output=True, cwd=REPO, env=environment)
    wall_s, now = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall_s, now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime


def best_seconds(home: Path, limit_s: float, *words: str) -> float:
    """The quickest of several runs as a process, each on a copy of the home; one within the limit is enough.

    Seconds on the wall. Where others keep every core busy, those that the process itself computed, over how much
    more than when quiet the libraries alone compute beside it.
    """
    best = float("inf")
    for number in range(MAX_TRIES):
        with tempfile.TemporaryDirectory() as copy:
            state = shutil.copytree(home, Path(copy) / "state")
            options = [] if "--help" in words else ["--home", str(state)]
            seconds, own_s = process_seconds([sys.executable, "-m", "cltrain", *words, *options])
        if os.getloadavg()[0] > (os.cpu_count() or 1):
            _, libraries_s = process_seconds([sys.executable, "-c", "import typer, pydantic, sqlalchemy"])
            seconds = own_s / max(libraries_s / QUIET_LIBRARIES_S, 1.0)
        best = min(best, seconds)
        if number + 1 >= NUM_TRIES and best <= limit_s:
            break
    return best


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("promoted") / "state"
    promoted_home(home)
    return home


@pytest.fixture(scope="module")
def url():
    with base_server() as url:
        yield url


def test_help_answers_in_half_a_second(home: Path) -> None:
    assert best_seconds(home, 0.5, "--help") <= 0.5


@pytest.mark.parametrize("command", ["status", "freeze", "unfreeze", "rollback"])
def test_what_an_owner_needs_in_an_emergency_takes_a_second_with_everything_down(home: Path, command: str) -> None:
    assert best_seconds(home, 1.0, command) <= 1.0


def test_help_and_the_emergency_commands_never_import_torch(tmp_path: Path) -> None:
    promoted_home(tmp_path)
    commands = [["--help"], *([c, f"--home={tmp_path}"] for c in ("status", "freeze", "unfreeze", "rollback"))]
    code = (
        "import sys\nfrom cltrain.cli import app\n"
        f"for words in {commands!r}:\n"
        "    try: app(words)\n"
        "    except SystemExit as end: assert not end.code, (words, end.code)\n"
        "    heavy = {'torch', 'transformers', 'peft', 'scipy', 'matplotlib', 'fastapi'} & set(sys.modules)\n"
        "    assert not heavy, (words, heavy)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "answers with support-v000000" in done.stdout


def test_exit_codes_and_errors_tell_scripts_what_to_do(cltrain: Command, tmp_path: Path, url: str) -> None:
    home = f"--home={tmp_path}"
    (tmp_path / "broken.jsonl").write_text("{\n")
    (tmp_path / "torn.toml").write_text("agent = [")
    with socket.create_server(("127.0.0.1", 0)) as free:
        nobody = f"--set=server.url=http://127.0.0.1:{free.getsockname()[1]}"
    for words, code, said in (
        (["status", home, "--set=trainer.learning_rat=1"], 2, "unknown setting trainer.learning_rat"),
        (["status", home, "--set=trainer.num_step=1"], 2, "Did you mean trainer.num_steps?"),
        (["status", home, "--set=trianer.lr=1"], 2, "Did you mean trainer?"),
        (["status", home, "--set=trainer.lr=-1"], 2, "trainer.lr"),
        (["status", home, "--set=trainer"], 2, "section.key=value"),
        (["status", home, "--agent=No Name"], 2, "agent.name"),
        (["config", "check", str(tmp_path / "nowhere.toml")], 2, "does not exist"),
        (["config", "check", str(tmp_path)], 2, "cannot be read"),
        (["config", "check", str(tmp_path / "torn.toml")], 2, "not valid TOML"),
        (["run", home, "--only=door"], 2, "server, gateway, worker"),
        (["run", home, "--mode=always"], 2, "agent.mode"),
        (["rollback", home], 3, "no alias yet"),
        (["report", "7", home], 3, "no update 7"),
        (["gate", "nobody", home, f"--set=server.url={url}"], 3, "no release nobody"),
        (["promote", "nobody", home], 3, "no release nobody"),
        (["import", str(tmp_path / "nowhere.jsonl"), home], 3, "nowhere.jsonl"),
        (["update", home, f"--base={tmp_path / 'nowhere'}", f"--set=server.url={url}"], 3, "not a model directory"),
        (["update", home, nobody], 5, "does not answer"),
        (["status", f"--home={tmp_path / 'torn.toml'}"], 3, "torn.toml"),
    ):
        done = cltrain(*words, "--json") if words[0] not in ("run",) else cltrain(*words)
        assert done.code == code, (words, done)
        assert said in done.err, (words, done)
        assert "Traceback" not in done.err
        if words[0] != "run":
            assert said in done.json["message"]
    assert cltrain("import", str(tmp_path / "broken.jsonl"), home, "--json").code == 3
    assert cltrain("no-such-command").code == 2


def test_moving_against_what_stands_is_a_conflict(cltrain: Command, tmp_path: Path) -> None:
    _, release = promoted_home(tmp_path)
    home = f"--home={tmp_path}"
    assert cltrain("rollback", home, f"--to={release}").code == 4
    assert cltrain("rollback", home).code == 0
    done = cltrain("rollback", home)
    assert (done.code, "nothing to roll back" in done.err) == (4, True)


def test_an_update_without_records_holds_with_code_10_and_says_how_many_are_missing(
    cltrain: Command, tmp_path: Path, url: str
) -> None:
    done = cltrain("update", f"--home={tmp_path}", f"--set=server.url={url}", "--set=trainer.num_anchors=2", "--json")
    assert done.code == 10, done
    default = from_dict({}).experience.min_window
    assert (done.json["verdict"], done.json["num_missing"]) == ("hold", default)
    assert f"0 learnable records are waiting, {default} are missing" in done.json["reasons"][0]


def test_an_update_of_a_frozen_agent_is_a_conflict(cltrain: Command, tmp_path: Path, url: str) -> None:
    open_store(tmp_path).close()
    assert cltrain("freeze", f"--home={tmp_path}", "--reason=audit").code == 0
    done = cltrain("update", f"--home={tmp_path}", f"--set=server.url={url}", "--set=trainer.num_anchors=2")
    assert (done.code, "audit" in done.err) == (4, True)


def test_json_is_one_object_for_every_command_that_reports(cltrain: Command, tmp_path: Path) -> None:
    promoted_home(tmp_path)
    (tmp_path / "one.jsonl").write_text(json.dumps(EPISODE) + "\n")
    home = f"--home={tmp_path}"
    for words, key in (
        (["status", home], "release"),
        (["freeze", home], "frozen"),
        (["unfreeze", home], "frozen"),
        (["unquarantine", "--dry-run", home], "records"),
        (["import", str(tmp_path / "one.jsonl"), home], "num_imported"),
        (["report", home], "path"),
        (["config", "check"], "digest"),
        (["doctor", home], "findings"),
        (["rollback", home], "release"),
    ):
        done = cltrain(*words, "--json")
        assert key in done.json, words
    reporting = {name for name, command in commands().items() if any(p.name == "as_json" for p in command.params)}
    assert reporting == {
        "update", "gate", "promote", "rollback", "unquarantine", "freeze", "unfreeze", "status", "import", "report",
        "config check", "doctor", "verify", "calibrate", "approve", "audit", "log", "share",
        "keys add", "keys list", "keys revoke",
    }  # fmt: skip


def commands() -> dict[str, typer.core.TyperCommand]:
    """Every command by its words."""
    found = {}
    for name, command in typer.main.get_command(cli.app).commands.items():
        inner = getattr(command, "commands", None)
        found |= {f"{name} {k}": v for k, v in inner.items()} if inner else {name: command}
    return found


def test_every_command_about_a_deployment_takes_the_same_options_for_it() -> None:
    shared = {}
    for name, command in commands().items():
        options = {
            p.name: (p.opts, p.help) for p in command.params if p.name in ("config", "overrides", "home", "agent")
        }
        shared[name] = options
    assert {name for name, options in shared.items() if len(options) < 4} == {"demo", "config check", "verify"}
    whole = [options for options in shared.values() if len(options) == 4]
    assert all(options == whole[0] for options in whole)


def test_every_command_is_in_the_readme_and_every_command_there_exists() -> None:
    text = (REPO / "README.md").read_text()
    assert [name for name in commands() if f"`cltrain {name}" not in text] == []
    assert set(re.findall(r"`cltrain ([a-z]+)", text)) <= {name.split()[0] for name in commands()}


def test_an_empty_deployment_has_a_status_a_page_and_a_doctor(tmp_path: Path) -> None:
    deployment = Deployment(from_dict({"home": str(tmp_path / "new")}))
    open_store(tmp_path / "new").close()
    status = deployment.status()
    assert (status["release"], status["records"], status["updates"]) == (None, 0, [])
    assert status["processes"]["worker"] == "down"
    assert "support" in deployment.report().read_text()
    assert {f["state"] for f in deployment.doctor() if f["what"] in ("state", "base", "decisions")} == {"good"}
    assert deployment.freeze("before anything ran")["frozen"]
    assert deployment.status()["frozen_reason"] == "before anything ran"


def test_an_import_shows_in_the_status(cltrain: Command, tmp_path: Path) -> None:
    lines = [json.dumps({**EPISODE, "id": f"e{i}"}) for i in range(3)]
    (tmp_path / "three.jsonl").write_text("\n".join([*lines, "{"]) + "\n")
    home = f"--home={tmp_path / 'state'}"
    done = cltrain("import", str(tmp_path / "three.jsonl"), home, "--agent=desk", "--json")
    assert (done.code, done.json["num_imported"], done.json["num_set_aside"]) == (3, 3, 1)
    assert (done.json["num_fitting"], done.json["num_unusable"]) == (3, 0)
    status = cltrain("status", home, "--agent=desk", "--json").json
    assert (status["agent"], status["records"], status["feedback"], status["set_aside"]) == ("desk", 3, 3, 1)
    done = cltrain("import", str(tmp_path / "three.jsonl"), home, "--agent=desk", "--json")
    assert (done.json["num_duplicates"], done.json["num_fitting"]) == (3, 0), "the base takes what this import brought"


def test_an_import_names_the_lines_it_set_aside_and_says_what_is_never_learned(
    cltrain: Command, tmp_path: Path
) -> None:
    nobodys = {key: value for key, value in EPISODE.items() if key != "model"}
    lines = [json.dumps(nobodys), *["{"] * 30, json.dumps({**EPISODE, "id": "kept", "reward": -0.5})]
    file = tmp_path / "log.jsonl"
    file.write_text("\n".join(lines))
    home = f"--home={tmp_path / 'state'}"
    done = cltrain("import", str(file), home)
    assert (done.code, "line 2: not valid JSON: " in done.out, "--producer NAME" in done.out) == (3, True, True)
    assert re.search(r"^num_without_author +1  imported without an author", done.out, re.M)
    assert re.search(r"^num_fitting +1  new, and the base's context holds", done.out, re.M)
    assert "    1  `reward` is not a number in [0, 1]" in done.out
    again = cltrain("import", str(file), home, "--producer=agent", "--json").json
    assert [aside["line"] for aside in again["set_aside"]] == list(range(2, 22))
    assert (again["num_imported"], again["num_without_author"], again["num_set_aside"]) == (1, 0, 31)
    assert "--producer NAME the author" not in cltrain("import", str(file), home, "--producer=agent").out


def test_an_import_names_the_first_that_are_too_long_and_counts_the_others(cltrain: Command, tmp_path: Path) -> None:
    long = {**EPISODE, "messages": [{"role": "user", "content": "hello " * 2000}, EPISODE["messages"][1]]}
    file = tmp_path / "long.jsonl"
    file.write_text("".join(json.dumps({**long, "id": f"e{i}"}) + "\n" for i in range(5)))
    done = cltrain("import", str(file), f"--home={tmp_path / 'state'}")
    assert done.code == 0
    assert [line.split()[1] for line in done.out.splitlines() if line.startswith("record ")] == ["e0", "e1", "e2"]
    assert "and 2 more" in done.out


def test_the_status_counts_what_waits_what_came_late_and_what_is_of_this_agent(tmp_path: Path) -> None:
    one, two = (Deployment(from_dict({"home": str(tmp_path), "agent": {"name": name}})) for name in ("one", "two"))
    messages, now = tuple(EPISODE["messages"]), time.time()
    with Recorder(one.store, load_secret(tmp_path), 0.0) as recorder:
        for name, at in (("young", now), ("old", now - 1e6), ("learned", now - 1e6)):
            recorder.add_trajectory(Trajectory(name, "one", name, "a", messages, ("user", "agent"), created_at=at))
        with one.store.write() as connection:
            mark(connection, "one", "learned", "replay", now=now - 60)
        recorder.add_feedback(Feedback("late", "learned", score=-1.0), now=now).result()
        recorder.set_aside("two", "file", 1, "torn", b"{", now=now).result()
    with one.store.write() as connection:
        emit(connection, "one", "update", {"number": 1}, now)
        connection.execute(sink_marks.insert().values(sink="wandb:one", seq=0))
    seen, other = one.status(), two.status()
    assert (seen["immature"], seen["late_feedback"], seen["set_aside"], seen["sinks"]) == (1, 1, 0, {"wandb:one": 1})
    assert (other["immature"], other["late_feedback"], other["set_aside"]) == (0, 0, 1)


def test_two_agents_in_one_home_leave_each_other_alone(tmp_path: Path) -> None:
    one, two = (Deployment(from_dict({"home": str(tmp_path), "agent": {"name": name}})) for name in ("one", "two"))
    messages = tuple(EPISODE["messages"])
    with Recorder(one.store, load_secret(tmp_path), 0.0) as recorder:
        recorder.add_trajectory(Trajectory("a", "one", "a", "ann", messages, ("user", "agent")))
    ensure_base_release(two.store, "two", BASE_DIGEST, now=1.0)
    one.freeze("one only")
    seen, other = one.status(), two.status()
    assert (seen["records"], seen["frozen"], seen["release"]) == (1, True, None)
    assert (other["records"], other["frozen"]) == (0, False)
    assert other["release"].startswith("two-v000000-")
    one.unfreeze()
    two.freeze("two only")
    assert (one.status()["frozen"], two.status()["frozen"]) == (False, True)
    assert one.report() != two.report()
    assert one.status()["chain"] == two.status()["chain"] == "unbroken"


def test_each_agent_of_a_home_rolls_back_alone(cltrain: Command, tmp_path: Path) -> None:
    bases = {}
    for agent in ("one", "two"):
        bases[agent], _ = promoted_home(tmp_path, agent)
        shutil.rmtree(tmp_path / "made")
    assert cltrain("rollback", f"--home={tmp_path}", "--agent=one", "--json").json["release"] == bases["one"]
    status = cltrain("status", f"--home={tmp_path}", "--agent=two", "--json").json
    assert (status["release"].split("-v")[1][:6], status["frozen"]) == ("000001", False)


def start_and_wait_for(words: list[str], log: Path) -> subprocess.Popen[str]:
    """`cltrain` as a process, once its first child writes a log."""
    command = [sys.executable, "-m", "cltrain", *words]
    process = subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not log.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"{log} never came"
        time.sleep(0.01)
    return process


def test_a_home_that_is_a_file_is_said_before_anything_starts(cltrain: Command, tmp_path: Path) -> None:
    (file := tmp_path / "file").write_text("")
    for words in (["serve"], ["run"], ["update"], ["gate", "x"], ["promote", "x"], ["import", str(file)], ["freeze"]):
        done = cltrain(*words, f"--home={file}")
        said = "there is no deployment in" if words[0] in ("gate", "promote", "freeze") else "for state"
        assert (done.code, said in done.err) == (3, True), (words, done)


def test_any_openai_server_is_recorded_from_with_two_words_and_a_sigterm_ends_all(tmp_path: Path) -> None:
    with served(FakeServer(()).app) as upstream:
        port = free_port()
        words = ["run", f"--home={tmp_path}", f"--upstream={upstream}", f"--set=gateway.port={port}"]
        process = start_and_wait_for([*words, "--set=server.model=base"], tmp_path / "logs" / "gateway.log")
        try:
            assert process.stdout is not None
            assert "is served at" in process.stdout.readline()
            body = {"model": "support", "messages": [{"role": "user", "content": "hi"}]}
            answer = httpx.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=body, trust_env=False)
            assert (answer.status_code, answer.headers["x-cltrain-recorded"]) == (200, "1")
            assert not (tmp_path / "logs" / "worker.log").exists()
            assert (tmp_path / "reserve").stat().st_size == RESERVE_BYTES
        finally:
            process.terminate()
            process.communicate(timeout=30)
    assert process.returncode == 0
    assert Deployment(from_dict({"home": str(tmp_path)})).status()["records"] == 1


def test_a_sigterm_while_it_starts_leaves_no_process_behind(tmp_path: Path) -> None:
    words = ["run", f"--home={tmp_path}", f"--set=server.port={free_port()}", f"--set=gateway.port={free_port()}"]
    process = start_and_wait_for(words, tmp_path / "logs" / "server.log")
    children = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    process.communicate(timeout=60)
    _, left = psutil.wait_procs(children, timeout=5)
    for child in left:
        child.kill()
    assert left == []
    assert process.returncode == 128 + signal.SIGTERM
