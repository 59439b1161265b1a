"""How a release scores on items, whoever asks and grades: our own questions, a judge, programs. Kept in the store by
content, so that incumbent and base are asked once.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import delete, insert, select

from cltrain.config import GateConfig
from cltrain.errors import DataError
from cltrain.gate.http_judge import HttpJudge
from cltrain.gate.kept import keep_in, read_kept
from cltrain.gate.scorers import VERSION, score_item, violation
from cltrain.gate.suites import item_key
from cltrain.records import Check, Code, Message, SuiteItem, Verdict
from cltrain.store.database import Store
from cltrain.store.schema import answer_cuts, judge_scores

SAME = 1e-9  # scores that differ by less are one score


@dataclass(frozen=True, slots=True)
class Reply:
    """One greedy answer, and whether it ended because it was too long; None where nobody knows."""

    message: Message
    is_cut: bool | None = None


Ask = Callable[[str, Sequence[SuiteItem]], Sequence[Reply | None]]
"""(release, items) -> one reply per item, None where there was no answer."""

Program = Callable[[str, Sequence[SuiteItem]], Sequence[float]]
"""(release, items) -> the scores that a program measured by itself, one per item."""


OnAnswers = Callable[[str, Sequence[SuiteItem], Sequence[Message]], None]
"""Hears (release, items, answers) before their scores are remembered."""


class Scoring:
    """`score_items(release, items) -> scores` of one deployment, with what it remembers in the store."""

    def __init__(
        self,
        store: Store,
        config: GateConfig,
        ask: Ask,
        *,
        judge: HttpJudge | None = None,
        programs: Mapping[str, Program] | None = None,
        on_answers: OnAnswers = lambda _release, _items, _answers: None,
    ) -> None:
        self.store, self.config, self.ask, self.judge = store, config, ask, judge
        self.programs, self.on_answers = dict(programs or {}), on_answers

    def score_items(self, release: str, items: Sequence[SuiteItem]) -> list[float]:
        """One score in [0, 1] per item, asked for only where the store does not know it.

        Raises ValueError for missing answers, DataError for scores that cannot be, ServerError for an outage; nothing
        is remembered then.
        """
        keys = [self._key(item) for item in items]
        known = read_kept(self.store, release, keys)
        unknown = {key: item for key, item in zip(keys, items, strict=True) if key not in known}
        if unknown:
            asked = list(unknown.values())
            replies = self._replies(release, asked)
            new = dict(zip(unknown, self._scored(release, asked, replies), strict=True))
            cuts = {key: reply.is_cut for key, reply in zip(unknown, replies, strict=True) if reply is not None}
            heard = [(item, reply.message) for item, reply in zip(asked, replies, strict=True) if reply is not None]
            self.on_answers(release, [item for item, _ in heard], [answer for _, answer in heard])
            self._remember(release, new, {key: is_cut for key, is_cut in cuts.items() if is_cut is not None})
            known |= new
        return [known[key] for key in keys]

    def answer_many(self, release: str, items: Sequence[SuiteItem]) -> list[Message | None]:
        """What the release answers, as asked for every score; nothing is kept."""
        return [None if reply is None else reply.message for reply in self.ask(release, items)]

    def measure(self, release: str, items: Sequence[SuiteItem]) -> list[float]:
        """As `score_items`, but nothing is looked up and nothing kept: for items whose scores must stay unknown."""
        return self._scored(release, items, self._replies(release, items), is_fresh=True)

    def cut_check(self, candidate: str, incumbent: str, items: Sequence[SuiteItem]) -> list[Check]:
        """What share of their scored answers ended at max_answer_tokens; no check where nobody knows of any."""
        keys = [self._key(item) for item in items]
        cuts = [read_kept(self.store, release, keys, answer_cuts) for release in (candidate, incumbent)]
        return cut_check(
            [(cuts[0][key], cuts[1][key]) for key in keys if all(key in known for known in cuts)], self.config
        )

    def unsteady(self, release: str, items: Sequence[SuiteItem]) -> str | None:
        """Which judge or program does not give the same answers the same score twice; None when all do.

        A few items of each suite; what is computed from the answer alone is not tried. A program asks by itself: a
        server whose greedy answers vary makes it unsteady too, and it must then ask in a way that does not.
        """
        suites: dict[tuple[str, str], list[SuiteItem]] = defaultdict(list)
        for item in items:
            few = suites[item.suite, item.scorer]
            if item.scorer in ("judge", "program") and len(few) < self.config.num_asked_twice:
                few.append(item)
        for (suite, scorer), few in suites.items():
            replies = self._replies(release, few)
            first = self.score_items(release, few) if scorer == "program" else self._scored(release, few, replies)
            second = self._scored(release, few, replies, is_fresh=True)
            for item, one, other in zip(few, first, second, strict=True):
                if not abs(one - other) <= SAME:
                    return f"suite {suite} does not answer the same twice: {item.id} scored {one:g}, then {other:g}"
        return None

    def _replies(self, release: str, items: Sequence[SuiteItem]) -> list[Reply | None]:
        """An answer to each item; None where a program asks by itself. Raises ValueError for a gap."""
        asked = [item for item in items if item.scorer != "program"]
        replies = list(self.ask(release, asked)) if asked else []
        num_missing = abs(len(asked) - len(replies)) + sum(reply is None for reply in replies)
        if num_missing:
            raise ValueError(f"{release} left {num_missing} of {len(asked)} questions unanswered")
        return [None if item.scorer == "program" else replies.pop(0) for item in items]

    def _scored(
        self, release: str, items: Sequence[SuiteItem], replies: Sequence[Reply | None], *, is_fresh: bool = False
    ) -> list[float]:
        """Scores of these replies. `is_fresh`: a judge is asked again about what it has judged."""
        scores: dict[int, float] = {}
        by_suite: dict[str, list[int]] = defaultdict(list)
        judged: list[int] = []
        for place, (item, reply) in enumerate(zip(items, replies, strict=True)):
            if reply is None:
                by_suite[item.suite].append(place)
            elif violation(reply.message, item.forbidden) is not None:
                scores[place] = 0.0
            elif item.scorer == "judge":
                judged.append(place)
            else:
                scores[place] = score_item(item, reply.message)
        for suite, places in by_suite.items():
            found = self._run_program(suite, release, [items[place] for place in places])
            scores |= zip(places, found, strict=True)
        pairs = [(items[place], reply.message) for place in judged if (reply := replies[place]) is not None]
        scores |= zip(judged, self._judged(pairs, is_fresh=is_fresh), strict=True)
        for place, item in enumerate(items):
            if not 0 <= scores[place] <= 1:  # NaN fails this too
                raise DataError(f"item {item.id} of suite {item.suite} scored {scores[place]}, outside [0, 1]")
        return [scores[place] for place in range(len(items))]

    def _run_program(self, suite: str, release: str, items: Sequence[SuiteItem]) -> Sequence[float]:
        if suite not in self.programs:
            raise DataError(f"nothing can score the items of suite {suite}: its program is not configured")
        found = self.programs[suite](release, items)
        if len(found) != len(items):
            raise DataError(f"suite {suite} gave {len(found)} scores for {len(items)} items")
        return found

    def _judged(self, asked: Sequence[tuple[SuiteItem, Message]], *, is_fresh: bool) -> list[float]:
        """The judge's scores; what it said of the very same answer before is not asked again."""
        if not asked:
            return []
        if self.judge is None:
            raise DataError(f"item {asked[0][0].id} is scored by a judge, and there is none: set [gate.judge]")
        keys = [self.judge.content_key(item, answer) for item, answer in asked]
        known: dict[str, float] = {}
        if not is_fresh:
            with self.store.read() as connection:
                query = select(judge_scores).where(judge_scores.c.content.in_(keys))
                known = {row.content: row.score for row in connection.execute(query)}
        new = {key: pair for key, pair in zip(keys, asked, strict=True) if key not in known}
        found = dict(zip(new, self.judge.score_many(list(new.values())), strict=True))
        if found and not is_fresh:
            with self.store.write() as connection:
                connection.execute(delete(judge_scores).where(judge_scores.c.content.in_(found)))
                connection.execute(insert(judge_scores), [{"content": key, "score": v} for key, v in found.items()])
        return [(known | found)[key] for key in keys]

    def _key(self, item: SuiteItem) -> str:
        """What a score depends on besides the release."""
        by = f"~{self.judge.tag}" if item.scorer == "judge" and self.judge is not None else ""
        signs = f"{self.config.detectors.question} {self.config.detectors.length_ratio}"  # noted when an item is scored
        rules = hashlib.sha256(signs.encode()).hexdigest()[:8]
        return f"{item_key(item)}~{VERSION}~{self.config.max_answer_tokens}~{rules}{by}"

    def _remember(self, release: str, scores: Mapping[str, float], cuts: Mapping[str, bool]) -> None:
        with self.store.write() as connection:
            keep_in(connection, release, scores)
            keep_in(connection, release, cuts, answer_cuts)


def cut_check(pairs: Sequence[tuple[float, float]], config: GateConfig) -> list[Check]:
    """One check of (candidate, incumbent) answers, true where cut. Holds when the candidate's share of cut answers is
    above the incumbent's by more than `max_cut_excess`.

    A cut answer is scored as it stands, mostly zero, so that a candidate which only talks longer looks like one that
    knows less, or a limit that is too low hides what both know. Relative to the incumbent, because what is cut in both
    alike is the limit's fault and no reason to keep the older one; a hold and no reject, because the length may be what
    the records teach: the owner raises the limit, and the same records are judged again.
    """
    if not pairs:
        return []
    new, old = (sum(pair[i] for pair in pairs) / len(pairs) for i in (0, 1))
    reason = f"{new:.1%} of its answers ended at gate.max_answer_tokens = {config.max_answer_tokens}, {old:.1%} before"
    verdict = Verdict.HOLD if new - old > config.max_cut_excess else Verdict.PROMOTE
    if verdict is Verdict.HOLD:
        reason += f"; more than {config.max_cut_excess:g} more: what they would have said is not known"
    elif old > config.max_cut_excess:
        reason += ": raise it, what they would have said is not known"
    return [
        Check("answers cut off", Code.LENGTH, verdict, reason, new, old, difference=new - old, num_items=len(pairs))
    ]
