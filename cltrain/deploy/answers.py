"""From token steps to what OpenAI clients read: text, tool calls, log-probs, choices and chunks. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cltrain.models.toolcalls import parse_answer
from cltrain.records import Message

if TYPE_CHECKING:
    from cltrain.deploy.engine import Delta
    from cltrain.deploy.sampling import Token

TOOL_MARKS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
OPEN_MARK = TOOL_MARKS[0]
LOWEST_LOGPROB = -9999.0  # JSON has no infinity; vLLM's floor


class Words:
    """Token ids to text. Special tokens do not show, except the marks of tool calls."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        special = set(tokenizer.all_special_ids) | {i for i, token in added.items() if token.special}
        self._hidden = special - {i for i, token in added.items() if token.content in TOOL_MARKS}
        self._single: dict[int, str] = {}

    def shows(self, token: int) -> bool:
        return token not in self._hidden

    def text(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def single(self, token: int) -> str:
        """The text of one token alone, as log-probs show it; also of special ones."""
        if token not in self._single:
            self._single[token] = self.text([token])
        return self._single[token]


class Answer:
    """One choice as it grows: tokens in, text out, cut at a stop string, tool calls taken out of it at the end."""

    def __init__(
        self, words: Words, *, stops: tuple[str, ...] = (), has_tools: bool = False, call_prefix: str = "call"
    ) -> None:
        self._words = words
        self._stops, self._has_tools, self._call_prefix = stops, has_tools, call_prefix
        self._shown: list[int] = []
        self._begin = self._end = 0  # ids[_begin:_end] are in the text; decoded again as the next one's context
        self._num_sent = 0
        self.text = ""
        self.tokens: list[Token] = []
        self.finish: str | None = None
        self.error: str | None = None
        self.prompt: tuple[Token | None, ...] | None = None

    @property
    def is_done(self) -> bool:
        return self.finish is not None or self.error is not None

    def push(self, delta: Delta) -> None:
        """Take a step in. Afterwards `is_done` may hold because of a stop string: then the row must be cancelled."""
        self.tokens += delta.tokens
        self._shown += [token.id for token in delta.tokens if self._words.shows(token.id)]
        self._decode(is_last=delta.is_last)
        self.finish, self.error, self.prompt = delta.finish, delta.error, delta.prompt
        cuts = [cut for stop in self._stops if (cut := self.text.find(stop)) >= 0]
        if cuts:
            self.text, self.finish, self.error = self.text[: min(cuts)], "stop", None

    def take(self) -> str:
        """Content that may go out now and has not yet: never part of a stop string or of a tool call."""
        content = self.text
        if self.is_done:
            content = str(self.message()["content"] or "")
        else:
            hold = max((len(stop) for stop in self._stops), default=1) - 1
            content = content[: len(content) - hold]
            if self._has_tools:
                content = _before_calls(content)
        piece = content[self._num_sent :]
        self._num_sent += len(piece)
        return piece

    def message(self) -> Message:
        if self._has_tools:
            return parse_answer(self.text, id_prefix=self._call_prefix)
        return {"role": "assistant", "content": self.text}

    def _decode(self, *, is_last: bool) -> None:
        if self._end == len(self._shown):
            return
        known = self._words.text(self._shown[self._begin : self._end])
        longer = self._words.text(self._shown[self._begin :])
        if longer.endswith("�") and not is_last:
            return  # half a character: wait for the rest
        self.text += longer[len(known) :]
        self._begin, self._end = self._end, len(self._shown)


def _before_calls(text: str) -> str:
    """The beginning of an unfinished answer that is content for certain, stripped as `parse_answer` strips it."""
    cut = text.find(OPEN_MARK)
    if cut < 0:
        cut = len(text)
        for length in range(min(len(OPEN_MARK) - 1, len(text)), 0, -1):
            if OPEN_MARK.startswith(text[-length:]):
                cut -= length
                break
    return text[:cut].strip()


def chat_logprobs(words: Words, tokens: Sequence[Token]) -> dict[str, Any]:
    def entry(token: int, logprob: float) -> dict[str, Any]:
        text = words.single(token)
        return {"token": text, "logprob": max(logprob, LOWEST_LOGPROB), "bytes": list(text.encode())}

    return {
        "content": [
            {**entry(token.id, token.logprob), "top_logprobs": [entry(i, logprob) for i, logprob in token.top]}
            for token in tokens
        ]
    }


def completion_logprobs(words: Words, tokens: Sequence[Token], offset: int = 0) -> dict[str, Any]:
    texts = [words.single(token.id) for token in tokens]
    offsets = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    return {
        "tokens": texts,
        "token_logprobs": [max(token.logprob, LOWEST_LOGPROB) for token in tokens],
        "top_logprobs": [{words.single(i): max(lp, LOWEST_LOGPROB) for i, lp in token.top} or None for token in tokens],
        "text_offset": offsets,
    }


def prompt_logprobs(words: Words, scores: Sequence[Token | None] | None) -> list[dict[str, Any] | None] | None:
    """vLLM's form: None for the first token, then {token id: {logprob, rank, decoded_token}}."""
    if scores is None:
        return None
    found: list[dict[str, Any] | None] = []
    for token in scores:
        if token is None:
            found.append(None)
            continue
        ranked = {i: (logprob, place) for place, (i, logprob) in enumerate(token.top, 1)}
        ranked[token.id] = (token.logprob, token.rank or 1)
        found.append(
            {
                str(i): {"logprob": max(lp, LOWEST_LOGPROB), "rank": rank, "decoded_token": words.single(i)}
                for i, (lp, rank) in ranked.items()
            }
        )
    return found
