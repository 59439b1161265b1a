"""Commands by which a person decides, and the log of what was decided."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cltrain.cli.parts import AsJson, Chosen, Reason, about_one, print_out
from cltrain.errors import ConflictError

if TYPE_CHECKING:
    from cltrain.api import Deployment

Tenants = Annotated[bool, typer.Option("--tenants", help="The agent, and every tenant of it.")]


@about_one
def promote(
    chosen: Chosen,
    release: Annotated[str, typer.Argument(help="A release that the gate would promote, or how its name begins.")],
    again: Annotated[bool, typer.Option("--again", help="Also one that was rolled back.")] = False,
    as_json: AsJson = False,
) -> None:
    """A human's yes: serve this release and make it the anchor."""
    alias = chosen.open().promote(release, again=again)
    print_out(alias, as_json, [f"{alias['agent']} now answers with {alias['release']} (before: {alias['previous']})"])


@about_one
def approve(
    chosen: Chosen,
    release: Annotated[str | None, typer.Argument(help="Which one, if several wait; or how its name begins.")] = None,
    as_json: AsJson = False,
) -> None:
    """A human's yes to the candidate that waits for it in mode approve: serve it and make it the anchor."""
    alias = chosen.open().approve(release)
    print_out(alias, as_json, [f"{alias['agent']} now answers with {alias['release']} (before: {alias['previous']})"])


@about_one
def rollback(
    chosen: Chosen,
    to: Annotated[str | None, typer.Option(help="A release, or how its name begins; default the one before.")] = None,
    keep_learning: Annotated[bool, typer.Option("--keep-learning", help="Do not freeze learning.")] = False,
    tenants: Tenants = False,
    reason: Reason = "asked for by the owner",
    as_json: AsJson = False,
) -> None:
    """Serve an earlier release again, set aside what was learned since, and freeze learning."""
    state = "goes on" if keep_learning else "is frozen (cltrain unfreeze)"

    def one(deployment: Deployment) -> dict[str, Any]:
        where = to if deployment.agent == first.agent else None
        return deployment.rollback(to=where, keep_learning=keep_learning, reason=reason)

    first = chosen.open()
    _print_each(
        first,
        one,
        tenants,
        as_json,
        lambda alias: f"{alias['agent']} answers with {alias['release']} again; learning {state}",
    )


@about_one
def freeze(
    chosen: Chosen,
    tenants: Tenants = False,
    reason: Reason = "asked for by the owner",
    as_json: AsJson = False,
) -> None:
    """Stop learning at once; serving goes on."""
    from cltrain.registry.tenants import learning_in

    def one(deployment: Deployment) -> dict[str, Any]:
        state = deployment.freeze(reason)
        if tenants:
            return state
        with deployment.store.read() as connection:
            return {**state, "tenants_learning": learning_in(connection, deployment.agent)}

    def line(state: dict[str, Any]) -> str:
        said = f"{state['agent']}: learning is frozen ({reason})"
        num = len(state.get("tenants_learning", ()))
        go = "1 tenant goes" if num == 1 else f"{num} tenants go"
        return f"{said}\n{go} on learning: --tenants freezes them too" if num else said

    _print_each(chosen.open(), one, tenants, as_json, line)


@about_one
def unfreeze(
    chosen: Chosen,
    tenants: Tenants = False,
    as_json: AsJson = False,
) -> None:
    """Let learning go on."""
    _print_each(
        chosen.open(), lambda deployment: deployment.unfreeze(), tenants, as_json,
        lambda state: f"{state['agent']}: learning goes on in mode {state['mode']}",
    )  # fmt: skip


@about_one
def unquarantine(
    chosen: Chosen,
    records: Annotated[list[str] | None, typer.Argument(metavar="RECORD", help="Which ones.")] = None,
    update: Annotated[
        list[int] | None, typer.Option(help="A number: what it learned or set aside; may be repeated.")
    ] = None,
    release: Annotated[
        str | None,
        typer.Option(help="What the update behind it, or its rollback, quarantined; or how its name begins."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would come back; alone: of all.")] = False,
    reason: Reason = "asked for by the owner",
    as_json: AsJson = False,
) -> None:
    """Give quarantined records back to learning: a later window may read them, and screens and gate judge them anew."""
    found = chosen.open().unquarantine(
        records or (), numbers=update or (), release=release, dry_run=dry_run, reason=reason
    )
    print_out(found, as_json, list(_returned(found)))


def _returned(found: dict[str, Any]) -> Iterator[str]:
    """One line a record, and how many there are."""
    for one in found["records"]:
        then = f"; {one['learned_by']} learned it and is not undone: rehearsed" if one["learned_by"] else ""
        yield f"{one['record']}  {one['stratum'] or '-'}  {one['reason']}{then}"
    yield from (f"{record}  stays: it {why}" for record, why in found["refused"].items())
    num = len(found["records"])
    yield f"{found['agent']}: {num} record{'' if num == 1 else 's'} {'would come' if found['is_dry'] else 'came'} back"


def _print_each(
    first: Deployment,
    switch: Callable[[Deployment], dict[str, Any]],
    with_tenants: bool,
    as_json: bool,
    line: Callable[[dict[str, Any]], str],
) -> None:
    """Do it to one agent, and with `with_tenants` to every tenant of it: whatever cannot be done to one of them, most
    often for want of anything to roll back, keeps none of the others from it and is said. Exit code 4 where nothing was
    done to anybody."""
    if not with_tenants:
        state = switch(first)
        print_out(state, as_json, [line(state)])
        return
    done: list[dict[str, Any]] = []
    left: dict[str, str] = {}
    for deployment in (first, *first.tenants()):
        try:
            done.append(switch(deployment))
        except ConflictError as error:
            left[deployment.agent] = str(error)
    lines = [*map(line, done), *(f"{agent}: nothing was done: {why}" for agent, why in left.items())]
    print_out({"done": done, "left": left}, as_json, lines)
    if not done:
        raise typer.Exit(ConflictError.exit_code)


@about_one
def log(
    chosen: Chosen,
    verify: Annotated[bool, typer.Option("--verify", help="Recompute the chain; exit code 3 if it is broken.")] = False,
    head: Annotated[
        str | None, typer.Option(help="A head noted elsewhere: is the log still the same up to it?")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Every decision about the agent, and the head of the log: note it somewhere else to notice a cut-off tail."""
    found = chosen.open().log(verify=verify, head=head)
    lines = [log_line(entry) for entry in found["entries"]]
    if found["num_verified"] is not None:
        lines.append(f"{found['num_verified']} entries of all agents hang together")
    if found["num_since"] is not None:
        lines.append(f"{found['num_since']} of them came after {head}")
    print_out(found, as_json, [*lines, f"head {found['head']}"])


def log_line(entry: dict[str, Any]) -> str:
    """Number, time, kind, and what it says, on one line."""
    told = ((key, value) for key, value in entry["payload"].items() if value not in (None, "", [], {}))
    said = "  ".join(f"{key}={' '.join(str(value).split())}" for key, value in told)
    return (
        f"{entry['seq']:>6}  {datetime.fromtimestamp(entry['at'], UTC):%Y-%m-%d %H:%M:%S}  {entry['kind']:<9}  {said}"
    )
