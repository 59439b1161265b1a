"""Replicas in memory that fail as real ones do, and what proves a release on them: log-probs that the path decides."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from cltrain.deploy.client import Answer
from cltrain.deploy.probes import Probes
from cltrain.deploy.proof import Probe
from cltrain.errors import NotHeldError, ServerError, UnavailableError


def says(root: str | Path) -> float:
    """The log-prob, nats, that the weights in that directory give to any token."""
    return -1.0 - zlib.crc32(str(root).encode()) % 1000 / 100


def probes_of(root: str | Path, before: str | Path = "base", was: str = "base") -> Probes:
    pair: Probe = ((1, 2), (3,))
    return Probes((pair,), ((says(root),),), ((says(before),),), ((says("base"),),), was, 1e-3)


class Shelf:
    """A server's adapters in memory. Set what goes wrong; `lies`: name -> directory whose weights answer instead."""

    def __init__(self, url: str = "http://one", *, base: str = "base") -> None:
        self.url, self.model = url, "base"
        self.held: dict[str, str] = {}
        self.lies: dict[str, str] = {}
        self.refuses: set[str] = set()
        self.is_down = False
        self.is_full = False  # there is room for one adapter, but not for another
        self.times_out_after_load = False
        self.loads_late = False  # the next load times out, and takes effect at `land`
        self.late: list[tuple[str, Path]] = []
        self.mounts_wrong = False  # whatever is loaded has other weights than the file
        self.asked: list[str] = []
        self.scored: list[str] = []
        self._base = base

    def restart(self) -> None:
        self.held.clear()
        self.lies.clear()
        self.late.clear()

    def land(self) -> None:
        """Loads that timed out take effect, as far as their files are still there."""
        for name, path in self.late:
            if path.is_dir():
                self.held.setdefault(name, str(path))
        self.late.clear()

    def close(self) -> None:
        pass

    def health(self) -> bool:
        return not self.is_down

    def name_of(self, model: str) -> str:
        return model

    def list(self) -> dict[str, str]:
        self._reach()
        return dict(self.held)

    def load(self, name: str, path: Path) -> None:
        self._reach()
        if self.held.get(name, str(path)) != str(path):
            raise ServerError(f"{self.url} already serves {name} from elsewhere")
        if name not in self.held and (name in self.refuses or (self.is_full and self.held)):
            raise ServerError(f"{self.url} did not load {name}: no")
        if self.loads_late:
            self.loads_late = False
            self.late.append((name, path))
            raise UnavailableError(f"{self.url} did not answer in time")
        self.held[name] = str(path)
        if self.mounts_wrong:
            self.lies[name] = "elsewhere"
        if self.times_out_after_load:
            raise UnavailableError(f"{self.url} did not answer in time")

    def unload(self, name: str) -> None:
        self._reach()
        self.held.pop(name, None)
        self.lies.pop(name, None)

    def generate_many(self, model: str, prompts: Sequence[Any], max_tokens: int, concurrency: int = 16) -> Any:
        root = self._root(model)
        self.asked += [model] * len(prompts)
        message = {"role": "assistant", "content": root}
        return [Answer(message, model, None, None, None, self.url) for _ in prompts]

    def score_many(self, model: str, pairs: Sequence[Probe]) -> Any:
        root = self._root(model)
        self.scored.append(model)
        return [[says(root)] * len(completion) for _, completion in pairs]

    def answer(self, request: httpx.Request) -> httpx.Response:
        """As a transport of the gateway: the text of the answer is the directory whose weights gave it."""
        if self.is_down:
            raise httpx.ConnectError("nobody listens", request=request)
        model = json.loads(request.content)["model"]
        if model != self.model and model not in self.held:
            return httpx.Response(404, json={"error": {"message": f"{model} does not exist"}})
        message = {"role": "assistant", "content": self._root(model)}
        return httpx.Response(200, json={"model": model, "choices": [{"index": 0, "message": message}]})

    def _root(self, model: str) -> str:
        self._reach()
        if model == self.model:
            return self._base
        if model not in self.held:
            raise NotHeldError(f"{self.url} answered 404: {model} does not exist", model)
        return self.lies.get(model, self.held[model])

    def _reach(self) -> None:
        if self.is_down:
            raise UnavailableError(f"{self.url} cannot be reached")
