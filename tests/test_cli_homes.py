"""A home, an agent or a release that is not there is said and never made up; what there is can be looked up."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cltrain import __version__, launch
from cltrain.api import Deployment
from cltrain.config import from_dict
from cltrain.experience.window import mark
from cltrain.store.database import open_store
from tests.command import Command, cltrain, free_port, promoted_home

__all__ = ["cltrain"]  # a fixture


@pytest.mark.parametrize(
    "words", ["status", "rollback", "freeze", "unfreeze", "report", "promote x", "gate x", "calibrate"]
)
def test_a_home_without_a_deployment_is_said_and_nothing_is_created(
    cltrain: Command, tmp_path: Path, words: str
) -> None:
    done = cltrain(*words.split(), f"--home={tmp_path / 'nowhere'}")
    assert (done.code, f"there is no deployment in {tmp_path / 'nowhere'} (home)" in done.err) == (3, True), done
    assert list(tmp_path.iterdir()) == []


def test_a_doctor_looks_at_a_home_that_is_still_to_be_made_and_leaves_it_so(cltrain: Command, tmp_path: Path) -> None:
    ports = [f"--set={name}.port={free_port()}" for name in ("server", "gateway")]
    done = cltrain("doctor", f"--home={tmp_path / 'new'}", *ports, "--json")
    findings = {finding["what"]: finding for finding in done.json["findings"]}
    assert {findings[what]["state"] for what in ("state", "base", "decisions")} == {"good"}, done
    assert "no deployment" in findings["decisions"]["detail"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["status", "freeze", "rollback", "report"])
def test_an_agent_that_nobody_knows_is_said_with_those_that_are_known(
    cltrain: Command, tmp_path: Path, command: str
) -> None:
    promoted_home(tmp_path)
    done = cltrain(command, f"--home={tmp_path}", "--agent=suport")
    assert (done.code, "has no agent 'suport': --agent takes support" in done.err) == (3, True), done


def test_the_status_lists_the_newest_releases_and_a_name_may_be_cut_short(cltrain: Command, tmp_path: Path) -> None:
    base, release = promoted_home(tmp_path)
    home = f"--home={tmp_path}"
    listed = cltrain("status", home, "--json").json["releases"]
    assert [(one["name"], one["status"]) for one in listed] == [(release, "released"), (base, "released")]
    assert release in cltrain("status", home).out
    done = cltrain("rollback", home, "--to=support-v0000")
    assert (done.code, f"may be {base}, {release}" in done.err) == (3, True), done
    done = cltrain("rollback", home, "--to=support-v000009")
    assert (done.code, "no release support-v000009" in done.err) == (3, True), done
    assert cltrain("rollback", home, "--to=support-v000000", "--json").json["release"] == base


def test_what_was_rolled_back_is_promoted_only_by_saying_so_and_never_while_frozen(
    cltrain: Command, tmp_path: Path
) -> None:
    base, release = promoted_home(tmp_path)
    home = f"--home={tmp_path}"
    assert cltrain("rollback", home, "--reason=it got curt").code == 0
    for words in ((), ("--again",)):
        done = cltrain("promote", release, home, *words)
        assert (done.code, "it got curt): unfreeze it" in done.err) == (4, True), done
    assert cltrain("unfreeze", home).code == 0
    done = cltrain("promote", release, home)
    assert (done.code, "was rolled back: `cltrain promote --again`" in done.err) == (4, True), done
    done = cltrain("promote", release, home, "--again")
    assert done.code == 3, "its files, which are no adapter, are looked at"
    assert Deployment(from_dict({"home": str(tmp_path)})).status()["release"] == base


def test_the_status_says_what_is_unusable_and_why(cltrain: Command, tmp_path: Path) -> None:
    promoted_home(tmp_path)
    store = open_store(tmp_path)
    reasons = {
        "a1": "unusable: record a1 has 700 tokens; the base takes 512 (rules 12345678)",
        "a2": "unusable: no feedback",
        "a3": "unusable: record a3 has 900 tokens; the base takes 512 (rules 12345678)",
    }
    with store.write() as connection:
        for record, reason in reasons.items():
            mark(connection, "support", record, "unusable", now=1.0, reason=reason)
        mark(connection, "support", "b", "waiting", now=1.0)
    out = cltrain("status", f"--home={tmp_path}").out
    assert "looked at: 3 unusable, 1 waiting" in out
    assert "unusable   most often: unusable: record a1 has 700 tokens; the base takes 512\n" in out
    assert "rules" not in out


def test_the_version_is_said_without_a_command(cltrain: Command) -> None:
    done = cltrain("--version")
    assert (done.code, done.out) == (0, f"cltrain {__version__}\n")


def test_an_upstream_that_does_not_listen_is_warned_of(tmp_path: Path) -> None:
    nobody = f"http://127.0.0.1:{free_port()}"
    assert not launch.is_listening(nobody, 0.3)
    words = ["run", f"--home={tmp_path}", f"--upstream={nobody}", f"--set=gateway.port={free_port()}"]
    command = [sys.executable, "-m", "cltrain", *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert "is served at" in process.stdout.readline()
    finally:
        process.terminate()
        _, said = process.communicate(timeout=30)
    assert f"nothing listens at {nobody}" in said
