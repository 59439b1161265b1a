"""Commands about the gateway's API keys: who may ask for answers, give feedback, read the metrics."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from functools import partial
from typing import Annotated, Any

import typer

from cltrain.cli.parts import AsJson, Chosen, about_one, keys_app, print_out, warn


@partial(about_one, group=keys_app)
def add(
    chosen: Chosen,
    principal: Annotated[str, typer.Option(help="Whose key it is: the principal of everything that comes with it.")],
    scope: Annotated[list[str], typer.Option(help="infer, feedback or admin; may be repeated.")],
    as_json: AsJson = False,
) -> None:
    """Make a key and print it: the only time that it can be seen."""
    from cltrain.gateway.keys import add_key

    kept, key = add_key(chosen.open().config.state_dir, principal, scope, now=time.time())
    print_out({**_shown(kept), "key": key}, as_json, [key])
    warn(f"key {kept.id} of {principal}: only its hash is kept, note it now")


@partial(about_one, group=keys_app)
def list_(
    chosen: Chosen,
    as_json: AsJson = False,
) -> None:
    """Every key that was made: id, principal, scopes, and whether it was revoked."""
    from cltrain.gateway.keys import read_keys

    keys = read_keys(chosen.open().config.state_dir)
    lines = [
        f"{key.id}  {key.principal:<24}  {','.join(key.scopes):<20}  made {_day(key.created_at)}"
        + ("" if key.revoked_at is None else f"  revoked {_day(key.revoked_at)}")
        for key in keys
    ]
    print_out({"keys": [_shown(key) for key in keys]}, as_json, lines or ["no keys: the gateway answers everybody"])


@partial(about_one, group=keys_app)
def revoke(
    chosen: Chosen,
    key: Annotated[str, typer.Argument(help="Its id, as `cltrain keys list` has it.")],
    as_json: AsJson = False,
) -> None:
    """Refuse a key from the next request on. Revoking the last one opens nothing: then nobody gets in."""
    from cltrain.gateway.keys import revoke_key

    gone = revoke_key(chosen.open().config.state_dir, key, now=time.time())
    print_out(_shown(gone), as_json, [f"{gone.id} of {gone.principal} is refused from now on"])


def _shown(key: Any) -> dict[str, Any]:
    return {
        "id": key.id,
        "principal": key.principal,
        "scopes": list(key.scopes),
        "created_at": key.created_at,
        "revoked_at": key.revoked_at,
    }


def _day(at: float) -> str:
    return f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M}"
