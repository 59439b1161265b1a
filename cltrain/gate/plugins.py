"""All suites of a deployment, from its configuration. What can be seen to be wrong is said before any training."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cltrain.config_gate import GateConfig, SuiteConfig
from cltrain.errors import ConfigError, DataError
from cltrain.gate import harnesses
from cltrain.gate.commands import CommandSuite, content_of
from cltrain.gate.stats import USUAL_FLIPS, items_for_margin
from cltrain.gate.suites import load_suite
from cltrain.records import SuiteItem

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Suites:
    """Every item of the owner's suites, and the programs that score some of them, by the suite's name."""

    items: tuple[SuiteItem, ...] = ()
    programs: Mapping[str, CommandSuite] = field(default_factory=dict)
    contents: Mapping[str, str] = field(default_factory=dict)  # of the files that each was read from, by its name


def load_suites(config: GateConfig, *, has_other_items: bool) -> Suites:
    """Read every suite; programs are asked what they hold.

    has_other_items: held-out episodes add to the pool, so that it may begin small. Raises DataError for a file that is
    not the pinned one, an empty suite, an id that is there twice, an item without its judge, too few items for the
    margin; ConfigError for a gate that asks too few; ServerError for a program that fails.
    """
    items: list[SuiteItem] = []
    programs: dict[str, CommandSuite] = {}
    contents = contents_of(config)
    for suite in config.all_suites():
        if suite.kind == "jsonl":
            assert suite.path is not None
            items += load_suite(suite.path.expanduser(), _defaults(suite, is_short=suite.path == config.suite))
        else:
            programs[suite.name] = _program(suite, contents[suite.name])
            items += programs[suite.name].items()
    _check_ids(items)
    if config.judge is None and (lost := next((item for item in items if item.scorer == "judge"), None)) is not None:
        raise DataError(
            f"item {lost.id} of suite {lost.suite} is scored by a judge, and there is none: set [gate.judge]"
        )
    if config.all_suites():
        _check_size(items, config, has_other_items)
    return Suites(tuple(items), programs, contents)


def _defaults(suite: SuiteConfig, *, is_short: bool) -> dict[str, str]:
    said = {"kind": suite.items, "stratum": suite.stratum, "rubric": suite.rubric}
    if not is_short:
        said["suite"] = suite.name
    return {name: value for name, value in said.items() if value is not None}


def contents_of(config: GateConfig) -> dict[str, str]:
    """Hashes of the files that each suite is read from, by its name: whoever runs for weeks asks again. Raises
    DataError for a file that is not there, or not the pinned one."""
    return {suite.name: _content(suite) for suite in config.all_suites()}


def _content(suite: SuiteConfig) -> str:
    files = [Path(word) for word in _words(suite) if Path(word).is_file()]
    if suite.path is None:
        return " ".join(content_of(file) for file in files)
    if not suite.path.expanduser().exists():
        raise DataError(f"suite {suite.name}: {suite.path} is not there")
    if suite.sha256 is not None and (found := content_of(suite.path)) != suite.sha256:
        raise DataError(
            f"suite {suite.name}: {suite.path} has sha256 {found}, and {suite.sha256} is pinned: put the old content "
            "back, or pin the new one (its scores start afresh)"
        )
    return " ".join(content_of(file) for file in [*files, suite.path])


def _words(suite: SuiteConfig) -> list[str]:
    """The command of a suite that is a program; none for a file."""
    if suite.kind in ("jsonl", "command"):
        return list(suite.command)
    path = None if suite.path is None else str(suite.path.expanduser())
    options = json.dumps({"task": suite.task, "path": path, "metric": suite.metric})
    return [str(suite.python or sys.executable), "-P", str(Path(harnesses.__file__)), suite.kind, options]


def _program(suite: SuiteConfig, content: str) -> CommandSuite:
    return CommandSuite(
        suite.name, _words(suite), stratum=suite.stratum or suite.name, kind=suite.items or "retention",
        timeout_s=suite.timeout_s, content=content,
    )  # fmt: skip


def _check_ids(items: Sequence[SuiteItem]) -> None:
    seen: dict[str, str] = {}
    for item in items:
        if item.id in seen:
            raise DataError(
                f"id {item.id} is in the suites {seen[item.id]} and {item.suite}: an item has one id everywhere"
            )
        seen[item.id] = item.suite


def _check_size(items: Sequence[SuiteItem], config: GateConfig, has_other_items: bool) -> None:
    """Fewer items than show a candidate that never differs to be within the margin are refused; fewer than show that of
    equals that flip as many answers as is usual are told."""
    needed = items_for_margin(config.margin, config.alpha)
    if config.items_per_gate < needed:
        raise ConfigError(
            f"gate.items_per_gate = {config.items_per_gate} can never rule out a loss of gate.margin = "
            f"{config.margin:g}: that takes at least {needed}, {needed - config.items_per_gate} more"
        )
    usual = items_for_margin(config.margin, config.alpha, USUAL_FLIPS)
    num_asked = sum(item.kind != "canary" for item in items)
    if 0 < num_asked < needed:
        said = (
            f"the suites hold {num_asked} items besides canaries, and gate.margin = {config.margin:g} takes at least "
            f"{needed}: {needed - num_asked} are missing. Add them, or widen the margin"
        )
        if not has_other_items:
            raise DataError(f"{said}, or hold out episodes too (experience.eval_share)")
        log.warning("%s; until held-out episodes make up for it, every candidate is held", said)
    elif min(num_asked or usual, config.items_per_gate) < usual:
        log.warning(
            "%d items (gate.items_per_gate = %d) are few for gate.margin = %g: it takes %d to show four of five equals "
            "that answer %g %% differently to be no worse; others are held",
            num_asked, config.items_per_gate, config.margin, usual, 100 * USUAL_FLIPS,
        )  # fmt: skip
