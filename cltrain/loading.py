"""A release brought onto the servers by a command: beside the worker, or without one."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from cltrain.config import Config
from cltrain.deploy import probes
from cltrain.deploy.client import clients_of
from cltrain.deploy.replicas import Replicas
from cltrain.errors import ServerError
from cltrain.models.signature import check_sealed
from cltrain.store.database import Store


def load_and_prove(config: Config, store: Store, release: str, directory: Path) -> None:
    """On every replica that answers, each of which then proves it: only so is it ready where there are several.

    Raises DataError for what is not as it was sealed, or signed by no trusted key where there are any.
    """
    check_sealed(directory, config.signing.all_trusted)
    with closing(Replicas(store, clients_of(config.server), config.server.min_ready)) as servers:
        servers.load(release, directory)
        if (kept := probes.kept_of(store, release)) is not None:
            servers.prove(release, kept)
        elif len(servers.urls) > 1:
            raise ServerError(f"nothing proves {release} yet: start the worker, which makes its probes, and ask again")
