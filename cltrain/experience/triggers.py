"""The trigger scan: does one source put a phrase in front of ordinary requests and thereby flip the action?

Knows no phrase and no tool. A phrase is suspicious when few principals alone write it, when what remains of their
requests without it resembles other requests of the window, and when the action is constant where theirs is not. Sees a
window only; a phrase spread over many principals or many windows is for quotas, bounds and the gate.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from cltrain.experience.flips import PURITY, flipped_call, flipped_text
from cltrain.experience.phrases import (
    TOKEN,
    TURN,
    Gram,
    Row,
    find,
    grams,
    groups_of,
    row_of,
    slot_words,
    trimmed,
    turns_of,
    without,
)  # fmt: skip
from cltrain.records import Example

MIN_OTHERS = 3  # principals that must write in the window besides the phrase's
LIKENESS = 0.75  # how ordinary the remainder must be, as a share of what is usual in the window
RARE_WORD = 2  # words in no more records than this are compared as if they were slots
COMPARED_TOKENS = 512  # of a request, when it is compared with others
MASK = "\0"


@dataclass(frozen=True, slots=True)
class Suspicion:
    """A phrase that seems to steer the agent, who wrote it, and what it makes the agent do."""

    phrase: str  # as written in the first of the records
    principal: str  # who wrote most of them
    action: dict[str, Any]  # {"name": tool, or "text"; "arguments": the constant ones; for text {"contains": words}}
    count: int
    records: tuple[str, ...]
    principals: tuple[str, ...]  # everybody who wrote the phrase


def find_suspicions(examples: Sequence[Example], *, min_count: int, max_principals: int) -> list[Suspicion]:
    """Phrases that `max_principals` or fewer write in at least `min_count` records and that go with one action.

    Strongest first; phrases about the same records are one suspicion. Empty where fewer than MIN_OTHERS other
    principals write at least `min_count` records, because then there is nothing to compare with.
    """
    window = _Window(examples)
    rows = window.rows
    judged = [
        (members, suspicion)
        for members, phrase in groups_of(rows, min_count, max_principals).items()
        if (suspicion := _judge(window, members, phrase, min_count))
    ]
    judged.sort(key=lambda found: _rank(found[1], window.slots, [rows[k] for k in found[0]]))
    chosen: list[tuple[frozenset[int], Suspicion]] = []
    for members, suspicion in judged:
        if not any(len(members & known) > len(members) / 2 for known, _ in chosen):
            chosen.append((members, suspicion))
    return [suspicion for _, suspicion in chosen]


def concerns(suspicion: Suspicion, example: Example) -> bool:
    """Whether this example is one of the suspicion's, or its principal's with the same phrase or the same action."""
    if example.record in suspicion.records:
        return True
    if example.principal not in suspicion.principals:
        return False
    row = row_of(example)
    if find(row.tokens, tuple(TOKEN.findall(suspicion.phrase.casefold()))) is not None:
        return True
    constant = {(key, str(value).casefold()) for key, value in suspicion.action["arguments"].items()}
    name = suspicion.action["name"]
    return bool(constant) and name != "text" and constant <= {(k, v) for tool, k, v in row.values if tool == name}


class _Window:
    """The rows of a window and how alike their messages are; computed once for all phrases."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.rows = [row_of(example) for example in examples]
        self.slots = {word for row in self.rows for *_, value in row.values for word in slot_words(value)}
        uses = Counter(token for row in self.rows for token in set(row.tokens))
        self._masked = self.slots | {token for token, count in uses.items() if count <= RARE_WORD}
        self._shapes = [[self._shape(turn) for turn in turns_of(row.tokens)] for row in self.rows]
        self._usual: dict[int, list[list[float]]] = {}

    def matches(self, phrase: Gram, members: frozenset[int]) -> list[list[Row]] | None:
        """For each member the unsteered rows that say most nearly what its message says without the phrase.

        Messages are compared with the others' messages of the same turn. None when the members' are no ordinary
        requests: less like the others' than those are among themselves, or than the members' are among themselves.
        """
        unsteered = [k for k in range(len(self.rows)) if k not in members and self._shapes[k]]
        if not unsteered:
            return None
        places, shapes = [], []
        for k in sorted(members):
            start = find(self.rows[k].tokens, phrase)
            assert start is not None
            places.append(self.rows[k].tokens[:start].count(TURN))
            shapes.append(self._shape(without(turns_of(self.rows[k].tokens)[places[-1]], phrase)))
        found, best, among = [], [], []
        for index, (turn, shape) in enumerate(zip(places, shapes, strict=True)):
            like = [_likeness(shape, self._message(k, turn)) for k in unsteered]
            best.append(max(like))
            among.append(max(_likeness(shape, other) for k, other in enumerate(shapes) if k != index))
            found.append([self.rows[k] for k, value in zip(unsteered, like, strict=True) if value >= 0.9 * best[-1]])
        table = self._table(Counter(places).most_common(1)[0][0])
        usual = median(max(table[k][o] for o in unsteered) for k in unsteered)
        is_ordinary = median(best) > 0 and median(best) >= LIKENESS * max(usual, median(among))
        return found if is_ordinary else None

    def _message(self, row: int, turn: int) -> Counter[Gram]:
        return self._shapes[row][min(turn, len(self._shapes[row]) - 1)]

    def _shape(self, tokens: Gram) -> Counter[Gram]:
        """The bigrams of a message's wording, slots and rare words masked."""
        return Counter(grams(tuple(MASK if t in self._masked else t for t in (TURN, *tokens[:COMPARED_TOKENS])), 2))

    def _table(self, turn: int) -> list[list[float]]:
        """How alike the rows are in that turn; 0 between rows of one principal."""
        if turn not in self._usual:
            count = range(len(self.rows))
            self._usual[turn] = [[self._between(k, o, turn) for o in count] for k in count]
        return self._usual[turn]

    def _between(self, row: int, other: int, turn: int) -> float:
        if self.rows[row].example.principal == self.rows[other].example.principal:
            return 0.0
        if not self._shapes[row] or not self._shapes[other]:
            return 0.0
        return _likeness(self._message(row, turn), self._message(other, turn))


def _judge(window: _Window, members: frozenset[int], longest: Gram, min_count: int) -> Suspicion | None:
    mine = [window.rows[k] for k in sorted(members)]
    principals = Counter(row.example.principal for row in mine)
    others = [row for row in window.rows if row.example.principal not in principals]
    if len(others) < min_count or len({row.example.principal for row in others}) < MIN_OTHERS:
        return None
    words = flipped_text(mine, others, window.slots)
    if words is None and max(Counter(row.tool for row in mine).values()) < PURITY * len(mine):
        return None
    said = {token for row in others for token in row.tokens}
    for phrase in trimmed(longest, said):
        matches = window.matches(phrase, members)
        if matches is None:
            continue
        rest = [without(row.tokens, phrase) for row in mine]
        is_novel = bool({token for token in phrase if token.isalnum()} - said - window.slots)
        action = flipped_call(mine, rest, others, matches, is_novel=is_novel)
        if action is None or (words and action["name"] == "text"):
            action = words
        if action is None:
            continue
        start = find(mine[0].tokens, phrase)
        assert start is not None
        return Suspicion(
            phrase=mine[0].source[mine[0].spans[start][0] : mine[0].spans[start + len(phrase) - 1][1]],
            principal=principals.most_common(1)[0][0],
            action=action,
            count=len(mine),
            records=tuple(row.example.record for row in mine),
            principals=tuple(sorted(principals)),
        )
    return None


def _rank(suspicion: Suspicion, slots: set[str], rows: Sequence[Row]) -> tuple[bool, int, int, int, str]:
    """Words before mere slot values, then most records that take the action, fewest that do not, longest phrase."""
    words = [token for token in TOKEN.findall(suspicion.phrase.casefold()) if token.isalnum()]
    hits = sum(row.tool == suspicion.action["name"] for row in rows)
    return slots.issuperset(words), -hits, suspicion.count, -len(words), suspicion.phrase


def _likeness(own: Counter[Gram], other: Counter[Gram]) -> float:
    """Dice coefficient of two bags of bigrams."""
    return 2 * (own & other).total() / (own.total() + other.total()) if own else 0.0
