"""Commands that start something: the demo, a deployment, one of its processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from cltrain.cli.parts import Base, Chosen, about_one, app, based_on, warn

Upstream = Annotated[str | None, typer.Option(help="URL of an inference server that already runs.")]

UPSTREAM_WAIT_S = 5.0  # for a server that is not ours


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


def _start(
    chosen: Chosen,
    base: Path | None,
    upstream: str | None,
    mode: str | None,
    only: str | None,
    names: tuple[str, ...],
) -> None:
    from cltrain import launch
    from cltrain.models.digest import base_path, weight_files

    settings: dict[str, Any] = {"agent.mode": mode, **based_on(base)}
    if upstream is not None:
        from cltrain.config import load

        settings["server.url"] = upstream
        overrides = [*(chosen.overrides or []), f"server.url={json.dumps(upstream)}"]
        if load(chosen.config or [], overrides).server.kind == "embedded":
            settings["server.kind"] = "openai"  # nobody said what it is: record, and load no adapters
    deployment = chosen.open(**settings)
    deployment.require_shared()
    names = (only,) if only is not None else tuple(name for name in names if name in launch.needed(deployment.config))
    if only is None:  # a process alone looks itself: another of this deployment may hold the port a moment longer
        launch.check_ports(deployment.config, names)
    weight_files(base_path(deployment.config.base.path))
    if not deployment.keep_room():
        warn(f"no room in {deployment.config.state_dir} to set aside for a rollback on a full disk")
    if only is not None:
        deployment.run_process(only)
        return
    with launch.Fleet(
        deployment.config, deployment.arguments, names, on_event=lambda line: typer.echo(line, err=True)
    ) as fleet:
        for foreign in deployment.config.server.replicas if "server" not in names else ():
            if not launch.is_listening(foreign, UPSTREAM_WAIT_S):
                warn(f"WARNING: nothing listens at {foreign} (server.url): no answer gets through until something does")
        typer.echo(f"agent {deployment.agent} ({deployment.config.agent.mode}) is served at")
        typer.echo(f"  base_url = {launch.gateway_url(deployment.config)}/v1   model = {deployment.agent}")
        typer.echo(f"  state and logs in {deployment.config.state_dir}; Ctrl-C stops")
        launch.run_until_signal(fleet)
