"""Starting the embedded server: as a process of its own, or in a thread of this one."""

from __future__ import annotations

import contextlib
import errno
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import uvicorn

from cltrain.deploy.embedded import create_app
from cltrain.deploy.engine import Engine
from cltrain.errors import ConfigError, DataError, ServerError
from cltrain.models.base import load_base

GIL_SWITCH_S = 0.0005  # the engine's thread and the event loop share one interpreter: let neither wait the default 5 ms
SHUTDOWN_S = 5
KEEP_ALIVE_S = 75  # longer than clients keep idle connections (httpx: 5 s), or a request meets a closing one


def run_server(
    base_path: Path | None,
    host: str,
    port: int,
    *,
    base_name: str = "base",
    max_batch: int = 16,
    max_adapters: int = 6,
    device: str = "cpu",
    dtype: str = "float32",
    context: int | None = None,
    num_threads: int = 1,
    adapters: Mapping[str, Path] | None = None,
    announce: Callable[[str], None] = print,
) -> None:
    """Serve until SIGINT or SIGTERM. `announce` gets the URL once the port is bound and the base loaded (port 0: any).

    `adapters` (name -> directory) are there before the first request is; one that cannot be read is announced and left
    out, because the base and the others can still serve.

    Raises ConfigError for a busy port or a host that is not ours, before the base is loaded.
    """
    with contextlib.closing(bind(host, port)) as listener:
        base = load_base(base_path, device=device, dtype=dtype, context=context, num_threads=num_threads)
        with contextlib.closing(
            Engine(base, base_name=base_name, max_batch=max_batch, max_adapters=max_adapters)
        ) as engine:
            sys.setswitchinterval(GIL_SWITCH_S)
            for name, directory in (adapters or {}).items():
                try:
                    engine.adapters.load(name, directory)
                except DataError as error:
                    announce(f"{name} is not served: {error}")
            announce(_url(host, listener))
            _uvicorn(engine).run(sockets=[listener])


@contextlib.contextmanager
def running_server(engine: Engine, host: str = "127.0.0.1", port: int = 0) -> Iterator[str]:
    """The URL of a server in a thread of this process; it stops when the block ends. The engine stays the caller's."""
    with contextlib.closing(bind(host, port)) as listener:
        server = _uvicorn(engine)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="cltrain-server", daemon=True)
        thread.start()
        try:
            while not server.started:
                if not thread.is_alive():
                    raise ServerError(f"the server on {host}:{port} ended while starting")
                time.sleep(0.01)
            yield _url(host, listener)
        finally:
            server.should_exit = True
            thread.join(timeout=2 * SHUTDOWN_S)


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises ConfigError when the port is busy or the host is not an address of this machine."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # else asyncio leaves Nagle on
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(256)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(f"port {port} on {host} is in use: choose a free one, or stop its owner") from None
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror or error}") from None
    return listener


def _uvicorn(engine: Engine) -> uvicorn.Server:
    config = uvicorn.Config(
        create_app(engine),
        log_level="warning",
        access_log=False,
        lifespan="off",
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=SHUTDOWN_S,
    )
    return uvicorn.Server(config)


def _url(host: str, listener: socket.socket) -> str:
    return f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
