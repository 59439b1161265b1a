"""Commands that learn or judge what was learned; and what may be learned from."""

from __future__ import annotations

import glob
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from cltrain.cli.parts import (
    VERDICT_EXIT,
    AsJson,
    Base,
    Chosen,
    Configs,
    Home,
    Overrides,
    about_one,
    app,
    based_on,
    print_out,
    said,
)
from cltrain.errors import DataError

SHOWN = 3  # unusable episodes, and lines set aside, that `import` names
WORDS = {
    "num_positive": "imported with a reward or score that says success",
    "num_without_reward": "imported without reward or score: feedback may follow",
    "num_without_tools": "imported without `tools`: their calls cannot be checked against a schema",
    "num_without_author": "imported without an author: nothing is learned from them (--producer NAME)",
    "num_fitting": "new, and the base's context holds them whole",
    "num_unusable": "new, and the base cannot take them",
}


@about_one
def update(
    chosen: Chosen,
    base: Base = None,
    trial: Annotated[bool, typer.Option("--trial", help="Train and judge, then throw the candidate away.")] = False,
    as_json: AsJson = False,
) -> None:
    """Try one update now: by the running worker if there is one, else here."""
    deployment = chosen.open(**based_on(base))
    outcome = deployment.update(trial=trial, on_progress=lambda line: typer.echo(line, err=True))
    print_out(outcome, as_json, said(outcome))
    raise typer.Exit(VERDICT_EXIT[outcome["verdict"]])


@about_one
def share(
    chosen: Chosen,
    stratum: Annotated[
        list[str] | None, typer.Option(help="What to share, as `refund/corrected`; default all.")
    ] = None,
    base: Base = None,
    as_json: AsJson = False,
) -> None:
    """Propose to all what enough tenants learned each for itself; judged by stricter rules than an update."""
    deployment = chosen.open(**based_on(base))
    outcome = deployment.share(stratum or (), on_progress=lambda line: typer.echo(line, err=True))
    print_out(outcome, as_json, said(outcome))
    raise typer.Exit(VERDICT_EXIT[outcome["verdict"]])


@app.command()
def verify(
    release: Annotated[Path, typer.Argument(help="Directory of a release, or how a name in --home begins.")],
    base: Base = None,
    anchors: Annotated[Path | None, typer.Option(help="Its pinned anchors (default those of its state).")] = None,
    parent: Annotated[Path | None, typer.Option(help="Its parent's directory (default beside it).")] = None,
    config: Configs = None,
    overrides: Overrides = None,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Recompute a release's bounds from its files alone; with --config or --set against these limits, on this base."""
    from cltrain import api
    from cltrain.certificate import table
    from cltrain.config import load

    limits = None
    if config or overrides:
        chosen = load(config or [], overrides or [])
        base, limits = base or chosen.base.path, chosen.bounds
    if not release.is_dir() and len(release.parts) == 1:
        release = _named(Chosen(config, overrides, home).open().config.state_dir / "releases", release.name)
    found = api.verify(release, base=base, anchors=anchors, parent=parent, limits=limits)
    print_out({**asdict(found), "holds": found.holds, "failed": found.failed}, as_json, table(found))
    raise typer.Exit(0 if found.holds else 3)


def _named(directory: Path, name: str) -> Path:
    """The one release, of all agents there, whose name begins so."""
    found = sorted(directory.glob(f"*/{glob.escape(name)}*"))
    if len(found) != 1:
        several = f"{len(found)} releases begin with" if found else "no directory of a release, and none begins with"
        raise DataError(f"{several} {name!r} in {directory}: give the directory, or --home and more of the name")
    return found[0]


@about_one
def calibrate(
    chosen: Chosen,
    base: Base = None,
    as_json: AsJson = False,
) -> None:
    """Propose budgets from naive updates on what is waiting, as TOML; nothing of the deployment changes."""
    from cltrain.calibration import toml_lines

    found = chosen.open(**based_on(base)).calibrate(on_progress=lambda line: typer.echo(line, err=True))
    is_held = bool(found["num_missing"])
    print_out(found, as_json, [f"hold: {reason}" for reason in found["reasons"]] if is_held else toml_lines(found))
    raise typer.Exit(VERDICT_EXIT["hold"] if is_held else 0)


@about_one
def gate(
    chosen: Chosen,
    release: Annotated[str, typer.Argument(help="What to judge against what serves now.")],
    as_json: AsJson = False,
) -> None:
    """Judge a release again; nothing is promoted."""
    decision = chosen.open().gate(release, on_progress=lambda line: typer.echo(line, err=True))
    print_out(decision, as_json, said(decision))
    raise typer.Exit(VERDICT_EXIT[decision["verdict"]])


@about_one
def import_(
    chosen: Chosen,
    file: Annotated[
        Path, typer.Argument(help="JSONL of OpenAI-style messages with rewards, or of {request, response}.")
    ],
    base: Annotated[Path | None, typer.Option(help="Base whose tokenizer and context the report counts with.")] = None,
    producer: Annotated[str | None, typer.Option(help="Who wrote the assistant turns.")] = None,
    as_json: AsJson = False,
) -> None:
    """Take past episodes in; every line is accounted for."""
    deployment = chosen.open(**based_on(base))
    report = deployment.import_file(file, producer=producer)
    counts = {key: value for key, value in report.items() if isinstance(value, int)}
    lines = [f"{key:<18} {value:>6}  {WORDS.get(key, '')}".rstrip() for key, value in counts.items()]
    if producer is None:
        lines.append("without --producer NAME the author is the line's `model`: nothing of an unknown one is learned")
    lines += [f"  {count:>5}  {reason}" for reason, count in report["reasons"].items()]
    lines += [f"line {aside['line']}: {aside['reason']}" for aside in report["set_aside"][:SHOWN]]
    lines += report["unusable"][:SHOWN]
    if report["num_unusable"] > SHOWN:
        lines.append(f"and {report['num_unusable'] - SHOWN} more (--json lists them)")
    print_out(report, as_json, lines)
    raise typer.Exit(0 if report["num_set_aside"] == 0 else 3)
