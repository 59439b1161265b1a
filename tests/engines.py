"""Inference servers that take adapters at run time, each as a process of its own on the shipped base: three real ones
and a stand-in for SGLang."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from cltrain.deploy.client import ServerClient
from cltrain.deploy.sglang import SglangClient
from tests.command import free_port
from tests.serving import TARGETS

ROOT = Path(__file__).parent.parent
EMBEDDED = """
import pathlib, sys
from cltrain.deploy.serve import run_server
run_server(pathlib.Path(sys.argv[1]), "127.0.0.1", int(sys.argv[2]))
"""
VLLM_PYTHON = Path(os.environ.get("CLTRAIN_VLLM_PYTHON") or ROOT / ".venv-vllm/bin/python")
MAX_ADAPTERS = 6


@dataclass(frozen=True)
class Kind:
    """One engine: how it is started on (base directory, port), where, and within how many seconds on a busy machine."""

    name: str
    command: Callable[[Path, int], list[str]]
    environment: Mapping[str, str]
    directory: Path
    start_s: float


def _embedded(base: Path, port: int) -> list[str]:
    return [sys.executable, "-c", EMBEDDED, str(base), str(port)]


def _mistralrs(base: Path, port: int) -> list[str]:
    return [sys.executable, "-m", "tests.mistralrs_server", str(base), str(port)]


def _sglang(base: Path, port: int) -> list[str]:
    return [sys.executable, "-m", "tests.sglang_server", str(base), str(port)]


def _vllm(base: Path, port: int) -> list[str]:
    return [
        str(VLLM_PYTHON), "-m", "vllm.entrypoints.cli.main", "serve", str(base),
        "--served-model-name", "base", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32",
        "--max-model-len", "1024", "--max-num-seqs", "8", "--enforce-eager",
        "--enable-lora", "--max-loras", "4", "--max-lora-rank", "8", "--max-cpu-loras", str(MAX_ADAPTERS),
        "--enable-auto-tool-choice", "--tool-call-parser", "hermes",  # else a request with tools is refused
        # without the head: 0.32 on the CPU dies of prompt_logprobs beside another request when the head may have LoRA
        "--lora-target-modules", *TARGETS,
    ]  # fmt: skip


OURS = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
VLLM = {
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",  # else there are no adapter routes
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "TORCHDYNAMO_DISABLE": "1",  # else the first request for log-probs waits for a C++ compiler
}
ANYWHERE = Path(tempfile.gettempdir())  # not here: vLLM would take our folder kernels/ for Hugging Face's package
KINDS = {
    "embedded": Kind("embedded", _embedded, OURS, ROOT, 240),
    "mistralrs": Kind("mistralrs", _mistralrs, OURS, ROOT, 240),
    "sglang": Kind("sglang", _sglang, OURS, ROOT, 240),
    "vllm": Kind("vllm", _vllm, VLLM, ANYWHERE, 600),
}


class Served:
    """A running engine, its client and its base. Close it when done; a restart keeps the URL and loses the adapters."""

    def __init__(self, kind: Kind, base_dir: Path) -> None:
        self.kind = kind
        self.base_dir = base_dir
        self._port = free_port()
        client = SglangClient if kind.name == "sglang" else ServerClient
        self.client = client(f"http://127.0.0.1:{self._port}", "base")
        self._log = tempfile.NamedTemporaryFile(mode="w+", suffix=f"-{kind.name}.log")  # noqa: SIM115
        self._process: subprocess.Popen[bytes] | None = None
        self._start()

    def restart(self) -> None:
        self._kill()
        self._start()

    def close(self) -> None:
        self.client.close()
        self._kill()
        self._log.close()

    def _start(self) -> None:
        self._process = subprocess.Popen(
            self.kind.command(self.base_dir, self._port),
            cwd=self.kind.directory,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **self.kind.environment},
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        deadline = time.monotonic() + self.kind.start_s
        while not self.client.health():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self._kill()
                raise RuntimeError(f"{self.kind.name} did not start:\n{Path(self._log.name).read_text()[-4000:]}")
            time.sleep(0.1)

    def _kill(self) -> None:
        """SIGTERM, and SIGKILL for the whole process group when that is not enough: vLLM has three processes."""
        if self._process is None:
            return
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process = None
