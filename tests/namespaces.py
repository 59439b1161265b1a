"""Machines on one machine: servers in network namespaces of their own, whose cable can be pulled."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from cltrain.deploy.client import ServerClient

PORT = 8101
START_S = 900.0  # a busy machine loads the base slowly


def why_not() -> str | None:
    """Why no namespace can be made here; None where one can."""
    if shutil.which("ip") is None:
        return "needs the command ip (iproute2)"
    if os.geteuid() != 0:
        return "needs root: only root makes network namespaces"
    name = f"clt-{os.getpid()}-try"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode != 0:
        return f"no network namespace can be made here: {made.stderr.strip()}"
    _ip("netns", "del", name)
    return None


@dataclass(frozen=True)
class Machine:
    """A namespace with one cable to this one."""

    name: str
    address: str

    @property
    def url(self) -> str:
        return f"http://{self.address}:{PORT}"

    def cut(self) -> None:
        """Packets vanish from now on, in both directions; nobody is told."""
        _ip("-n", self.name, "link", "set", "eth0", "down")

    def heal(self) -> None:
        _ip("-n", self.name, "link", "set", "eth0", "up")


@contextmanager
def machine(letter: str, octet: int) -> Iterator[Machine]:
    """A namespace at 198.18.`octet`.2 (a range for tests), with this side at .1; gone when the block ends."""
    name, cable = f"clt-{os.getpid()}-{letter}", f"clt{os.getpid() % 100000}{letter}"
    with ExitStack() as stack:
        _ip("netns", "add", name)
        stack.callback(_ip, "netns", "del", name)
        _ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", name)
        stack.callback(subprocess.run, ["ip", "link", "del", cable], capture_output=True)  # it goes with its peer
        _ip("addr", "add", f"198.18.{octet}.1/30", "dev", cable)
        _ip("link", "set", cable, "up")
        _ip("-n", name, "addr", "add", f"198.18.{octet}.2/30", "dev", "eth0")
        _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", name, "link", "set", "eth0", "up")
        yield Machine(name, f"198.18.{octet}.2")


@contextmanager
def server_in(where: Machine, home: Path) -> Iterator[None]:
    """The embedded server as a process there; its `home` is its own, so it starts without adapters, as vLLM does."""
    words = ["run", "--only=server", f"--home={home}", f"--set=server.host={where.address}"]
    command = ["ip", "netns", "exec", where.name, sys.executable, "-m", "cltrain", *words, f"--set=server.port={PORT}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + START_S
        with ServerClient(where.url, "base") as client:
            while not client.health():
                assert process.poll() is None, "the server ended at its start"
                assert time.monotonic() < deadline, "the server did not start"
                time.sleep(0.2)
        yield
    finally:
        process.kill()
        process.wait()


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)
