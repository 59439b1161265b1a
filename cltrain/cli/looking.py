"""Commands that look: state, pages, configuration, what would go wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cltrain.cli.parts import AsJson, Chosen, Overrides, about_one, config_app, print_out

AUDIT_EXIT = {"ok": 0, "warning": 0, "alarm": 11, "error": 12}


@about_one
def status(
    chosen: Chosen,
    as_json: AsJson = False,
) -> None:
    """What serves, what is waiting, what the last updates said."""
    from cltrain.status import lines_of

    state = chosen.open().status()
    print_out(state, as_json, lines_of(state))


@about_one
def report(
    chosen: Chosen,
    number: Annotated[int | None, typer.Argument(help="An update's number; default the whole run.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write the HTML page of one update or of the run, and say where it is."""
    path = chosen.open().report(number)
    print_out({"path": str(path)}, as_json, [str(path)])


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
    print_out({"config": resolved.resolved(), "digest": digest}, as_json, [f"good; digest {digest[:12]}"])


@about_one
def doctor(
    chosen: Chosen,
    as_json: AsJson = False,
) -> None:
    """Look for what would go wrong: packages, disk, ports, base, store, servers."""
    findings = chosen.open().doctor()
    num_bad = sum(finding["state"] == "bad" for finding in findings)
    lines = [f"{f['state']:<5} {f['what']:<12} {f['detail']}" for f in findings]
    print_out({"num_bad": num_bad, "findings": findings}, as_json, lines)
    raise typer.Exit(1 if num_bad else 0)


@about_one
def audit(
    chosen: Chosen,
    as_json: AsJson = False,
) -> None:
    """Look at what serves now, as a whole: by the running worker if there is one, else here."""
    found = chosen.open().audit(on_progress=lambda line: typer.echo(line, err=True))
    lines = [f"{found['outcome']}: {found['release']}" + (f"; {found['action']}" if found["action"] else "")]
    told = zip(found["codes"], found["reasons"], strict=True)
    lines += [f"  {code:<10} {reason}" for code, reason in told]
    lines += [f"  trend      {trend['name']}: {trend['says']}" for trend in found["trends"]]
    print_out(found, as_json, lines)
    raise typer.Exit(AUDIT_EXIT[found["outcome"]])


@about_one
def kubernetes(
    chosen: Chosen,
    pool: Annotated[str, typer.Option(help="The InferencePool of the servers.")],
    namespace: Annotated[str, typer.Option(help="Where the objects go.")] = "default",
    adapters: Annotated[Path | None, typer.Option(help="Where the servers' pods see the state directory.")] = None,
    image: Annotated[str | None, typer.Option(help="Of cltrain: print what runs it as well.")] = None,
    storage: Annotated[str, typer.Option(help="How much the state may take.")] = "10Gi",
) -> None:
    """Print what serves as Kubernetes objects: cltrain kubernetes --pool POOL | kubectl apply -f -"""
    objects = chosen.open().kubernetes(pool, namespace=namespace, adapters=adapters, image=image, storage=storage)
    for one in objects:
        for note in one["metadata"].get("annotations", {}).values():
            typer.echo(f"{one['kind']}: {note}", err=True)
    print_out({"apiVersion": "v1", "kind": "List", "items": objects}, True, [])
