"""Does a prompt give away what passes? A lint for suites: it knows the ways in which owners really write it down.

Refused are, in the system messages or the last user message, letters' case and spacing aside:
1. the rubric (of four words or more), or a pattern that is more than plain words, verbatim. A JSON schema may be said:
   nobody can answer in it otherwise;
2. a sentence that ties the right answer to being right or to passing: "the correct answer is X", "answer with X to
   pass", "you get full marks if you say X";
3. beside a question, a sentence that dictates its answer: "What is 6 * 7? Answer with 42."
A right answer that stands among choices ("yes or no", "one of red, green, blue") gives nothing away, nor does one that
an order must name ("Refund A1") or that a condition leads to ("If it rained, say yes").
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator

from cltrain.errors import DataError
from cltrain.gate.scorers import text_of, tool_calls
from cltrain.records import SuiteItem

HERE = "\u241f"  # stands for the right answer in a sentence
MIN_RUBRIC_WORDS = 4
UNSPACED = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]")  # Thai to Chinese
UNSPACED_PER_WORD = 2  # characters of these scripts, about
ANSWER = r"(?:answer|reply|response|output|solution|call|choice|option)"
RIGHT = r"(?:correct|right|expected|accepted|reference|desired|wanted|gold)"
IS_RIGHT = re.compile(
    rf"\b{RIGHT} {ANSWER}(?: here)?\s*(?:is|are|:|=|(?:would|should|will|must) be)\W{{0,4}}{HERE}"
    rf"|{HERE}\W{{0,4}}(?:is|would be) (?:the )?(?:only )?{RIGHT} {ANSWER}"
)
SAYS = re.compile(
    r"\b(?:answer|reply|respond|say|write|output|print|return|choose|pick|call|use|mention|contain|include)"
)
PASSES = re.compile(
    r"\b(?:to|you|you'll|will|must) (?:pass|succeed|score|win|get (?:full|a point|the point|credit|marks?)"
    r"|be (?:marked|scored|graded|counted|accepted|rewarded))\b"
    r"|\b(?:pass(?:es)?|scored?|graded|marked|counts?|counted|rewarded|accepted|marks|credit|points?)\b"
    r".*\b(?:if|when|for)\b"
)
DICTATES = re.compile(rf"\b(?:answer|reply|respond|say|output|write|print|return)\b(?: \S+){{0,4}}?\W*{HERE}\W*$")
CONDITION = re.compile(r"\b(?:if|when|whenever|unless|otherwise|once|in case|not|never|don't)\b")
CHOICE = re.compile(
    rf"{HERE}\W{{0,3}}(?:/|\||\bor\b)|(?:/|\||\bor)\W{{0,3}}{HERE}"
    rf"|\b(?:one of|either|among|options?|choices?)\b.*{HERE}"
)
IN_LIST = re.compile(rf"{HERE}\W?,|,\W{{0,2}}{HERE}")


def leak(item: SuiteItem) -> str | None:
    """What the item's prompt gives away of its scoring, by the rules above; None: nothing."""
    for said in _instructions(item):
        flat = _plain(said)
        if (rule := _hidden_rule(item)) is not None and _plain(rule) in flat:
            return f"holds its own {item.scorer} rule, {rule[:60]!r}"
        for answer in _right_answers(item):
            for sentence in _sentences(said, answer):
                if IS_RIGHT.search(sentence) or (SAYS.search(sentence) and PASSES.search(sentence)):
                    return f"says which answer passes: {_shown(sentence, answer)!r}"
                if "?" in flat and DICTATES.search(sentence) and not CONDITION.search(sentence):
                    return f"dictates the answer to its own question: {_shown(sentence, answer)!r}"
        for sentence in _sentences_with_call(said, item):
            if SAYS.search(sentence) and PASSES.search(sentence):
                return f"says which call passes: {sentence[:100]!r}"
    return None


def refuse_leak(item: SuiteItem) -> None:
    """Raise DataError for what `leak` finds."""
    if (told := leak(item)) is not None:
        raise DataError(f"its prompt {told}. What reads it there passes without knowing anything: say it otherwise")


def _instructions(item: SuiteItem) -> Iterator[str]:
    yield from (text_of(message) for message in item.messages if message["role"] == "system")
    asked = [text_of(message) for message in item.messages if message["role"] == "user"]
    yield from asked[-1:]


def _hidden_rule(item: SuiteItem) -> str | None:
    """The text that nobody but the scorer should see."""
    if item.scorer == "judge" and _num_words(item.rule["rubric"]) >= MIN_RUBRIC_WORDS:
        return str(item.rule["rubric"])
    if item.scorer == "regex" and not _is_words(item.rule["pattern"]):
        return str(item.rule["pattern"])
    return None


def _right_answers(item: SuiteItem) -> list[str]:
    """Texts that pass as they stand."""
    answers = []
    if item.expected is not None and not tool_calls(item.expected):
        answers.append(_plain(text_of(item.expected)).strip(" .!\"'"))
    core = re.sub(r"\(\?[a-z]+\)|\\b|[\^$]", "", str(item.rule.get("pattern", "")))
    answers += [_plain(part) for part in core.split("|") if _is_words(part)]
    return [answer for answer in answers if answer]


def _sentences(said: str, answer: str) -> Iterator[str]:
    """The sentences in which the answer stands, but not among choices."""
    place = re.compile(rf"(?<!\w){re.escape(answer)}(?!\w)")
    for line in said.splitlines():
        for sentence in re.split(r"(?<=[.!?;])\s+", place.sub(HERE, _plain(line))):
            is_list = IN_LIST.search(sentence) and (sentence.count(",") >= 2 or " or " in sentence)
            if HERE in sentence and not CHOICE.search(sentence) and not is_list and not sentence.endswith("?"):
                yield sentence


def _sentences_with_call(said: str, item: SuiteItem) -> Iterator[str]:
    """The sentences that name the tool of the expected call and every text in its arguments."""
    for name, arguments in tool_calls(item.expected or {}):
        values = json.loads(arguments)
        texts = [value for value in values.values() if isinstance(value, str)] if isinstance(values, dict) else []
        for sentence in re.split(r"(?<=[.!?;])\s+|\n", said):
            if all(_plain(part) in _plain(sentence) for part in (name, *texts)):
                yield _plain(sentence)


def _shown(sentence: str, answer: str) -> str:
    return sentence.replace(HERE, answer)[:100]


def _num_words(text: str) -> int:
    return max(len(text.split()), len(UNSPACED.findall(text)) // UNSPACED_PER_WORD)


def _is_words(text: str) -> bool:
    return re.fullmatch(r"[\w\s',-]+", text) is not None


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
