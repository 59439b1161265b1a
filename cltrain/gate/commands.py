"""Suites that ask and score by themselves: any program, spoken to over stdin and stdout.

One JSON object comes in, JSON lines go out, exit code 0 means that they are all there:

    {"list": true}                                       -> {"id": "q1", "stratum": "maths"} ...
    {"base_url", "model", "ids": ["q1", ...]}            -> {"id": "q1", "score": 0.5} ...

where the server wants a key, with "api_key" beside them.
A listed item may also say `kind` and `version` (whatever changes with its content); a score may repeat the stratum.
The program asks `model` at the OpenAI-compatible `base_url`. A crash or a time-out is a ServerError; scores that are
missing, twice there, outside [0, 1] or of another stratum are a DataError.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cltrain.errors import DataError, ServerError
from cltrain.records import SuiteItem

KINDS = ("gain", "retention", "canary")
MAX_SAID = 400  # characters of stderr that an error repeats


class CommandSuite:
    """A program as a suite. `stratum` and `kind` are those of items that do not say; its files make its `fingerprint`:
    an edited program is another suite to every cache."""

    def __init__(
        self, name: str, words: Sequence[str], *, stratum: str, kind: str, timeout_s: float, content: str
    ) -> None:
        self.name, self.words, self.timeout_s = name, list(words), timeout_s
        self.stratum, self.kind = stratum, kind
        self.fingerprint = hashlib.sha256(json.dumps([self.words, content]).encode()).hexdigest()

    def items(self) -> list[SuiteItem]:
        """What the program can score. Raises DataError when it lists nothing, or something twice."""
        items: dict[str, SuiteItem] = {}
        for row in self._ask({"list": True}):
            own, kind = row.get("id"), row.get("kind", self.kind)
            stratum, version = row.get("stratum", self.stratum), row.get("version", "")
            if not isinstance(own, str) or not own or not isinstance(stratum, str) or not stratum:
                raise DataError(f"suite {self.name} lists {row}: id and stratum must be texts")
            if kind not in KINDS:
                raise DataError(
                    f"suite {self.name} lists {own} with kind {kind!r}; it must be one of {', '.join(KINDS)}"
                )
            if own in items:
                raise DataError(f"suite {self.name} lists {own} twice")
            rule = {"id": own, "version": str(version), "program": self.fingerprint}
            items[own] = SuiteItem(f"{self.name}/{own}", self.name, stratum, kind, (), scorer="program", rule=rule)
        if not items:
            raise DataError(f"the suite {self.name} holds no items: {self._shown()} listed none")
        return list(items.values())

    def score(self, base_url: str, model: str, items: Sequence[SuiteItem], api_key: str | None = None) -> list[float]:
        """Scores in [0, 1] of the model's answers, in the order of the items."""
        wanted = {item.rule["id"]: item for item in items}
        request: dict[str, Any] = {"base_url": base_url, "model": model, "ids": list(wanted)}
        if api_key is not None:  # never among the words of the command, which everybody on the machine can read
            request["api_key"] = api_key
        scores: dict[str, float] = {}
        for row in self._ask(request):
            own, score = row.get("id"), row.get("score")
            if not isinstance(own, str) or own not in wanted:
                raise DataError(f"suite {self.name} scored {own!r}, which it was not asked for")
            if own in scores:
                raise DataError(f"suite {self.name} scored {own} twice: {scores[own]} and {score}")
            if row.get("stratum", wanted[own].stratum) != wanted[own].stratum:
                raise DataError(
                    f"suite {self.name} listed {own} in {wanted[own].stratum}, then scored it in {row['stratum']}"
                )
            scores[own] = _number(score, f"suite {self.name} gave {own} the score")
        missing = [own for own in wanted if own not in scores]
        if missing:
            raise DataError(f"suite {self.name} left {len(missing)} of {len(wanted)} items unscored: {missing[:5]}")
        return [scores[own] for own in wanted]

    def _ask(self, request: dict[str, Any]) -> list[dict[str, Any]]:
        rows = []
        for line in self._run(json.dumps(request) + "\n").splitlines():
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict):
                raise DataError(
                    f"suite {self.name} printed {line[:200]!r}: only JSON objects, one a line, belong on stdout"
                )
            rows.append(row)
        return rows

    def _run(self, request: str) -> str:
        try:
            process = subprocess.Popen(
                self.words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                encoding="utf-8", errors="replace", start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise DataError(f"suite {self.name}: {self._shown()} cannot be started: {error}") from None
        try:
            said, complained = process.communicate(request, timeout=self.timeout_s)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)  # not reaped yet; what it started must not outlive it either
            process.wait()
            if isinstance(error, subprocess.TimeoutExpired):
                why = f"did not end within {self.timeout_s:g} s (timeout_s)"
                raise ServerError(f"suite {self.name}: {self._shown()} {why}") from None
            raise
        if process.returncode != 0:
            why = complained.strip()[-MAX_SAID:]
            raise ServerError(f"suite {self.name}: {self._shown()} ended with exit code {process.returncode}: {why}")
        return said

    def _shown(self) -> str:
        return " ".join(self.words)[:200]


def content_of(path: Path) -> str:
    """sha256 (hex) of a file, as sha256sum prints it; of a folder, over the names and contents of all its files."""
    path = path.expanduser()
    if path.is_file():
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    whole = hashlib.sha256()
    for file in sorted(path.rglob("*")):
        if file.is_file():
            whole.update(f"{file.relative_to(path).as_posix()}\0{content_of(file)}\n".encode())
    return whole.hexdigest()


def _number(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or not 0 <= value <= 1:
        raise DataError(f"{what} {value!r}: it must be a number in [0, 1]")
    return float(value)
