"""What would go wrong, looked for before it does. Reads and probes; changes nothing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import httpx
from sqlalchemy import select

from cltrain import exposure, launch
from cltrain.config import Config
from cltrain.deploy import residents
from cltrain.deploy.client import clients_of
from cltrain.errors import CltrainError, ConfigError, DataError, ServerError
from cltrain.gateway import keys
from cltrain.gateway.guard import check_may_listen, is_loopback
from cltrain.models.digest import base_digest, base_path
from cltrain.models.signature import check_signature
from cltrain.records import SuiteItem
from cltrain.registry.decisions import verify_chain
from cltrain.store.database import STORE_FILE, open_store, require_not_lost
from cltrain.store.schema import screenings

PACKAGES = ("torch", "transformers", "peft", "accelerate", "wandb", "triton", "safetensors")
MIN_FREE_BYTES = 1 << 30


def examine(config: Config) -> list[dict[str, str]]:
    """One finding a line: `what`, `detail`, and `state` good, note or bad."""
    findings = [_package(name) for name in PACKAGES]
    checks: list[tuple[str, Callable[[], str]]] = [
        ("state", lambda: _disk(config.state_dir)),
        ("base", lambda: _base(config)),
        ("decisions", lambda: _decisions(config.state_dir)),
        ("suites", lambda: _suites(config)),
        ("keys", lambda: _keys(config)),
        ("signing", lambda: _signed(config)),
    ]
    for what, check in checks:
        try:
            findings.append(_finding("good", what, check()))
        except (CltrainError, OSError) as error:
            findings.append(_finding("bad", what, str(error)))
    findings += [_port(config, "server", url) for url in config.server.replicas]
    findings.append(_port(config, "gateway", launch.gateway_url(config)))
    return findings + _doors(config)


def _decisions(state_dir: Path) -> str:
    require_not_lost(state_dir)
    if not (state_dir / STORE_FILE).exists():
        return f"none: there is no deployment in {state_dir} (home) yet"
    return f"{verify_chain(open_store(state_dir)).num_entries} in an unbroken chain"


def _suites(config: Config) -> str:
    from cltrain.gate.http_judge import HttpJudge
    from cltrain.gate.plugins import load_suites
    from cltrain.gate.probes import load_character

    items = load_suites(config.gate, has_other_items=config.experience.eval_share > 0).items
    asked = load_character(config.gate.character)
    if config.gate.judge is not None:
        HttpJudge(config.gate.judge)  # its key must be there
    return (
        f"{len(items)} items in {len(config.gate.all_suites())} suites of the owner, "
        f"{len(asked.harmful) + len(asked.harmless)} prompts and {len(asked.probes)} probes of character"
        f"{_never_asked(config, items)}"
    )


def _never_asked(config: Config, items: Sequence[SuiteItem]) -> str:
    """A gain item is asked once an update learned its kind of work: those whose kind no record has were misnamed."""
    from cltrain.gate.suites import is_taught

    if not (config.state_dir / STORE_FILE).exists():
        return ""
    with open_store(config.state_dir).read() as connection:
        ours = select(screenings.c.stratum).where(screenings.c.agent == config.agent.name).distinct()
        seen = {stratum for stratum in connection.scalars(ours) if stratum}
    strange = [item.stratum for item in items if item.kind == "gain" and not is_taught(item.stratum, seen)]
    if not seen or not strange:
        return ""
    names = ", ".join(sorted(set(strange))[:5])
    return f"; {len(strange)} gain items wait: they are of kinds of work that no record has so far ({names})"


def _signed(config: Config) -> str:
    """What serves and what a rollback would go to must be what a trusted key signed, where there are such keys."""
    trusted = config.signing.all_trusted
    if not trusted:
        return "no key is asked for: whatever is sealed in the state directory may be loaded"
    if not (config.state_dir / STORE_FILE).exists():
        return f"{len(trusted)} trusted keys; nothing is sealed yet"
    store = open_store(config.state_dir)
    with store.read() as connection:
        wanted = residents.desired(connection, config.state_dir, config.agent.name)
    unsigned = []
    for release in sorted(wanted.needed):
        try:
            check_signature(wanted.directories[release], trusted)
        except DataError as error:
            unsigned.append(f"{release} serves, or a rollback would go to it: {error}")
    if unsigned:
        raise DataError("; ".join(unsigned))
    if not wanted.needed:
        return "nothing serves but the bare base, which needs no signature"
    return (
        f"what serves, and what a rollback would go to, is signed by a trusted key ({', '.join(sorted(wanted.needed))})"
    )


def _finding(state: str, what: str, detail: str) -> dict[str, str]:
    return {"state": state, "what": what, "detail": detail}


def _package(name: str) -> dict[str, str]:
    if importlib.util.find_spec(name) is None:
        return _finding("note" if name in ("triton", "wandb") else "bad", name, "is not installed")
    return _finding("good", name, importlib.metadata.version(name))


def _disk(state_dir: Path) -> str:
    place = next(path for path in (state_dir, *state_dir.parents) if path.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise OSError(f"{place} cannot be written: make it a directory of this user, on a file system that is writable")
    free = shutil.disk_usage(place).free
    if free < MIN_FREE_BYTES:
        raise OSError(f"only {free >> 20} MiB free in {place}")
    return f"{state_dir}, {free >> 30} GiB free"


def _base(config: Config) -> str:
    directory = base_path(config.base.path)
    return f"{directory} ({base_digest(directory)[:12]})"


def _port(config: Config, name: str, url: str) -> dict[str, str]:
    section = config.server if name == "server" else config.gateway
    if name in launch.needed(config):
        try:
            launch.check_port_is_free(section.host, section.port, f"{name}.port")
            return _finding("good", name, f"{url} is free to listen on")
        except CltrainError as error:
            busy = str(error)
    else:
        busy = f"{url} does not answer"
    try:
        path = config.server.health_path if name == "server" else "/health"
        is_ours = httpx.get(f"{url}{path}", timeout=1.0, trust_env=False).status_code == 200
    except httpx.HTTPError:
        is_ours = False
    return _finding("good", name, f"{url} answers") if is_ours else _finding("bad", name, busy)


def _doors(config: Config) -> list[dict[str, str]]:
    """What others could do to the server, past the gateway."""
    server = config.server
    if not server.is_elsewhere and not is_loopback(server.host):
        detail = (
            f"server.host = {server.host!r}: the embedded server takes adapters from whoever reaches it. Leave it on "
            "127.0.0.1 and give others the gateway"
        )
        return [_finding("bad", "server", detail)]
    key = os.environ.get(server.api_key_env) if server.api_key_env else None
    limits = [_finding("bad", "server", reason) for reason in _too_small(config)]
    if server.kind == "vllm":
        untold = (
            f"vLLM tells no limits: start it with --max-lora-rank {config.adapter.rank} or more (adapter.rank), else "
            f"it refuses what was learned, and --max-cpu-loras {server.max_adapters} or more (server.max_adapters), "
            "else it forgets adapters and reads them again when they are asked for"
        )
        limits.append(_finding("note", "server", untold))
    return limits + [
        _finding(state, "server", detail if len(server.replicas) == 1 else f"{url}: {detail}")
        for url in server.replicas
        for state, detail in exposure.look(url, server.kind, key)
    ]


def _too_small(config: Config) -> Iterator[str]:
    """What a server that tells its limits has too little of."""
    if config.server.kind not in ("vllm", "sglang"):
        return
    for client in clients_of(config.server):
        with client, suppress(ServerError):  # who does not answer is a finding of its own
            try:
                client.check_takes(config.adapter.rank, config.adapter.targets, config.server.max_adapters)
            except ConfigError as error:
                yield str(error)


def _keys(config: Config) -> str:
    host, path = config.gateway.host, config.state_dir / keys.FILE
    check_may_listen(host, config.state_dir)
    if path.exists() and path.stat().st_mode & 0o077:
        raise OSError(f"{path} can be read by others: chmod 600 {path}")
    known = keys.read_keys(config.state_dir)
    num_valid = sum(key.revoked_at is None for key in known)
    return f"{num_valid} valid, of {len(known)}" if known else f"none needed: {host} is this machine alone"
