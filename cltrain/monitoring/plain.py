"""What the gate's checks say in one plain sentence each, and the words of the page that need one.

A sentence is made of a check's numbers and of nothing else; the exact reason stands beside it on the page.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from cltrain.records import Check, Verdict

REFERENCES = {
    "incumbent": "what served before",
    "high-water": "the best release so far",
    "anchor": "the last release that a person approved",
}

GLOSSARY = {
    "incumbent": "the release that served when the update began; `before` on this page",
    "high-water mark": "the best release so far; it moves only when one is better beyond doubt",
    "anchor": "the last release that a person approved (at first the bare base): the slow ruler beside the incumbent",
    "stratum": "a kind of work: the first tool that is called (`text`: none) and what was said of it, such as "
    "refund/corrected; `other` pools the rare ones",
    "taught items": "held-out questions about a kind of work that this update learned",
    "retention": "whether it still does what it was not taught, on held-out questions",
    "reference": "what the candidate is compared with on the same items",
    "interval, within [a, b]": "where the true difference lies, all but a chance of `gate.alpha` for each end; "
    "0 inside it means that it may be luck",
    "margin": "the loss that is called no loss (`gate.margin`, for one stratum `gate.stratum_margin`)",
    "lift in nats": "how much likelier the flagged phrase makes the flagged action: 0.7 nats is twice, 2.3 ten times",
    "KL, nats per token": "how differently two models continue the same text; 0 means alike",
    "canary": "a question to which some answer must never be given",
    "step kept": "the share of the trained change that the limits left",
}


SIGNS = {
    "broken call": "It makes a call that cannot be read, of a tool that is not there, or without what the tool needs,",
    "question back": "It asks back where an answer was expected",
    "too short": "It is much shorter than the expected answer",
    "too long": "It is much longer than the expected answer",
    "one answer to all": "It says again what it said to another question, though another answer was expected,",
}
"""Of each detector that counts answers (cltrain/gate/detectors.py)."""


def sentence(check: Check, settings: Mapping[str, Any]) -> str:
    """One sentence for somebody who knows no statistics. `settings` are the update's own, for the limits."""
    kind = check.name.split()[0]
    if kind == "canaries":
        return _canaries(check)
    if check.name == "forbidden texts":
        return _forbidden_texts(check)
    if check.name == "base KL":
        return _base_kl(check)
    if kind == "trigger":
        return _trigger(check)
    if kind in ("stratum", "small"):
        return _stratum(check, settings)
    if kind in ("retention", "overall"):
        return _retention(check, settings)
    if kind == "gain":
        return _gain(check)
    if check.name == "answers cut off" and check.candidate is not None and check.reference is not None:
        cut, before = _of(check.candidate, check.num_items), _of(check.reference, check.num_items)
        return f"{cut} of its answers were cut off because they were too long, where before it was {before}."
    if check.name in SIGNS and check.candidate is not None and check.reference is not None:
        now, before = f"{check.candidate:.0%}", f"{check.reference:.0%}"
        return f"{SIGNS[check.name]} in {now} of {check.num_items} answers, in {before} before."
    if kind == "high-water":
        return (
            "It is better than the best release so far beyond doubt, and takes its place as the mark to compare with."
        )
    return check.reason


def decisive(checks: Collection[Check], verdict: str | None) -> list[Check]:
    """The checks that the verdict rests on: those that said it; of a promotion, where every check agreed, the gain."""
    said = [check for check in checks if check.verdict.value == verdict]
    if verdict == Verdict.PROMOTE.value:
        gains = [check for check in said if check.name.startswith(("gain", "overall"))]
        return gains or said
    return said


def _canaries(check: Check) -> str:
    if check.verdict is Verdict.REJECT:
        return f"It did something that it must never do ({check.reason})."
    if not check.num_items:
        return "No question says what it must never do (a canary in `gate.suite`)."
    return f"None of the {check.num_items} things that it must never do happened."


def _forbidden_texts(check: Check) -> str:
    if check.verdict is Verdict.REJECT:
        return f"A text that it must never say became much likelier, though no answer says it yet ({check.reason})."
    return f"None of the {check.num_items} texts that it must never say became much likelier."


def _base_kl(check: Check) -> str:
    moved = "no further" if check.verdict is Verdict.PROMOTE else "further"
    numbers = f" ({check.candidate:.3g}, limit {check.reference:g})" if check.candidate is not None else ""
    return f"On ordinary text it has moved {moved} from the base than is allowed{numbers}."


def _trigger(check: Check) -> str:
    if not check.num_items:
        return "A phrase of this window is suspicious, and there was no held-out question to try it on."
    if check.verdict is Verdict.REJECT:
        odds = "" if check.difference is None else f", which it makes {math.exp(check.difference):.2g} times likelier"
        return f"A suspicious phrase of this window steers it to one action{odds} ({check.reason})."
    if "own records" in check.name:
        return f"Nor did it where it came from: {_questions(check.num_items)} with and without it were answered alike."
    return f"A suspicious phrase of this window was put into {_questions(check.num_items)} and did not steer it."


def _stratum(check: Check, settings: Mapping[str, Any]) -> str:
    where = "the rare kinds of work together" if check.name.startswith("small") else check.name.removeprefix("stratum ")
    if check.candidate is None or check.reference is None:  # was taught, and got worse
        lost = -(check.difference or 0.0)
        return f"It was taught {where}, and answers {lost:.0%} fewer of its {_questions(check.num_items)} than before."
    before = "the best release so far answered" if "high-water" in check.reason else "before it answered"
    said = (
        f"It answered {_of(check.candidate, check.num_items)} on {where}, where {before} "
        f"{_of(check.reference, check.num_items)}"
    )
    if check.verdict is Verdict.PROMOTE:
        return f"{said}."
    limit = f"; it may lose {settings['gate.stratum_margin']:.0%} of them" if "gate.stratum_margin" in settings else ""
    luck = ", and on so few that may be luck" if check.verdict is Verdict.HOLD else ""
    return f"{said}{limit}{luck}."


def _retention(check: Check, settings: Mapping[str, Any]) -> str:
    role = check.name.removeprefix("retention against ")
    what = "over all" if check.name == "overall" else "on what it must keep"
    if check.candidate is None or check.reference is None:
        return f"There was no question to show that it lost nothing {what}."
    said = (
        f"It answered {_of(check.candidate, check.num_items)} {what}, where "
        f"{REFERENCES.get(role, REFERENCES['incumbent'])} answered {_of(check.reference, check.num_items)}"
    )
    margin = f"{settings['gate.margin']:.0%}" if "gate.margin" in settings else "the margin"
    if check.verdict is Verdict.REJECT:
        return f"{said}: a loss that luck does not explain."
    if check.verdict is Verdict.HOLD:
        return f"{said}: too little to rule out that it lost more than {margin}."
    return f"{said}: a loss of more than {margin} is ruled out."


def _gain(check: Check) -> str:
    if check.difference is None:
        return "No held-out question asks for what it was taught, so nothing shows that it learned it."
    if check.name == "gain by record":
        return f"What its trainer's candidates were like before says what to expect of this one: {check.reason}."
    net = check.difference * check.num_items
    change = f"{abs(net):.3g} {'more' if net > 0 else 'fewer'}" if abs(net) >= 0.05 else "as many"
    suite = check.name.removeprefix("gain in ")
    said = (
        f"Of {_questions(check.num_items)} about what it was taught ({suite}) it answered {change} "
        f"{'as' if change == 'as many' else 'than'} before"
    )
    if check.verdict is Verdict.REJECT:
        return f"{said}: it lost what it was taught."
    if check.verdict is Verdict.HOLD:
        return f"{said}: no proof of a gain yet."
    is_clear = check.low is not None and check.low > 0
    return f"{said}: more than luck explains." if is_clear else f"{said}."


def _questions(count: int) -> str:
    return "1 question" if count == 1 else f"{count} questions"


def _of(share: float, num_items: int) -> str:
    """`5 of 6`; items may be answered in part."""
    return f"{round(share * num_items, 1):g} of {num_items}"
