"""Messages to token ids through the base's own chat template, and examples to training rows.

Official templates have no generation marker, so a target's tokens are the difference between two renderings: before
the turn (with the generation prompt) and after it. Nothing is ever cut to fit.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from cltrain.errors import BAD_CONTENT, DataError
from cltrain.records import Example, Message, TokenRow, Tool

HINT = "\n\n(A reviewer said of an earlier answer to this: {hint})"


def render_prompt(tokenizer: Any, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> list[int]:
    """Token ids of the conversation, ending where the assistant's next answer begins.

    Raises DataError when the base has no chat template or the template refuses the messages.
    """
    return _encode(tokenizer, _render(tokenizer, messages, tools, is_prompt=True))


def render_example(tokenizer: Any, context: int, example: Example) -> TokenRow:
    """One training row: weight `example.weight` on the tokens of the target turns (with the token that ends each), 0
    on all others. Recorded ids are used where present, never a re-render.

    Raises DataError: no template, a template that rewrites earlier turns, nothing to learn, or more than `context`
    tokens (stating both numbers).
    """
    if example.prompt_ids is not None and example.completion_ids is not None:
        ids = [*example.prompt_ids, *example.completion_ids]
        weights = [0.0] * len(example.prompt_ids) + [example.weight] * len(example.completion_ids)
    else:
        ids, weights = _render_targets(tokenizer, example)
    if len(ids) > context:
        raise DataError(f"record {example.record} has {len(ids)} tokens; the base takes {context} (base.context)")
    if not any(weights):
        raise DataError(f"record {example.record} has no token to learn from")
    return TokenRow(
        example.record, example.stratum, example.principal, tuple(ids), tuple(weights), example.objective,
        example.value, example.behaviour,
    )  # fmt: skip


def render_rows(tokenizer: Any, context: int, example: Example) -> tuple[TokenRow, ...]:
    """As `render_example`, but where the template rewrites earlier turns (Qwen3 drops old thoughts): one row per
    target, weights divided by their number so that the episode counts the same. A `dpo` row has the rejected answer as
    its partner; a `hindsight` row, always of one target, its own answer behind the prompt that holds the hint. Raises
    UnfitPartner where only that cannot be rendered.
    """
    if example.objective in ("dpo", "hindsight"):
        return tuple(_with_partner(tokenizer, context, part) for part in _parts(example))
    try:
        return (render_example(tokenizer, context, example),)
    except RewrittenTurns:
        return tuple(render_example(tokenizer, context, part) for part in _parts(example))


class RewrittenTurns(DataError):
    """The template renders an earlier turn differently once later turns follow."""


class UnfitPartner(DataError):
    """What a row is to be compared with is too long for the base or cannot be rendered; the row itself is neither."""


def _parts(example: Example) -> list[Example]:
    """One example per target, with the others as its context."""
    if len(example.targets) == 1:
        return [example]
    return [
        replace(
            example, messages=example.messages[: target + 1], targets=(target,),
            weight=example.weight / len(example.targets), prompt_ids=None, completion_ids=None,
        )
        for target in example.targets
    ]  # fmt: skip


def _with_partner(tokenizer: Any, context: int, example: Example) -> TokenRow:
    row = render_example(tokenizer, context, example)
    make, name = (_rejected, "rejected answer") if example.objective == "dpo" else (_hinted, "hinted self")
    try:
        return replace(row, partner=make(tokenizer, context, example, row))
    except DataError as error:
        raise UnfitPartner(f"its {name} does not fit: {error}") from None


def _rejected(tokenizer: Any, context: int, example: Example, row: TokenRow) -> TokenRow:
    assert example.rejected is not None
    (turn,) = example.targets
    other = replace(example, messages=(*example.messages[:turn], example.rejected), objective="sft")
    return render_example(tokenizer, context, other)


def _hinted(tokenizer: Any, context: int, example: Example, row: TokenRow) -> TokenRow:
    """The student's answer ids behind both prompts, so that teacher and student speak of the same tokens.

    The hint ends the last message of the user: templates that want turns to alternate refuse another one.
    """
    assert example.hint is not None
    (turn,) = example.targets
    num_prompt = next(t for t, weight in enumerate(row.weights) if weight)
    messages = _with_hint(example.messages[:turn], HINT.format(hint=example.hint.strip()))
    prompt = tuple(render_prompt(tokenizer, messages, example.tools))
    ids = prompt + row.ids[num_prompt:]
    if len(ids) > context:
        raise DataError(
            f"record {example.record} has {len(ids)} tokens with its hint; the base takes {context} (base.context)"
        )
    return replace(row, objective="sft", ids=ids, weights=(0.0,) * len(prompt) + row.weights[num_prompt:])


def _with_hint(messages: Sequence[Message], hint: str) -> list[Message]:
    asked = [k for k, message in enumerate(messages) if message.get("role") == "user"]
    if not asked:
        return [*messages, {"role": "user", "content": hint.strip()}]
    message = messages[asked[-1]]
    content = message.get("content") or ""
    longer = [*content, {"type": "text", "text": hint}] if isinstance(content, list) else content + hint
    return [*messages[: asked[-1]], {**message, "content": longer}, *messages[asked[-1] + 1 :]]


def _render_targets(tokenizer: Any, example: Example) -> tuple[list[int], list[float]]:
    pieces = _pieces(tokenizer, example)
    parts = [_encode(tokenizer, text) for text, _ in pieces]
    if [token for part in parts for token in part] != _encode(tokenizer, "".join(text for text, _ in pieces)):
        parts = _split(tokenizer, example.record, [text for text, _ in pieces])
    ids: list[int] = []
    weights: list[float] = []
    for part, (_, is_target) in zip(parts, pieces, strict=True):
        num_emitted = _emitted(tokenizer, part) if is_target else 0
        ids += part
        weights += [example.weight] * num_emitted + [0.0] * (len(part) - num_emitted)
    num_used = max((i + 1 for i, weight in enumerate(weights) if weight), default=0)
    return ids[:num_used], weights[:num_used]


def _pieces(tokenizer: Any, example: Example) -> list[tuple[str, bool]]:
    """The rendered conversation up to the last target, cut where targets begin and end: (text, is a target)."""
    pieces: list[tuple[str, bool]] = []
    text = ""
    for target in sorted(example.targets):
        if not 0 <= target < len(example.messages) or example.messages[target].get("role") != "assistant":
            raise DataError(f"record {example.record}: message {target} is not an assistant turn")
        before = _render(tokenizer, example.messages[:target], example.tools, is_prompt=True)
        after = _render(tokenizer, example.messages[: target + 1], example.tools, is_prompt=False)
        if not before.startswith(text) or not after.startswith(before):
            raise RewrittenTurns(
                f"record {example.record}: the chat template renders the turns before message {target} differently "
                "once it follows; learn from one turn of the episode at a time"
            )
        pieces += [(before[len(text) :], False), (after[len(before) :], True)]
        text = after
    return pieces


def _split(tokenizer: Any, record: str, texts: list[str]) -> list[list[int]]:
    """Ids of each piece where pieces alone differ from the whole: every prompt as a server would have seen it."""
    parts: list[list[int]] = []
    ids: list[int] = []
    text = ""
    for piece in texts:
        longer = _extend(tokenizer, record, ids, text, text + piece)
        parts.append(longer[len(ids) :])
        ids, text = longer, text + piece
    return parts


def _emitted(tokenizer: Any, turn: list[int]) -> int:
    """How many of a turn's tokens the agent emits: up to the special token that ends it; newlines after it are not."""
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    ends = [i for i, token in enumerate(turn) if token in special]
    if not ends:
        return len(turn)
    rest = tokenizer.decode(turn[ends[-1] + 1 :])
    return len(turn) if rest.strip() else ends[-1] + 1


def _extend(tokenizer: Any, record: str, ids: list[int], text: str, longer: str) -> list[int]:
    """Ids of `longer` that begin with `ids`, the ids of its beginning `text`, as a server would have seen them."""
    whole = _encode(tokenizer, longer)
    if whole[: len(ids)] == ids:
        return whole
    pieces = ids + _encode(tokenizer, longer[len(text) :])  # a merge crosses the border: keep the border
    if tokenizer.decode(pieces) != tokenizer.decode(whole):
        raise DataError(f"record {record}: the tokenizer cannot split the conversation where the answer begins")
    return pieces


def _encode(tokenizer: Any, text: str) -> list[int]:
    try:
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    except (TypeError, UnicodeError) as error:  # half a surrogate pair
        raise DataError(f"the tokenizer refuses this text: {error}") from None


def _render(tokenizer: Any, messages: Sequence[Message], tools: Sequence[Tool], *, is_prompt: bool) -> str:
    from jinja2 import TemplateError

    if not getattr(tokenizer, "chat_template", None):
        raise DataError("the base has no chat template (base.chat_template): put a chat_template.jinja into base.path")
    try:
        plain = [_plain(message) for message in messages]
        text = tokenizer.apply_chat_template(
            plain, tools=list(tools) or None, add_generation_prompt=is_prompt, tokenize=False
        )
    except DataError:
        raise
    except (TemplateError, *BAD_CONTENT) as error:  # templates fail with any of these on odd messages
        raise DataError(f"the base's chat template refuses these messages: {error}") from error
    return str(text)


def _plain(message: Message) -> Message:
    """An OpenAI message as templates expect it: text content, parsed arguments, no empty keys."""
    plain = {key: value for key, value in message.items() if value is not None}
    content = plain.get("content", "")
    if isinstance(content, list):
        if not all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            raise DataError(f"a {message.get('role')} message has parts that are not text: only text can be learned")
        content = "".join(str(part.get("text", "")) for part in content)
    plain["content"] = content
    if calls := plain.pop("tool_calls", None):
        plain["tool_calls"] = [_plain_call(call) for call in calls]
    return plain


def _plain_call(call: Any) -> dict[str, Any]:
    try:
        function = dict(call["function"])
        arguments = function.get("arguments") or {}
        function["arguments"] = json.loads(arguments) if isinstance(arguments, str) else arguments
        str(function["name"])
    except (TypeError, KeyError, ValueError, RecursionError):
        raise DataError(f"a tool call's arguments are no JSON: {str(call)[:200]}") from None
    return {**call, "function": function}
