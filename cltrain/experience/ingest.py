"""Past episodes from a file: OpenAI-style message JSONL with tool calls and rewards, every line accounted for.

A line becomes a record, is a duplicate, or is set aside with its reason. Nothing is guessed: no tools in the file means
that none are known; no `model` and no given producer, that nobody knows who wrote the answers: none is learned from.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter, deque
from collections.abc import Callable, Collection
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from cltrain.errors import BAD_CONTENT, ConflictError, DataError, guarded
from cltrain.experience.examples import OURS, first_tool, score_of_reward
from cltrain.experience.exchanges import Told, unfold
from cltrain.experience.lines import MAX_LINE_BYTES, digest_of, lines_of, opened
from cltrain.experience.recording import Recorder
from cltrain.experience.rows import TOLD
from cltrain.experience.strict_json import is_unicode, loads
from cltrain.experience.verify import arguments_of, text_of, tool_fault
from cltrain.records import Example, Feedback, Generation, Message, Trajectory

P = ParamSpec("P")
T = TypeVar("T")

MAX_NAMED = 20  # lines set aside that the report names; all are in the store
MAX_PENDING = 256  # lines between reading and their commit
MAX_SECONDS = 1e11  # beyond it a time is in milliseconds, or none
PRODUCERS = {"user": "user", "system": "system", "developer": "system", "tool": "tool"}


@dataclass(frozen=True, slots=True)
class ImportReport:
    """What became of a file's lines: num_lines = num_imported + num_duplicates + num_set_aside; blank ones aside."""

    num_lines: int
    num_imported: int
    num_duplicates: int
    num_set_aside: int
    num_blank: int
    num_positive: int  # imported with a reward above failure
    num_without_reward: int
    num_without_tools: int  # imported without tool definitions
    num_without_author: int  # imported, and nobody said who wrote the last answer
    reasons: dict[str, int]  # why lines were set aside, and how often
    set_aside: tuple[dict[str, Any], ...]  # the first of them: {line, reason}


class _Refused(Exception):
    """Why a line is no episode; `detail` goes to the set-aside copy only."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


def import_file(
    recorder: Recorder,
    file: Path,
    agent: str,
    *,
    producer: str | None = None,
    releases: Collection[str] = (),
    clock: Callable[[], float] = time.time,
) -> ImportReport:
    """Import a JSONL file of {id, messages, tools?, reward | score, model?, session?, principal?, created_at?}, or of
    {request, response, ...} (see `exchanges`): of those only the answer itself is the producer's. Where the producer is
    the agent and one of its `releases` answered, its tokens and log-probs are kept as if the gateway had recorded them.
    {prompt, chosen, rejected, ...} with messages, as TRL has it, is an episode that ended with the rejected answer, and
    the chosen one as its correction: both are the producer's.

    `reward` is in [0, 1] (0 failure, 1 success), `score` in [-1, 1] (above 0 success). The answers' producer is
    `producer`, else the line's `model`, which may not be a word that is trusted here (`OURS`): that the owner's agent
    wrote a log is for the owner to say, not for the file. Without `principal` a line's is `import:<file stem>`: one
    file is one source. A line whose id is stored is a duplicate if it says the same, else set aside; so importing again
    changes nothing, but that a producer given now is that of answers whose was unknown.
    Set-aside lines are kept in the store, of lines over 16 MiB the first 64 KiB. Raises DataError for a file that
    cannot be read or is UTF-16.
    """
    source = f"{file.name}:{digest_of(file)[:12]}"
    tally = _Tally(agent)
    pending: deque[tuple[int, bytes, Trajectory, Future[bool]]] = deque()
    seen: dict[str, bytes] = {}
    with opened(file) as stream:
        for number, raw, size in lines_of(stream):
            if not raw.strip():
                tally.num_blank += 1
                continue
            tally.num_lines += 1
            try:
                if size > MAX_LINE_BYTES:
                    raise _Refused("line too long", f"{size} bytes, at most {MAX_LINE_BYTES}")
                trajectory = _read(_trajectory, raw, agent, producer, f"import:{file.stem}", clock(), releases)
                content = hashlib.sha256(repr(_comparable(trajectory)).encode()).digest()
                if seen.setdefault(trajectory.id, content) != content:
                    raise _Refused("id already used in this file for another episode", trajectory.id)
                pending.append((number, raw, trajectory, recorder.submit_trajectory(trajectory)))
            except _Refused as refusal:
                tally.set_aside(recorder, source, number, refusal, raw, clock())
            while len(pending) > MAX_PENDING:
                _settle(recorder, source, pending.popleft(), tally, clock())
    while pending:
        _settle(recorder, source, pending.popleft(), tally, clock())
    return tally.report()


def read_rehearsal(file: Path) -> list[Example]:
    """The owner's own episodes as examples for replay: every answer in them is a target.

    Raises DataError naming the first line that is no episode: unlike a log, this file is meant to be right.
    """
    examples = []
    with opened(file) as stream:
        for number, raw, _ in lines_of(stream):
            if not raw.strip():
                continue
            try:
                examples.append(_read(_rehearsed, raw))
            except _Refused as refusal:
                raise DataError(f"{file.name} line {number}: {refusal}") from None
    return examples


def _rehearsed(raw: bytes) -> Example:
    trajectory = _trajectory(raw, "", "rehearsal", "rehearsal", 0.0)
    answers = [(k, m) for k, m in enumerate(trajectory.messages) if m["role"] == "assistant"]
    targets = tuple(k for k, message in answers if text_of(message) or message.get("tool_calls"))
    if not targets:
        raise _Refused("every answer is empty")
    return Example(
        record=f"rehearsal:{trajectory.id}",
        principal="rehearsal",
        stratum=f"{first_tool(trajectory.messages[k] for k in targets)}/good",
        messages=trajectory.messages[: targets[-1] + 1],
        targets=targets,
        tools=trajectory.tools,
        kind="rehearsal",
    )


class _Tally:
    """Counts while a file is read."""

    def __init__(self, agent: str) -> None:
        self.agent = agent
        self.num_lines = self.num_blank = self.num_imported = self.num_duplicates = 0
        self.num_positive = self.num_without_reward = self.num_without_tools = self.num_without_author = 0
        self.reasons: Counter[str] = Counter()
        self.first: list[tuple[int, str]] = []

    def set_aside(
        self, recorder: Recorder, source: str, number: int, refusal: _Refused, raw: bytes, now: float
    ) -> None:
        self.reasons[refusal.reason] += 1
        self.first = sorted([*self.first, (number, str(refusal))])[:MAX_NAMED]
        recorder.set_aside(self.agent, source, number, str(refusal), raw, now=now).result()

    def stored(self, trajectory: Trajectory, is_new: bool) -> None:
        if not is_new:
            self.num_duplicates += 1
            return
        self.num_imported += 1
        score = trajectory.feedback[0].score if trajectory.feedback else None
        self.num_positive += score is not None and score > 0
        self.num_without_reward += score is None
        self.num_without_tools += not trajectory.tools
        answers = (k for k, message in enumerate(trajectory.messages) if message["role"] == "assistant")
        self.num_without_author += trajectory.producers[max(answers)] is None

    def report(self) -> ImportReport:
        return ImportReport(
            num_lines=self.num_lines,
            num_imported=self.num_imported,
            num_duplicates=self.num_duplicates,
            num_set_aside=sum(self.reasons.values()),
            num_blank=self.num_blank,
            num_positive=self.num_positive,
            num_without_reward=self.num_without_reward,
            num_without_tools=self.num_without_tools,
            num_without_author=self.num_without_author,
            reasons=dict(self.reasons),
            set_aside=tuple({"line": number, "reason": reason} for number, reason in self.first),
        )


def _settle(
    recorder: Recorder, source: str, line: tuple[int, bytes, Trajectory, Future[bool]], tally: _Tally, now: float
) -> None:
    number, raw, trajectory, future = line
    try:
        tally.stored(trajectory, future.result())
    except ConflictError as error:
        tally.set_aside(recorder, source, number, _Refused("conflicts with what is stored", str(error)), raw, now)
    except BAD_CONTENT as error:
        tally.set_aside(recorder, source, number, _Refused("cannot be stored", str(error)[:200]), raw, now)


# ---------------------------------------------------------------- one line


def _read(reader: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What `reader` makes of a line. Raises _Refused, also for content that defeats it."""
    found = guarded(reader, *args, **kwargs)
    if isinstance(found, str):
        raise _Refused(*found.split(": ", 1))
    return found


def _trajectory(
    raw: bytes, agent: str, producer: str | None, principal: str, now: float, releases: Collection[str] = ()
) -> Trajectory:
    line = _object(raw)
    told: Told | None = None
    if "request" in line:
        try:
            line, told = unfold(line)
        except ValueError as error:
            raise _Refused("no request with its answer", str(error)) from None
    chosen: Message | None = None
    if "chosen" in line:
        line, chosen = _pair(line)
    messages = _messages(line.get("messages"))
    author = producer if producer is not None else _author(line)
    identifier = _identifier(line, raw)
    created_at = line.get("created_at", now)
    if isinstance(created_at, bool) or not isinstance(created_at, int | float) or not 0 <= created_at < MAX_SECONDS:
        raise _Refused("`created_at` is not a number of seconds since 1970")
    created_at = float(created_at)
    score = _score(line)
    given = Feedback(id=f"{identifier}:reward", target=identifier, score=score, source="import", created_at=created_at)
    feedback = [] if score is None else [given]
    if chosen is not None:
        if author is None:
            raise _Refused("nobody said who wrote the answers of a pair", "see --producer")
        feedback.append(replace(given, id=f"{identifier}:chosen", score=None, correction=chosen, source=author))
    last = len(messages) - 1
    generations: tuple[Generation, ...] = ()
    if told is not None and producer == "agent" and told.model in releases:
        ids = (told.prompt_ids, told.completion_ids, told.logprobs)
        answer = Generation(f"{identifier}:answer", identifier, last, told.model, *ids, told.finish_reason)
        generations = (answer,)
    return Trajectory(
        id=identifier,
        agent=agent,
        session=_text(line, "session") or identifier,
        principal=_text(line, "principal") or principal,
        messages=messages,
        producers=tuple(
            PRODUCERS[m["role"]] if m["role"] != "assistant" else None if told and k < last else author
            for k, m in enumerate(messages)
        ),
        tools=_tools(line.get("tools")),
        generations=generations,
        feedback=tuple(feedback),
        release=generations[0].release if generations else None,
        created_at=created_at,
    )


def _pair(line: dict[str, Any]) -> tuple[dict[str, Any], Message]:
    """The line as the episode that ended with the rejected answer, and the chosen one."""
    if not isinstance(line.get("prompt"), list):
        raise _Refused("a pair's `prompt` is not a list of messages")
    answers = {key: _messages(line.get(key)) for key in ("chosen", "rejected")}
    if any([message["role"] for message in messages] != ["assistant"] for messages in answers.values()):
        raise _Refused("a pair's `chosen` and `rejected` are not one answer of the assistant each")
    return {**line, "messages": [*line["prompt"], *answers["rejected"]]}, answers["chosen"][0]


def _author(line: dict[str, Any]) -> str | None:
    model = _text(line, "model")
    if model in OURS:
        raise _Refused("`model` is a producer that only this deployment itself may be", f"{model!r}; see --producer")
    return model


def _comparable(trajectory: Trajectory) -> tuple[object, ...]:
    """What makes two lines with one id the same episode."""
    ids = {f"{trajectory.id}:{name}" for name in TOLD}
    given = [(f.score, f.correction) for f in trajectory.feedback if f.id in ids]
    return trajectory.messages, trajectory.tools, trajectory.producers, trajectory.session, trajectory.principal, given


def _object(raw: bytes) -> dict[str, Any]:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _Refused("not valid UTF-8", f"byte {error.start}") from None
    try:
        line = loads(text)
    except ValueError as error:
        raise _Refused("not valid JSON", str(error)) from None
    if not is_unicode(line):
        raise _Refused("has a lone surrogate, which is no text")
    if not isinstance(line, dict):
        raise _Refused("not a JSON object")
    return line


def _identifier(line: dict[str, Any], raw: bytes) -> str:
    given = line.get("id")
    if given is None:
        return f"import-{hashlib.sha256(raw).hexdigest()[:24]}"
    if isinstance(given, bool) or not isinstance(given, str | int) or not str(given).strip():
        raise _Refused("`id` is neither text nor a whole number")
    return str(given)


def _text(line: dict[str, Any], key: str) -> str | None:
    value = line.get(key)
    if value is not None and not isinstance(value, str):
        raise _Refused(f"`{key}` is not text")
    return value or None


def _score(line: dict[str, Any]) -> float | None:
    key = "reward" if line.get("reward") is not None else "score"
    value = line.get(key)
    if value is None:
        return None
    least = 0 if key == "reward" else -1
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not least <= value <= 1:
        raise _Refused(f"`{key}` is not a number in [{least}, 1]")
    return score_of_reward(value) if key == "reward" else float(value)


def _messages(value: Any) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise _Refused("has no `messages`")
    for index, message in enumerate(value):
        if not isinstance(message, dict) or message.get("role") not in (*PRODUCERS, "assistant"):
            raise _Refused("a message has no known role", f"message {index}")
        content = message.get("content")
        parts = content if isinstance(content, list) else []
        if not (content is None or isinstance(content, str | list)) or not all(isinstance(p, dict) for p in parts):
            raise _Refused("a message's content is neither text nor parts", f"message {index}")
        if message.get("tool_calls"):
            message["tool_calls"] = _calls(message["tool_calls"], index)
    if not any(message["role"] == "assistant" for message in value):
        raise _Refused("has no answer of the assistant")
    return tuple(value)


def _calls(calls: Any, index: int) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise _Refused("`tool_calls` is not a list", f"message {index}")
    read = []
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise _Refused("a tool call has no function name", f"message {index}")
        if isinstance(function.get("arguments"), dict):  # written as an object: the API's form is a string
            function = {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}
        reason = arguments_of({"function": function})
        if isinstance(reason, str):
            raise _Refused("a tool call's arguments are no JSON object", f"message {index}: {reason}")
        read.append({**call, "function": function})
    return read


def _tools(value: Any) -> tuple[dict[str, Any], ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or any(map(tool_fault, value)):
        raise _Refused("`tools` is not a list of function definitions")
    return tuple(value)
