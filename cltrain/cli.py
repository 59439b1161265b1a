"""The command line: thin words over `cltrain.api`. Heavy packages are imported inside the command that needs them.

Exit codes: 0 done, 1 failed, 2 configuration, 3 data, 4 conflict, 5 server; the gate's verdicts: 10 hold, 11 reject,
12 error.
"""

from __future__ import annotations

import contextlib
import errno
import inspect
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from cltrain import __version__
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

Overrides = Annotated[
    list[str] | None, typer.Option("--set", "-s", metavar="KEY=VALUE", help="One setting, e.g. trainer.lr=1e-5.")
]
Configs = Annotated[list[Path] | None, typer.Option("--config", "-c", help="TOML file; several merge left to right.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Base = Annotated[Path | None, typer.Option(help="Directory of the frozen base model.")]
Upstream = Annotated[str | None, typer.Option(help="URL of an inference server that already runs.")]
Reason = Annotated[str, typer.Option(help="Goes into the log of decisions.")]

UPSTREAM_WAIT_S = 5.0  # for a server that is not ours
SHOWN = 3  # unusable episodes that `import` names
VERDICT_EXIT = {"promote": 0, "hold": 10, "reject": 11, "error": 12}


@dataclass(frozen=True)
class Chosen:
    """Which deployment a command is about: the options that all of those commands share, as `about_one` adds them."""

    config: Configs = None
    overrides: Overrides = None
    home: Annotated[Path | None, typer.Option(help="State directory (default $CLTRAIN_HOME or checkpoints/).")] = None
    agent: Annotated[str | None, typer.Option(help="The agent's name (default agent.name).")] = None

    def open(self, **settings: Any) -> Deployment:
        """The deployment under these settings; one that is None is left as it was."""
        from cltrain.api import Deployment

        chosen = list(self.overrides or [])
        if self.home is not None:
            chosen.append(f"home={json.dumps(str(self.home.expanduser().resolve()))}")
        if self.agent is not None:
            chosen.append(f"agent.name={json.dumps(self.agent)}")
        chosen += [f"{key}={json.dumps(value)}" for key, value in settings.items() if value is not None]
        words = [f"--config={file.resolve()}" for file in self.config or []]
        return Deployment.open([*words, *(f"--set={word}" for word in chosen)])


def about_one(function: Callable[..., None]) -> Callable[..., None]:
    """Make a command of a function that takes a Chosen first: the command has the fields of Chosen as options."""
    _, *own = inspect.signature(function, eval_str=True).parameters.values()
    shared = inspect.signature(Chosen, eval_str=True).parameters

    def command(**values: Any) -> None:
        chosen = Chosen(**{name: values.pop(name) for name in shared})
        function(chosen, **values)

    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*own, *shared.values())]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # what typer reads
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    command.__doc__ = function.__doc__
    return app.command(function.__name__.rstrip("_"))(command)


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


def _print_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"cltrain {__version__}")
        raise typer.Exit


@app.callback()
def about_all(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """What comes before the command."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where everything goes.")] = Path("out/demo"),
    seed: Annotated[int, typer.Option(help="Which stream of tickets.")] = 0,
) -> None:
    """A whole deployment on this machine: an agent works, learns, and what it learns is gated and swapped in."""
    from cltrain.demo.run import run_demo

    run_demo(out, seed)


@about_one
def run(
    chosen: Chosen,
    base: Base = None,
    upstream: Upstream = None,
    mode: Annotated[str | None, typer.Option(help="off, observe, approve or auto.")] = None,
    only: Annotated[str | None, typer.Option(help="Run one process here: server, gateway or worker.")] = None,
) -> None:
    """Start gateway, server and worker, and keep them up (or run one of them alone with --only)."""
    _start(chosen, base, upstream, mode, only, ("server", "gateway", "worker"))


@about_one
def serve(
    chosen: Chosen,
    base: Base = None,
    upstream: Upstream = None,
) -> None:
    """Start gateway and server only: everything is recorded, nothing is learned."""
    _start(chosen, base, upstream, None, None, ("server", "gateway"))


def _based_on(base: Path | None) -> dict[str, str]:
    """The settings of `--base`."""
    return {} if base is None else {"base.path": str(base.resolve())}


def _start(
    chosen: Chosen,
    base: Path | None,
    upstream: str | None,
    mode: str | None,
    only: str | None,
    names: tuple[str, ...],
) -> None:
    from cltrain import launch

    settings: dict[str, Any] = {"agent.mode": mode, **_based_on(base)}
    if upstream is not None:
        from cltrain.config import load

        settings["server.url"] = upstream
        overrides = [*(chosen.overrides or []), f"server.url={json.dumps(upstream)}"]
        if load(chosen.config or [], overrides).server.kind == "embedded":
            settings["server.kind"] = "openai"  # nobody said what it is: record, and load no adapters
    deployment = chosen.open(**settings)
    if not deployment.keep_room():
        _warn(f"no room in {deployment.config.state_dir} to set aside for a rollback on a full disk")
    if only is not None:
        deployment.run_process(only)
        return
    names = tuple(name for name in names if name in launch.needed(deployment.config))
    with launch.Fleet(
        deployment.config, deployment.arguments, names, on_event=lambda line: typer.echo(line, err=True)
    ) as fleet:
        foreign = launch.server_url(deployment.config)
        if "server" not in names and not launch.is_listening(foreign, UPSTREAM_WAIT_S):
            _warn(f"WARNING: nothing listens at {foreign} (server.url): no answer gets through until something does")
        typer.echo(f"agent {deployment.agent} ({deployment.config.agent.mode}) is served at")
        typer.echo(f"  base_url = {launch.gateway_url(deployment.config)}/v1   model = {deployment.agent}")
        typer.echo(f"  state and logs in {deployment.config.state_dir}; Ctrl-C stops")
        launch.run_until_signal(fleet)


@about_one
def update(
    chosen: Chosen,
    base: Base = None,
    trial: Annotated[bool, typer.Option("--trial", help="Train and judge, then throw the candidate away.")] = False,
    as_json: AsJson = False,
) -> None:
    """Try one update now: by the running worker if there is one, else here."""
    deployment = chosen.open(**_based_on(base))
    outcome = deployment.update(trial=trial, on_progress=lambda line: typer.echo(line, err=True))
    _print(outcome, as_json, _said(outcome))
    raise typer.Exit(VERDICT_EXIT[outcome["verdict"]])


@app.command()
def verify(
    release: Annotated[Path, typer.Argument(help="Directory of a release: its manifest and adapter files.")],
    base: Base = None,
    anchors: Annotated[Path | None, typer.Option(help="Its pinned anchors (default those of its state).")] = None,
    parent: Annotated[Path | None, typer.Option(help="Its parent's directory (default beside it).")] = None,
    config: Configs = None,
    overrides: Overrides = None,
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
    found = api.verify(release, base=base, anchors=anchors, parent=parent, limits=limits)
    _print({**asdict(found), "holds": found.holds, "failed": found.failed}, as_json, table(found))
    raise typer.Exit(0 if found.holds else 3)


@about_one
def calibrate(
    chosen: Chosen,
    base: Base = None,
    as_json: AsJson = False,
) -> None:
    """Propose budgets from naive updates on what is waiting, as TOML; nothing of the deployment changes."""
    from cltrain.calibration import toml_lines

    found = chosen.open(**_based_on(base)).calibrate(on_progress=lambda line: typer.echo(line, err=True))
    is_held = bool(found["num_missing"])
    _print(found, as_json, [f"hold: {reason}" for reason in found["reasons"]] if is_held else toml_lines(found))
    raise typer.Exit(VERDICT_EXIT["hold"] if is_held else 0)


@about_one
def gate(
    chosen: Chosen,
    release: Annotated[str, typer.Argument(help="What to judge against what serves now.")],
    as_json: AsJson = False,
) -> None:
    """Judge a release again; nothing is promoted."""
    decision = chosen.open().gate(release, on_progress=lambda line: typer.echo(line, err=True))
    _print(decision, as_json, _said(decision))
    raise typer.Exit(VERDICT_EXIT[decision["verdict"]])


@about_one
def promote(
    chosen: Chosen,
    release: Annotated[str, typer.Argument(help="A release that the gate would promote, or how its name begins.")],
    again: Annotated[bool, typer.Option("--again", help="Also one that was rolled back.")] = False,
    as_json: AsJson = False,
) -> None:
    """A human's yes: serve this release and make it the anchor."""
    alias = chosen.open().promote(release, again=again)
    _print(alias, as_json, [f"{alias['agent']} now answers with {alias['release']} (before: {alias['previous']})"])


@about_one
def rollback(
    chosen: Chosen,
    to: Annotated[str | None, typer.Option(help="A release, or how its name begins; default the one before.")] = None,
    keep_learning: Annotated[bool, typer.Option("--keep-learning", help="Do not freeze learning.")] = False,
    reason: Reason = "asked for by the owner",
    as_json: AsJson = False,
) -> None:
    """Serve an earlier release again, set aside what was learned since, and freeze learning."""
    alias = chosen.open().rollback(to=to, keep_learning=keep_learning, reason=reason)
    state = "goes on" if keep_learning else "is frozen (cltrain unfreeze)"
    _print(alias, as_json, [f"{alias['agent']} answers with {alias['release']} again; learning {state}"])


@about_one
def freeze(
    chosen: Chosen,
    reason: Reason = "asked for by the owner",
    as_json: AsJson = False,
) -> None:
    """Stop learning at once; serving goes on."""
    state = chosen.open().freeze(reason)
    _print(state, as_json, [f"{state['agent']}: learning is frozen ({reason})"])


@about_one
def unfreeze(
    chosen: Chosen,
    as_json: AsJson = False,
) -> None:
    """Let learning go on."""
    state = chosen.open().unfreeze()
    _print(state, as_json, [f"{state['agent']}: learning goes on in mode {state['mode']}"])


@about_one
def status(
    chosen: Chosen,
    as_json: AsJson = False,
) -> None:
    """What serves, what is waiting, what the last updates said."""
    from cltrain.status import lines_of

    state = chosen.open().status()
    _print(state, as_json, lines_of(state))


@about_one
def import_(
    chosen: Chosen,
    file: Annotated[Path, typer.Argument(help="JSONL of OpenAI-style messages with rewards.")],
    base: Annotated[Path | None, typer.Option(help="Base whose tokenizer and context the report counts with.")] = None,
    producer: Annotated[str | None, typer.Option(help="Who wrote the assistant turns.")] = None,
    as_json: AsJson = False,
) -> None:
    """Take past episodes in; every line is accounted for."""
    deployment = chosen.open(**_based_on(base))
    report = deployment.import_file(file, producer=producer)
    lines = [f"{key:<16} {value}" for key, value in report.items() if not isinstance(value, dict | list)]
    lines += [f"  {count:>5}  {reason}" for reason, count in report["reasons"].items()]
    lines += report["unusable"][:SHOWN]
    if report["num_unusable"] > SHOWN:
        lines.append(f"and {report['num_unusable'] - SHOWN} more (--json lists them)")
    _print(report, as_json, lines)
    raise typer.Exit(0 if report["num_set_aside"] == 0 else 3)


@about_one
def report(
    chosen: Chosen,
    number: Annotated[int | None, typer.Argument(help="An update's number; default the whole run.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write the HTML page of one update or of the run, and say where it is."""
    path = chosen.open().report(number)
    _print({"path": str(path)}, as_json, [str(path)])


@config_app.command("check")
def config_check(
    files: Annotated[list[Path] | None, typer.Argument(help="TOML files, merged left to right.")] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Load the files as every command would, look whether what they name is there, and print the result."""
    from cltrain.config import load

    resolved = load(files or [], overrides or [])
    resolved.check_files()
    digest = resolved.digest()
    _print({"config": resolved.resolved(), "digest": digest}, as_json, [f"good; digest {digest[:12]}"])


@about_one
def doctor(
    chosen: Chosen,
    as_json: AsJson = False,
) -> None:
    """Look for what would go wrong: packages, disk, ports, base, store, servers."""
    findings = chosen.open().doctor()
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
    _warn(f"{type(error).__name__}: {error}")
    sys.exit(error.exit_code)


def _warn(line: str) -> None:
    """To stderr, which may be a log on a full disk: the exit code still says what is wrong."""
    with contextlib.suppress(OSError):
        typer.echo(line, err=True)
