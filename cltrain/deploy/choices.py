"""Choices and stream chunks as OpenAI and vLLM write them. Imports no torch."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

from cltrain.deploy.answers import Answer, Words, chat_logprobs, completion_logprobs, prompt_logprobs
from cltrain.deploy.flight import Flight
from cltrain.deploy.protocol import ApiError, ChatBody, CompletionBody


def usage(num_prompt: int, answers: Sequence[Answer]) -> dict[str, int]:
    num_completion = sum(len(answer.tokens) for answer in answers)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_completion,
        "total_tokens": num_prompt + num_completion,
    }


def chat_choice(words: Words, body: ChatBody, index: int, answer: Answer) -> dict[str, Any]:
    message = answer.message()
    choice: dict[str, Any] = {
        "index": index,
        "message": message,
        "logprobs": chat_logprobs(words, answer.tokens) if body.logprobs else None,
        "finish_reason": "tool_calls" if message.get("tool_calls") else answer.finish,
    }
    if body.return_token_ids:
        choice["token_ids"] = [token.id for token in answer.tokens]
    return choice


def completion_choice(
    words: Words, body: CompletionBody, index: int, answer: Answer, prompt_ids: list[int]
) -> dict[str, Any]:
    choice: dict[str, Any] = {
        "index": index,
        "text": answer.text,
        "logprobs": completion_logprobs(words, answer.tokens) if body.logprobs is not None else None,
        "finish_reason": answer.finish,
    }
    if body.prompt_logprobs is not None:
        choice["prompt_logprobs"] = prompt_logprobs(words, answer.prompt)
    if body.return_token_ids:
        choice |= {"prompt_token_ids": prompt_ids, "token_ids": [token.id for token in answer.tokens]}
    return choice


async def chat_events(
    flight: Flight, words: Words, body: ChatBody, prompt_ids: list[int], head: dict[str, Any]
) -> AsyncIterator[dict[str, Any]]:
    head = {**head, "object": "chat.completion.chunk"}
    for index in range(len(flight.answers)):
        opening = {
            "index": index,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }
        ids = {"prompt_token_ids": prompt_ids} if body.return_token_ids else {}
        yield {**head, "choices": [opening], **ids}
    async for index, step in flight.steps():
        answer = flight.answers[index]
        if answer.error is not None:
            yield ApiError(500, answer.error, "InternalServerError").body
            return
        delta: dict[str, Any] = {}
        if piece := answer.take():
            delta["content"] = piece
        calls = answer.message().get("tool_calls") if answer.is_done else None
        if calls:
            delta["tool_calls"] = [{"index": place, **call} for place, call in enumerate(calls)]
        choice: dict[str, Any] = {
            "index": index,
            "delta": delta,
            "logprobs": chat_logprobs(words, step.tokens) if body.logprobs else None,
            "finish_reason": "tool_calls" if calls else answer.finish,
        }
        if body.return_token_ids:
            choice["token_ids"] = [token.id for token in step.tokens]
        if delta or answer.is_done or body.logprobs or body.return_token_ids:
            yield {**head, "choices": [choice]}
    if body.stream_options and body.stream_options.include_usage:
        yield {**head, "choices": [], "usage": usage(len(prompt_ids), flight.answers)}


async def completion_events(
    flight: Flight, words: Words, body: CompletionBody, prompts: list[list[int]], head: dict[str, Any]
) -> AsyncIterator[dict[str, Any]]:
    offsets = [0] * len(prompts)
    has_begun = [False] * len(prompts)
    async for index, step in flight.steps():
        answer = flight.answers[index]
        if answer.error is not None:
            yield ApiError(500, answer.error, "InternalServerError").body
            return
        piece = answer.take()
        choice: dict[str, Any] = {"index": index, "text": piece, "logprobs": None, "finish_reason": answer.finish}
        if body.logprobs is not None:
            choice["logprobs"] = completion_logprobs(words, step.tokens, offsets[index])
            offsets[index] += sum(len(words.single(token.id)) for token in step.tokens)
        if body.return_token_ids:
            choice["token_ids"] = [token.id for token in step.tokens]
            if not has_begun[index]:
                choice["prompt_token_ids"] = prompts[index]
                has_begun[index] = True
        if piece or answer.is_done or body.logprobs is not None or body.return_token_ids:
            yield {**head, "choices": [choice]}
    if body.stream_options and body.stream_options.include_usage:
        num_prompt = sum(map(len, prompts[:: body.n]))
        yield {**head, "choices": [], "usage": usage(num_prompt, flight.answers)}
