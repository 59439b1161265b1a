"""What each process of a deployment runs, alone or under `cltrain run`."""

from __future__ import annotations

import logging
import sys

from cltrain.config import Config
from cltrain.errors import ConfigError
from cltrain.launch import PROCESSES, check_port_is_free
from cltrain.models.digest import base_path, weight_files
from cltrain.store.database import Store


def run_process(name: str, config: Config, store: Store) -> None:
    """Be `server`, `gateway` or `worker` until SIGTERM or SIGINT. Raises ConfigError for another name."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line per request would bury what matters
    if name == "server":
        _server(config, store)
    elif name == "gateway":
        from cltrain.gateway.app import run_gateway

        run_gateway(config)
    elif name == "worker":
        _worker(config, store)
    else:
        raise ConfigError(f"--only takes one of {', '.join(PROCESSES)}; got {name!r}")


def _worker(config: Config, store: Store) -> None:
    from cltrain.turns import Turns
    from cltrain.worker import Worker

    with Worker(config, store) as worker:
        worker.run(Turns(worker).take)


def _server(config: Config, store: Store) -> None:
    check_port_is_free(config.server.host, config.server.port, "server.port")
    weight_files(base_path(config.base.path))  # what is wrong here is said before torch is loaded
    from cltrain.deploy import residents
    from cltrain.deploy.serve import run_server
    from cltrain.deploy.trust import bar_untrusted

    with store.read() as connection:
        wanted = residents.desired(connection, config.state_dir, config.agent.name)
    loadable = bar_untrusted(wanted, config.signing.all_trusted).loadable
    adapters = {name: path for name, path in loadable.items() if path.is_dir()}
    run_server(
        config.base.path,
        config.server.host,
        config.server.port,
        base_name=config.server.model or "base",
        max_batch=config.server.max_batch,
        max_adapters=config.server.max_adapters,
        device=config.base.device,
        dtype=config.base.dtype,
        context=config.base.context,
        num_threads=config.base.num_threads,
        adapters=adapters,
    )
