"""The command line: thin words over `cltrain.api`. Heavy packages are imported inside the command that needs them.

Exit codes: 0 done, 1 failed, 2 configuration, 3 data, 4 conflict, 5 server; the gate's verdicts: 10 hold, 11 reject,
12 error.
"""

from __future__ import annotations

import errno
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from cltrain.errors import CltrainError, DataError

if TYPE_CHECKING:
    from cltrain.api import Deployment

app = typer.Typer(
    help="A deployed LLM agent keeps learning from its own work, within limits that its owner sets and can see.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
)
config_app = typer.Typer(help="Look at the configuration.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(config_app, name="config")

ConfigFiles = Annotated[
    list[Path] | None, typer.Option("--config", "-c", help="TOML file; several merge left to right.")
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", "-s", metavar="KEY=VALUE", help="One setting, e.g. trainer.lr=1e-5.")
]
Home = Annotated[Path | None, typer.Option("--home", help="State directory (default $CLTRAIN_HOME or checkpoints/).")]
Agent = Annotated[str | None, typer.Option("--agent", help="The agent's name (default agent.name).")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]

SHOWN = 3  # unusable episodes that `import` names
VERDICT_EXIT = {"promote": 0, "hold": 10, "reject": 11, "error": 12}


def _arguments(
    config: list[Path] | None, overrides: list[str] | None, home: Path | None, agent: str | None, **settings: Any
) -> list[str]:
    """The same choices as `--config` and `--set` words: what a child process is started with."""
    words = [f"--config={Path(file).resolve()}" for file in config or []]
    chosen = list(overrides or [])
    if home is not None:
        chosen.append(f"home={json.dumps(str(home.expanduser().resolve()))}")
    if agent is not None:
        chosen.append(f"agent.name={json.dumps(agent)}")
    chosen += [f"{key}={json.dumps(value)}" for key, value in settings.items() if value is not None]
    return words + [f"--set={word}" for word in chosen]


def _open(
    config: list[Path] | None, overrides: list[str] | None, home: Path | None, agent: str | None, **settings: Any
) -> Deployment:
    from cltrain.api import Deployment

    return Deployment.open(_arguments(config, overrides, home, agent, **settings))


def _print(value: Any, as_json: bool, lines: list[str]) -> None:
    typer.echo(json.dumps(value, indent=2, sort_keys=True, default=str) if as_json else "\n".join(lines))


def _said(outcome: dict[str, Any]) -> list[str]:
    """A verdict in words; a hold by the gate says how much evidence it lacks."""
    lines = [f"{outcome['verdict']}: {reason}" for reason in outcome["reasons"]]
    is_gates = outcome.get("number", 0) is not None  # without a number no update was started, and its reason says it
    if is_gates and outcome["verdict"] == "hold" and outcome["num_missing"]:
        when = outcome["forecast_s"]
        soon = f", at the present rate in about {when / 60:.0f} minutes" if when is not None else ""
        lines.append(f"about {outcome['num_missing']} held-out items are missing{soon}")
    return lines


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where everything goes.")] = Path("out/demo"),
    seed: Annotated[int, typer.Option(help="Which stream of tickets.")] = 0,
) -> None:
    """A whole deployment on this machine: an agent works, learns, and what it learns is gated and swapped in."""
    from cltrain.demo.run import run_demo

    run_demo(out, seed)


@app.command()
def run(
    config: ConfigFiles = None,
    overrides: Overrides = None,
    home: Home = None,
    agent: Agent = None,
    base: Annotated[Path | None, typer.Option(help="Directory of the frozen base model.")] = None,
    upstream: Annotated[str | None, typer.Option(help="URL of an inference server that already runs.")] = None,
    mode: Annotated[str | None, typer.Option(help="off, observe, approve or auto.")] = None,
    only: Annotated[str | None, typer.Option(help="Run one process here: server, gateway or worker.")] = None,
) -> None:
    """Start gateway, server and worker, and keep them up (or run one of them alone with --only)."""
    _start(config, overrides, home, agent, base, upstream, mode, only, ("server", "gateway", "worker"))


@app.command()
def serve(
    config: ConfigFiles = None,
    overrides: Overrides = None,
    home: Home = None,
    agent: Agent = None,
    base: Annotated[Path | None, typer.Option(help="Directory of the frozen base model.")] = None,
    upstream: Annotated[str | None, typer.Option(help="URL of an inference server that already runs.")] = None,
) -> None:
    """Start gateway and server only: everything is recorded, nothing is learned."""
    _start(config, overrides, home, agent, base, upstream, None, None, ("server", "gateway"))


def _start(
    config: list[Path] | None,
    overrides: list[str] | None,
    home: Path | None,
    agent: str | None,
    base: Path | None,
    upstream: str | None,
    mode: str | None,
    only: str | None,
    names: tuple[str, ...],
) -> None:
    from cltrain import launch

    settings: dict[str, Any] = {"agent.mode": mode, "base.path": str(base.resolve()) if base else None}
    if upstream is not None:
        from cltrain.config import load

        settings["server.url"] = upstream
        if load(config or [], [*(overrides or []), f"server.url={json.dumps(upstream)}"]).server.kind == "embedded":
            settings["server.kind"] = "openai"  # nobody said what it is: record, and load no adapters
    words = _arguments(config, overrides, home, agent, **settings)
    deployment = _open(config, overrides, home, agent, **settings)
    if only is not None:
        deployment.run_process(only)
        return
    names = tuple(name for name in names if name in launch.needed(deployment.config))
    with launch.Fleet(deployment.config, words, names, on_event=lambda line: typer.echo(line, err=True)) as fleet:
        typer.echo(f"agent {deployment.agent} ({deployment.config.agent.mode}) is served at")
        typer.echo(f"  base_url = {launch.gateway_url(deployment.config)}/v1   model = {deployment.agent}")
        typer.echo(f"  state and logs in {deployment.config.state_dir}; Ctrl-C stops")
        launch.run_until_signal(fleet)


@app.command()
def update(
    config: ConfigFiles = None,
    overrides: Overrides = None,
    home: Home = None,
    agent: Agent = None,
    base: Annotated[Path | None, typer.Option(help="Directory of the frozen base model.")] = None,
    trial: Annotated[bool, typer.Option("--trial", help="Train and judge, then throw the candidate away.")] = False,
    as_json: AsJson = False,
) -> None:
    """Try one update now: by the running worker if there is one, else here."""
    deployment = _open(config, overrides, home, agent, **{"base.path": str(base.resolve()) if base else None})
    outcome = deployment.update(trial=trial, on_progress=lambda line: typer.echo(line, err=True))
    _print(outcome, as_json, _said(outcome))
    raise typer.Exit(VERDICT_EXIT[outcome["verdict"]])


@app.command()
def gate(
    release: Annotated[str, typer.Argument(help="The release to judge against what serves now.")],
    config: ConfigFiles = None,
    overrides: Overrides = None,
    home: Home = None,
    agent: Agent = None,
    as_json: AsJson = False,
) -> None:
    """Judge a release again; nothing is promoted."""
    decision = _open(config, overrides, home, agent).gate(release, on_progress=lambda line: typer.echo(line, err=True))
    _print(decision, as_json, _said(decision))
    raise typer.Exit(VERDICT_EXIT[decision["verdict"]])


@app.command()
def promote(
    release: Annotated[str, typer.Argument(help="A release that the gate would promote.")],
    config: ConfigFiles = None,
    overrides: Overrides = None,
    home: Home = None,
    agent: Agent = None,
    as_json: AsJson = False,
) -> None:
    """A human's yes: serve this release and make it the anchor."""
    alias = _open(config, overrides, home, agent).promote(release)
    _print(alias, as_json, [f"{alias['agent']} now answers with {alias['release']} (before: {alias['previous']})"])


@app.command()
def rollback(
    to: Annotated[str | None, typer.Option(help="A release; default the one before.")] = None,
    keep_learning: Annotated[bool, typer.Option("--keep-learning", help="Do not freeze learning.")] = False,
    reason: Annotated[str, typer.Option(help="Goes into the log of decisions.")] = "asked for by the owner",
    config: ConfigFiles = None,
    overrides: Overrides = None,
    home: Home = None,
    agent: Agent = None,
    as_json: AsJson = False,
) -> None:
    """Serve an earlier release again, set aside what was learned since, and freeze learning."""
    alias = _open(config, overrides, home, agent).rollback(to=to, keep_learning=keep_learning, reason=reason)
    state = "goes on" if keep_learning else "is frozen (cltrain unfreeze)"
    _print(alias, as_json, [f"{alias['agent']} answers with {alias['release']} again; learning {state}"])


@app.command()
def freeze(
    reason: Annotated[str, typer.Option(help="Goes into the log of decisions.")] = "asked for by the owner",
    config: ConfigFiles = None,
    overrides: Overrides = None,
    home: Home = None,
    agent: Agent = None,
    as_json: AsJson = False,
) -> None:
    """Stop learning at once; serving goes on."""
    state = _open(config, overrides, home, agent).freeze(reason)
    _print(state, as_json, [f"{state['agent']}: learning is frozen ({reason})"])


@app.command()
def unfreeze(
    config: ConfigFiles = None,
    overrides: Overrides = None,
    home: Home = None,
    agent: Agent = None,
    as_json: AsJson = False,
) -> None:
    """Let learning go on."""
    state = _open(config, overrides, home, agent).unfreeze()
    _print(state, as_json, [f"{state['agent']}: learning goes on in mode {state['mode']}"])


@app.command()
def status(
    config: ConfigFiles = None,
    overrides: Overrides = None,
    home: Home = None,
    agent: Agent = None,
    as_json: AsJson = False,
) -> None:
    """What serves, what is waiting, what the last updates said."""
    state = _open(config, overrides, home, agent).status()
    frozen = f"  FROZEN: {state['frozen_reason']}" if state["frozen"] else ""
    said = f"{state['feedback']} pieces of feedback, {state['set_aside']} lines set aside"
    lines = [
        f"agent      {state['agent']}  mode {state['mode']}{frozen}",
        f"serving    {state['release'] or 'nothing yet'}",
        f"before     {state['previous'] or '-'}   anchor {state['anchor'] or '-'}",
        f"records    {state['records']} episodes, {said}",
        f"processes  {', '.join(f'{name} {up}' for name, up in state['processes'].items())}",
        f"decisions  {state['decisions']} in the log, chain {state['chain']}",
    ]
    for u in state["updates"]:
        lines.append(
            f"update {u['number']:>4}  {u['verdict'] or u['state']:<8} {u['candidate'] or '':<34} {u['reason']}"
        )
    _print(state, as_json, lines)


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="JSONL of OpenAI-style messages with rewards.")],
    config: ConfigFiles = None,
    overrides: Overrides = None,
    home: Home = None,
    agent: Agent = None,
    base: Annotated[Path | None, typer.Option(help="Base whose tokenizer and context the report counts with.")] = None,
    producer: Annotated[str | None, typer.Option(help="Who wrote the assistant turns.")] = None,
    as_json: AsJson = False,
) -> None:
    """Take past episodes in; every line is accounted for."""
    deployment = _open(config, overrides, home, agent, **{"base.path": str(base.resolve()) if base else None})
    report = deployment.import_file(file, producer=producer)
    lines = [f"{key:<16} {value}" for key, value in report.items() if not isinstance(value, dict | list)]
    lines += [f"  {count:>5}  {reason}" for reason, count in report["reasons"].items()]
    lines += report["unusable"][:SHOWN]
    if report["num_unusable"] > SHOWN:
        lines.append(f"and {report['num_unusable'] - SHOWN} more (--json lists them)")
    _print(report, as_json, lines)
    raise typer.Exit(0 if report["num_set_aside"] == 0 else 3)


@app.command()
def report(
    number: Annotated[int | None, typer.Argument(help="An update's number; default the whole run.")] = None,
    config: ConfigFiles = None,
    overrides: Overrides = None,
    home: Home = None,
    agent: Agent = None,
    as_json: AsJson = False,
) -> None:
    """Write the HTML page of one update or of the run, and say where it is."""
    path = _open(config, overrides, home, agent).report(number)
    _print({"path": str(path)}, as_json, [str(path)])


@config_app.command("check")
def config_check(
    files: Annotated[list[Path] | None, typer.Argument(help="TOML files, merged left to right.")] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Load the files as every command would, and print the result."""
    from cltrain.config import load

    resolved = load(files or [], overrides or [])
    digest = resolved.digest()
    _print({"config": resolved.resolved(), "digest": digest}, as_json, [f"good; digest {digest[:12]}"])


@app.command()
def doctor(
    config: ConfigFiles = None,
    overrides: Overrides = None,
    home: Home = None,
    agent: Agent = None,
    as_json: AsJson = False,
) -> None:
    """Look for what would go wrong: packages, disk, ports, base, store, servers."""
    findings = _open(config, overrides, home, agent).doctor()
    num_bad = sum(finding["state"] == "bad" for finding in findings)
    lines = [f"{f['state']:<5} {f['what']:<12} {f['detail']}" for f in findings]
    _print({"num_bad": num_bad, "findings": findings}, as_json, lines)
    raise typer.Exit(1 if num_bad else 0)


def main() -> None:
    """Entry point: what a user can fix is printed without a traceback, with an exit code that scripts can use."""
    try:
        app()
    except CltrainError as error:
        _fail(error)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        _fail(DataError(f"{error.strerror}: {error.filename or 'a file'} could not be written; free some space"))


def _fail(error: CltrainError) -> NoReturn:
    if "--json" in sys.argv:
        typer.echo(json.dumps({"error": type(error).__name__, "message": str(error)}))
    typer.echo(f"{type(error).__name__}: {error}", err=True)
    sys.exit(error.exit_code)
