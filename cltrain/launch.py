"""Starts the processes of one deployment, waits until they answer, restarts one that died, ends those it started.

Each process is `cltrain run --only NAME` with the caller's own config arguments: each may also be run by hand.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from urllib.parse import urlsplit

from cltrain.config import Config
from cltrain.errors import OF_EXIT_CODE, CltrainError, ConfigError, ServerError

PROCESSES = ("server", "gateway", "worker")
MAX_RESTARTS = 20  # of one process within RESTARTS_S
RESTARTS_S = 600.0


def server_url(config: Config) -> str:
    """The server's; where there are replicas, the first one's."""
    return config.server.replicas[0]


def gateway_url(config: Config) -> str:
    return f"http://{config.gateway.host}:{config.gateway.port}"


def needed(config: Config) -> tuple[str, ...]:
    """The processes that this configuration starts: a server that already runs elsewhere is not ours, and without a
    server that takes adapters there is nothing for a worker to do."""
    is_ours = {"server": not config.server.is_elsewhere, "gateway": True, "worker": config.server.kind != "openai"}
    return tuple(name for name in PROCESSES if is_ours[name])


def is_listening(url: str, wait_s: float = 0.0) -> bool:
    """Whether anything takes connections there, within `wait_s` seconds."""
    place = urlsplit(url)
    port = place.port or (443 if place.scheme == "https" else 80)
    deadline = time.monotonic() + wait_s
    while True:
        try:
            socket.create_connection((place.hostname or "", port), 0.3).close()
            return True
        except OSError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.1)


def health_of(url: str, path: str = "/health") -> str:
    """up, unwell or down. A port is knocked at first: the HTTP client alone costs a fifth of a second."""
    if not is_listening(url):
        return "down"
    import httpx

    try:
        return "up" if httpx.get(f"{url}{path}", timeout=0.3, trust_env=False).status_code == 200 else "unwell"
    except httpx.HTTPError:
        return "unwell"


def health_of_servers(config: Config) -> str:
    """As `health_of`; where only some of several replicas are up: how many."""
    states = [health_of(url, config.server.health_path) for url in config.server.replicas]
    num_up = states.count("up")
    return states[0] if len(set(states)) == 1 else f"{num_up} of {len(states)} up"


def any_server_up(config: Config) -> bool:
    return any(health_of(url, config.server.health_path) == "up" for url in config.server.replicas)


def check_takes_adapters(config: Config) -> None:
    """Raise ConfigError for a server that could never serve what is learned."""
    if config.server.kind == "openai":
        raise ConfigError(
            "server.kind = 'openai' takes no adapters and gives no log-probs of a prompt: what comes in is recorded, "
            "learning needs server.kind = 'vllm', 'sglang' or 'embedded'"
        )


def check_port_is_free(host: str, port: int, setting: str) -> None:
    """Raise ConfigError when nothing could listen on host:port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"{setting} = {port} cannot be used on {host} ({error.strerror}): "
                f"stop what listens there or choose another with --set {setting}=PORT"
            ) from None


def check_ports(config: Config, names: Sequence[str]) -> None:
    """Raise ConfigError where these processes could not listen, or nobody would find them."""
    for name, section in (("server", config.server), ("gateway", config.gateway)):
        if name in names:
            if section.port == 0:
                raise ConfigError(f"{name}.port = 0 leaves the choice to the system: name a port, others look there")
            check_port_is_free(section.host, section.port, f"{name}.port")


@dataclass
class Fleet:
    """The processes of one deployment that this program started. Use as a context manager."""

    config: Config
    arguments: Sequence[str]  # --config and --set, handed to every process
    names: tuple[str, ...]
    on_event: Callable[[str], None] = print
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    restarts: int = 0
    _catches_sigterm: bool = field(default=False, repr=False)
    _is_uncut: bool = field(default=False, repr=False)  # a SIGTERM that comes now takes effect later
    _sigterm: int | None = field(default=None, repr=False)  # one that came meanwhile
    _restarted: dict[str, list[float]] = field(default_factory=dict, repr=False)  # when, lately

    def __enter__(self) -> Fleet:
        self._end_on_sigterm()
        try:
            check_ports(self.config, self.names)
            for name in self.names:
                self.on_event(f"starting {name} ...")
                self.start(name)
                self.wait_until_up(name)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _end_on_sigterm(self) -> None:
        """From the first start on a SIGTERM must end the others too: by default it would leave them running."""
        in_main = threading.current_thread() is threading.main_thread()
        if in_main and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
            signal.signal(signal.SIGTERM, self._on_sigterm)
            self._catches_sigterm = True

    def _on_sigterm(self, signum: int, _frame: FrameType | None) -> None:
        if self._is_uncut:
            self._sigterm = signum
        else:
            sys.exit(128 + signum)

    @contextmanager
    def _uncut(self) -> Iterator[None]:
        """A SIGTERM in here waits for its end: no process is born and then known to nobody, none is left half ended."""
        self._is_uncut = True
        try:
            yield
        finally:
            self._is_uncut = False
        if self._sigterm is not None:
            sys.exit(128 + self._sigterm)

    def log_file(self, name: str) -> Path:
        return self.config.state_dir / "logs" / f"{name}.log"

    def start(self, name: str) -> None:
        log = self.log_file(name)
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "cltrain", "run", "--only", name, *self.arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.config.base.num_threads), "HF_HUB_OFFLINE": "1"}
        with log.open("ab") as out, self._uncut():
            self.processes[name] = subprocess.Popen(command, stdout=out, stderr=out, env=environment)

    def wait_until_up(self, name: str, timeout_s: float = 120.0) -> None:
        """Return once it answers. Raises what it ended with at its start, or ServerError."""
        import httpx

        url = {"server": server_url(self.config), "gateway": gateway_url(self.config)}.get(name)
        deadline = time.monotonic() + timeout_s
        while url is not None:
            if (code := self.processes[name].poll()) is not None:
                raise OF_EXIT_CODE.get(code, ServerError)(
                    f"{name} ended with code {code} at its start:\n{self.tail(name)}"
                )
            try:
                if httpx.get(f"{url}/health", timeout=2.0, trust_env=False).status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            if time.monotonic() > deadline:
                raise ServerError(f"{name} did not answer on {url} within {timeout_s:g} s; see {self.log_file(name)}")
            time.sleep(0.05)

    def tail(self, name: str, num_lines: int = 15) -> str:
        return "\n".join(self.log_file(name).read_text(errors="replace").splitlines()[-num_lines:])

    def revive(self) -> list[str]:
        """Restart what died since the last look; returns the names. What keeps ending is given up: a worker is left
        out, because serving does not need it; for the others ServerError is raised."""
        dead = [name for name, process in self.processes.items() if process.poll() is not None]
        for name in list(dead):
            code, now = self.processes[name].returncode, time.monotonic()
            self.restarts += 1
            self._restarted[name] = [at for at in self._restarted.get(name, ()) if at > now - RESTARTS_S] + [now]
            if len(self._restarted[name]) > MAX_RESTARTS:
                said = f"{name} keeps ending; see {self.log_file(name)}:\n{self.tail(name)}"
                if name != "worker":
                    raise ServerError(said)
                self.on_event(f"{said}\nserving goes on, nothing is learned")
                del self.processes[name]
                dead.remove(name)
                continue
            last = self.tail(name, 1) or "nothing in its log"
            self.on_event(f"{name} ended with code {code} ({last}); starting it again")
            self.start(name)
        for name in dead:
            try:
                self.wait_until_up(name)
            except CltrainError as error:  # the next look counts it against MAX_RESTARTS
                self.on_event(str(error))
        return dead

    def stop(self, grace_s: float = 10.0) -> None:
        self._is_uncut = True  # to the end: it ends already
        for process in reversed(list(self.processes.values())):
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + grace_s
        for process in self.processes.values():
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.processes.clear()
        if self._catches_sigterm:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            self._catches_sigterm = False
        self._is_uncut = False


def run_until_signal(fleet: Fleet, poll_s: float = 0.5) -> None:
    """Keep the fleet up until SIGTERM or SIGINT."""
    stopping: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda signum, _frame: stopping.append(signum))
    while not stopping:
        fleet.revive()
        time.sleep(poll_s)
