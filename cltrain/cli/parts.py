"""What every command shares: the app, the options that say which deployment it is about, how it prints."""

from __future__ import annotations

import contextlib
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

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
keys_app = typer.Typer(help="API keys of the gateway.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(keys_app, name="keys")

Overrides = Annotated[
    list[str] | None, typer.Option("--set", "-s", metavar="KEY=VALUE", help="One setting, e.g. trainer.lr=1e-5.")
]
Configs = Annotated[list[Path] | None, typer.Option("--config", "-c", help="TOML file; several merge left to right.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Home = Annotated[Path | None, typer.Option(help="State directory (default $CLTRAIN_HOME or checkpoints/).")]
Base = Annotated[Path | None, typer.Option(help="Directory of the frozen base model.")]
Reason = Annotated[str, typer.Option(help="Goes into the log of decisions.")]

VERDICT_EXIT = {"promote": 0, "hold": 10, "reject": 11, "error": 12}


@dataclass(frozen=True)
class Chosen:
    """Which deployment a command is about: the options that all of those commands share, as `about_one` adds them."""

    config: Configs = None
    overrides: Overrides = None
    home: Home = None
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


def about_one(function: Callable[..., None], group: typer.Typer = app) -> Callable[..., None]:
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
    return group.command(function.__name__.rstrip("_"))(command)


def print_out(value: Any, as_json: bool, lines: list[str]) -> None:
    typer.echo(json.dumps(value, indent=2, sort_keys=True, default=str) if as_json else "\n".join(lines))


def said(outcome: dict[str, Any]) -> list[str]:
    """A verdict in words; a hold by the gate says how much evidence it lacks."""
    lines = [f"{outcome['verdict']}: {reason}" for reason in outcome["reasons"]]
    is_gates = outcome.get("number", 0) is not None  # without a number no update was started, and its reason says it
    if is_gates and outcome["verdict"] == "hold" and outcome["num_missing"]:
        when = outcome["forecast_s"]
        soon = f", at the present rate in about {when / 60:.0f} minutes" if when is not None else ""
        lines.append(f"about {outcome['num_missing']} held-out items are missing{soon}")
    return lines


def based_on(base: Path | None) -> dict[str, str]:
    """The settings of `--base`."""
    return {} if base is None else {"base.path": str(base.resolve())}


def warn(line: str) -> None:
    """To stderr, which may be a log on a full disk: the exit code still says what is wrong."""
    with contextlib.suppress(OSError):
        typer.echo(line, err=True)
