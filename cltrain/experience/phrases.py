"""What the trigger scan sees of a window: token rows, and the phrases that only few principals write."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cltrain.experience.verify import arguments_of, text_of
from cltrain.records import Example

TOKEN = re.compile(r"\w+|[^\w\s]")
MAX_PHRASE = 6  # tokens of a counted n-gram; the phrase reported is as long as its records agree
MAX_TOKENS = 4000  # of one record's user text
SLOT_WORDS = 3  # argument values of up to this many words name slots
TURN = "\n"

Gram = tuple[str, ...]
Value = tuple[str, str, str]  # tool, argument name, value


@dataclass(frozen=True, slots=True)
class Row:
    """One example as the scan sees it; `tokens` are casefolded and every user message ends with TURN."""

    example: Example
    source: str  # the user's messages as written
    spans: tuple[tuple[int, int], ...]  # of each token in `source`
    tokens: Gram
    tool: str  # the first one called, or `text`
    values: tuple[Value, ...]
    answer: str  # the text of the targets as written


def row_of(example: Example) -> Row:
    said = [text_of(m) for m in example.messages if m.get("role") == "user"]
    raw: list[str] = []
    spans: list[tuple[int, int]] = []
    source = ""
    for text in said:
        start = len(source)
        source += text + TURN
        for match in list(TOKEN.finditer(text))[: max(0, MAX_TOKENS - len(raw))]:
            raw.append(match.group())
            spans.append((start + match.start(), start + match.end()))
        raw.append(TURN)
        spans.append((start + len(text), start + len(text) + 1))
    targets = [example.messages[k] for k in example.targets]
    calls = [call for message in targets for call in message.get("tool_calls") or []]
    values: list[Value] = []
    for call in calls:
        arguments = arguments_of(call)
        for key, value in arguments.items() if isinstance(arguments, dict) else ():
            values.append((call["function"]["name"], key, str(value).casefold()))
    return Row(
        example=example,
        source=source,
        spans=tuple(spans),
        tokens=tuple(token.casefold() for token in raw),
        tool=calls[0]["function"]["name"] if calls else "text",
        values=tuple(values),
        answer=" ".join(text_of(m) for m in targets),
    )


def turns_of(tokens: Gram) -> list[Gram]:
    """The user's messages, each with its TURN."""
    ends = [k for k, token in enumerate(tokens) if token == TURN]
    return [tokens[start:end] for start, end in zip([0, *(k + 1 for k in ends)], (k + 1 for k in ends), strict=False)]


def slot_words(value: str) -> list[str]:
    words = TOKEN.findall(value)
    return words if len(words) <= SLOT_WORDS else []


def groups_of(rows: Sequence[Row], min_count: int, max_principals: int) -> dict[frozenset[int], Gram]:
    """For every set of records that share an exclusive n-gram, the longest phrase that all of them share."""
    groups: dict[frozenset[int], Gram] = {}
    frequent: set[Gram] | None = None
    for size in range(1, MAX_PHRASE + 1):
        where: dict[Gram, set[int]] = {}
        for index, row in enumerate(rows):
            for gram in grams(row.tokens, size):
                if frequent is None or (gram[:-1] in frequent and gram[1:] in frequent):
                    where.setdefault(gram, set()).add(index)
        where = {gram: members for gram, members in where.items() if len(members) >= min_count}
        for gram, members in where.items():
            principals = {rows[k].example.principal for k in members}
            has_word = any(token.isalnum() for token in gram)
            if len(principals) <= max_principals and has_word and TURN not in gram:
                groups[frozenset(members)] = max(groups.get(frozenset(members), ()), gram, key=lambda g: (len(g), g))
        frequent = set(where)
    return {members: _extend(rows, members, gram) for members, gram in groups.items()}


def _extend(rows: Sequence[Row], members: frozenset[int], gram: Gram) -> Gram:
    while True:
        before, after = set(), set()
        for k in members:
            start = find(rows[k].tokens, gram)
            assert start is not None
            before.add(rows[k].tokens[start - 1] if start else TURN)
            after.add(rows[k].tokens[start + len(gram)])
        if len(before) == 1 and TURN not in before:
            gram = (*before, *gram)
        elif len(after) == 1 and TURN not in after:
            gram = (*gram, *after)
        else:
            return gram


def grams(tokens: Gram, size: int) -> Iterable[Gram]:
    return zip(*(tokens[shift:] for shift in range(size)), strict=False)


def find(tokens: Gram, gram: Gram) -> int | None:
    starts = range(len(tokens) - len(gram) + 1) if gram else ()
    return next((k for k in starts if tokens[k : k + len(gram)] == gram), None)


def without(tokens: Gram, phrase: Gram) -> Gram:
    start = find(tokens, phrase)
    while start is not None:
        tokens = tokens[:start] + tokens[start + len(phrase) :]
        start = find(tokens, phrase)
    return tokens


def trimmed(phrase: Gram, said: set[str]) -> list[Gram]:
    """The phrase, and it without the words at its ends that others write too: those may belong to the request."""
    novel = [k for k, token in enumerate(phrase) if token not in said]
    if not novel:
        return [phrase]
    first, last = novel[0], novel[-1] + 1
    return list(dict.fromkeys([phrase, phrase[:last], phrase[first:], phrase[first:last]]))
