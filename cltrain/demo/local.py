"""An inference server without a server: the embedded engine in this process, behind the client's methods.

For benches that ask millions of tokens of small models, where HTTP would be most of the time.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from cltrain.deploy.answers import Words
from cltrain.deploy.client import AllScores, Answer, Answers, Scores, ServerClient
from cltrain.deploy.engine import Delta, Engine, Row
from cltrain.deploy.sampling import Sampling, Token
from cltrain.errors import ServerError
from cltrain.models.base import Base
from cltrain.models.chat import render_prompt
from cltrain.models.toolcalls import parse_answer
from cltrain.records import Message, Tool

Deltas = list[Delta]  # named here because the class hides the built-in


class LocalServer(ServerClient):
    """Owns an engine over `base`, whose model it hooks: nothing else may use that copy."""

    def __init__(self, base: Base, *, max_batch: int, max_adapters: int) -> None:
        self.url, self.model = "local", "base"
        self._base, self._words = base, Words(base.tokenizer)
        self._engine = Engine(base, max_batch=max_batch, max_adapters=max_adapters)

    def close(self) -> None:
        self._engine.close()

    def health(self) -> bool:
        return self._engine.is_alive

    def list(self) -> dict[str, str]:
        return {name: str(root) for name, root in self._engine.adapters.loaded().items()}

    def load(self, name: str, path: Path) -> None:
        if self.list().get(name) != str(path):
            self._engine.adapters.load(name, path)

    def unload(self, name: str) -> None:
        if name in self.list():
            self._engine.adapters.unload(name)

    def generate_many(
        self,
        model: str,
        prompts: Sequence[tuple[Sequence[Message], Sequence[Tool]]],
        max_tokens: int,
        concurrency: int = 16,
    ) -> Answers:
        """Greedy answers in the order of the prompts."""
        ids = [tuple(render_prompt(self._base.tokenizer, messages, tools)) for messages, tools in prompts]
        ended = self._run(model, ids, Sampling(max_tokens=max_tokens))
        return [self._answer(model, prompt, delta) for prompt, delta in zip(ids, ended, strict=True)]

    def score_many(self, model: str, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> AllScores:
        """The log-prob that the model gives to each completion token, for many (prompt ids, completion ids)."""
        ids = [(*prompt, *completion) for prompt, completion in pairs]
        ended = self._run(model, ids, Sampling(max_tokens=1, num_prompt_top=0))
        return [_scores(delta, len(prompt)) for delta, (prompt, _) in zip(ended, pairs, strict=True)]

    def _run(self, model: str, prompts: Sequence[tuple[int, ...]], sampling: Sampling) -> Deltas:
        adapter = self._engine.adapters.resolve(model)
        ended: dict[int, Delta] = {}
        all_ended = threading.Semaphore(0)

        def keep(index: int, delta: Delta) -> None:
            ended[index] = delta
            all_ended.release()

        for index, prompt in enumerate(prompts):
            self._engine.submit(Row(prompt, sampling, adapter, partial(keep, index)))
        for _ in prompts:
            all_ended.acquire()
        for delta in ended.values():
            if delta.error is not None:
                raise ServerError(delta.error)
        return [ended[index] for index in range(len(prompts))]

    def _answer(self, model: str, prompt: tuple[int, ...], delta: Delta) -> Answer:
        shown = [token.id for token in delta.tokens if self._words.shows(token.id)]
        return Answer(
            message=parse_answer(self._words.text(shown)),
            model=model,
            prompt_ids=prompt,
            completion_ids=tuple(token.id for token in delta.tokens),
            logprobs=tuple(token.logprob for token in delta.tokens),
            finish_reason=delta.finish,
        )


def _scores(delta: Delta, num_prompt: int) -> Scores:
    assert delta.prompt is not None
    found: list[Token | None] = list(delta.prompt[num_prompt:])
    return [token.logprob for token in found if token is not None]
