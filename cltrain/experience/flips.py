"""Does a phrase flip the action? Compares what its records do with what like requests without it do."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from math import comb
from statistics import mean
from typing import Any

from cltrain.experience.phrases import MAX_PHRASE, TOKEN, TURN, Gram, Row, Value, find, grams, slot_words
from cltrain.experience.verify import arguments_of

PURITY = 0.75  # share of the phrase's records that must take the action
RARE_ELSEWHERE = 0.1  # share of the other records that may have the same argument or words
MAX_ANSWER = 256  # tokens of an answer's text that are compared
UNASKED_WORDS = (
    2  # that an answer's constant words must have beyond what the request says: dates and layout do not count
)
CHANCE = 1e-3  # probability under the others' behaviour above which a constant tool is no evidence


def flipped_call(
    mine: Sequence[Row],
    rest: Sequence[Gram],
    others: Sequence[Row],
    matches: Sequence[Sequence[Row]],
    *,
    is_novel: bool,
) -> dict[str, Any] | None:
    """The tool and the constant arguments that the phrase brings about, or None.

    `mine` are the phrase's records, `rest` their text without it, `matches` the records that ask for the same without
    it, `others` the records of other principals. `is_novel`: the phrase has a word that nobody else writes as anything.
    """
    tool, hits = Counter(row.tool for row in mine).most_common(1)[0]
    if hits < PURITY * len(mine):
        return None
    usual = mean((sum(o.tool == tool for o in like) + 0.5) / (len(like) + 1) for like in matches)
    is_flipped = _tail(hits, len(mine), usual) < CHANCE
    constant = _constant(mine, tool)
    steered = [
        value
        for value in constant
        if _is_steered(value, mine, rest, others, matches, is_novel=is_novel and not is_flipped)
    ]
    if not is_flipped and not steered:
        return None
    return {"name": tool, "arguments": _raw_arguments(mine, constant if is_flipped else steered)}


def flipped_text(mine: Sequence[Row], others: Sequence[Row], slots: set[str]) -> dict[str, Any] | None:
    """Words that the answers share, that others' answers lack, and that no word of the request explains."""
    explained = slots | {token for row in mine for token in row.tokens}
    answers = [_answer(row) for row in mine]
    common: Gram = ()
    for size in range(2, MAX_PHRASE + 1):
        counts = Counter(gram for tokens in answers for gram in set(grams(tokens, size)))
        for gram, count in counts.items():
            is_unasked = sum(token.isalpha() and token not in explained for token in gram) >= UNASKED_WORDS
            is_common = count >= PURITY * len(mine) and is_unasked and len(gram) > len(common)
            if is_common and sum(find(_answer(o), gram) is not None for o in others) <= RARE_ELSEWHERE * len(others):
                common = gram
    if not common:
        return None
    pattern = re.compile(r"\s*".join(re.escape(token) for token in common), re.IGNORECASE)
    written = (pattern.search(row.answer) for row in mine)
    return {"name": "text", "arguments": {"contains": next(match.group() for match in written if match)}}


def _answer(row: Row) -> Gram:
    return tuple(TOKEN.findall(row.answer.casefold()))[:MAX_ANSWER]


def _tail(hits: int, count: int, rate: float) -> float:
    """P(X >= hits) for X ~ Binomial(count, rate)."""
    return sum(comb(count, k) * rate**k * (1 - rate) ** (count - k) for k in range(hits, count + 1))


def _constant(mine: Sequence[Row], tool: str) -> list[Value]:
    counts = Counter(value for row in mine for value in set(row.values) if value[0] == tool)
    return [value for value, count in counts.items() if count >= PURITY * len(mine)]


def _is_steered(
    value: Value,
    mine: Sequence[Row],
    rest: Sequence[Gram],
    others: Sequence[Row],
    matches: Sequence[Sequence[Row]],
    *,
    is_novel: bool,
) -> bool:
    """Whether a constant argument comes from the phrase where the request or everybody else's habit says otherwise."""
    _, key, text = value
    words = tuple(TOKEN.findall(text))
    if sum(find(tokens, words) is not None for tokens in rest) > (1 - PURITY) * len(mine):
        return False  # the request itself asks for it
    if sum(any(v[1] == key and v[2] == text for v in row.values) for row in others) > RARE_ELSEWHERE * len(others):
        return False
    displaced = 0
    for row, tokens, like in zip(mine, rest, matches, strict=True):
        used = {word for v in row.values for word in TOKEN.findall(v[2])}
        displaced += any(_offers_another(tokens, other, key, used) for other in like)
    if displaced >= len(mine) / 2:
        return True  # the request names another value for this argument, and the agent did not take it
    return is_novel and not _is_personal(key, others)


def _offers_another(tokens: Gram, other: Row, key: str, used: set[str]) -> bool:
    """Whether, where `other` has its value of `key`, this request has a word that its own action does not use."""
    for _, name, text in other.values:
        words = tuple(slot_words(text)) if name == key else ()
        at = find(other.tokens, words)
        if at is None:
            continue
        before, after = (TURN, *other.tokens)[at], other.tokens[at + len(words)]
        here = (TURN, *tokens)
        for k in range(1, len(here) - 1):
            if here[k - 1] == before and here[k + 1] == after and here[k] not in used and here[k] != TURN:
                return True
    return False


def _is_personal(key: str, others: Sequence[Row]) -> bool:
    """Whether each of the others has a value of its own for this argument (a name, an account), as this one does."""
    own: dict[str, list[str]] = {}
    for row in others:
        own.setdefault(row.example.principal, []).extend(v[2] for v in row.values if v[1] == key)
    pairs = [(len(values), Counter(values).most_common(1)[0][1]) for values in own.values() if len(values) > 1]
    return not pairs or sum(same for _, same in pairs) >= PURITY * sum(count for count, _ in pairs)


def _raw_arguments(mine: Sequence[Row], constant: Sequence[Value]) -> dict[str, Any]:
    """The constant arguments with their JSON types, read back from the first record that has each."""
    raw: dict[str, Any] = {}
    for tool, key, text in constant:
        for row in mine:
            for k in row.example.targets:
                for call in row.example.messages[k].get("tool_calls") or []:
                    arguments = arguments_of(call)
                    same = call["function"]["name"] == tool and isinstance(arguments, dict) and key in arguments
                    if same and isinstance(arguments, dict) and str(arguments[key]).casefold() == text:
                        raw.setdefault(key, arguments[key])
    return raw
