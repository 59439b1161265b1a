"""A second kind of stream: short texts to be answered with one word, five tasks in turn, or the owner's own tasks.

Everything is a pure function of a seed. A task's training and test texts are made of different word pairs, whichever
the seed, and a development seed is examined on pairs of its own, so that nothing can be chosen on those that are
reported. The words are those that the demo's base was pretrained on; the questions and answers it has never seen.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from cltrain.demo import world
from cltrain.demo.world import Pair, words
from cltrain.errors import DataError

NUM_TRAIN, NUM_TEST = 192, 240  # texts of each task at most; the test pairs of `kind` make 192
TEST_SHARE, DEVELOPMENT_SHARE = 0.4, 0.2  # of the word pairs
FIRST_DEVELOPMENT_SEED = 900  # this one and those above


@dataclass(frozen=True)
class Text:
    """One text to be classified. `claimed` is what its teacher says, right or not."""

    id: str
    task: str
    prompt: str
    choices: tuple[str, ...]
    answer: str
    claimed: str
    pair: Pair | None = None  # the two words that make it; None for texts that were not generated


@dataclass(frozen=True)
class Task:
    name: str
    train: tuple[Text, ...]
    test: tuple[Text, ...]


# ---------------------------------------------------------------- the generated tasks

# Labels are words that the base writes as one token: what it never wrote (yes, bad) its output layer holds down, and
# a stream of so few updates would be about little else.
KINDS = {
    "fold": words("hat coat belt shoe bag"),  # to wear
    "wash": words("cup fork plate bowl knife"),  # to eat with
}
KIND_TEXTS = ("{name} saw a {item}", "there was a {item} next to {name}", "{name} asked what the {item} would cost")

MOODS = {
    "keep": ("{name} is happy with the {item}", "{name} loves the {item}", "a nice {item} , says {name}"),
    "drop": ("{name} is sad about the {item}", "the {item} of {name} has a stain", "the {item} is too loud for {name}"),
}

THINGS = words("rain wind fox sun clerk market station garden school shop")
PERSON_TEXTS = ("a {item} was left here by {who}", "{who} and the {item}", "the {item} is next to {who}")

ASKED = {
    "find": (
        "does the {item} of {name} work",
        "what would the {item} cost {name}",
        "how heavy is the {item} of {name}",
    ),
    "mark": ("the {item} of {name} is here", "{name} paid for the {item}", "{name} had the {item} at home"),
}

ORDERS = (
    "{first} came before {second}",
    "{second} came when {first} had left",
    "{first} is here and {second} will come",
    "{second} will come , {first} is here",
)

Written = tuple[str, tuple[str, ...], str]  # text, choices, answer


@dataclass(frozen=True)
class _Maker:
    """How one task is made: its word pairs, each under the label it allows, and every text of a pair."""

    question: str
    pairs: dict[str, tuple[Pair, ...]]  # by label, or by what decides it
    write: Callable[[str, Pair], list[Written]]


def _crossed(left: Iterable[str], right: Iterable[str]) -> tuple[Pair, ...]:
    right = tuple(right)
    return tuple((one, two) for one in left for two in right)


def _kind(label: str, pair: Pair) -> list[Written]:
    return [(text.format(item=pair[0], name=pair[1]), tuple(KINDS), label) for text in KIND_TEXTS]


def _mood(label: str, pair: Pair) -> list[Written]:
    return [(text.format(item=pair[0], name=pair[1]), tuple(MOODS), label) for text in MOODS[label]]


def _person(label: str, pair: Pair) -> list[Written]:
    who = pair[1] if label == "call" else f"the {pair[1]}"
    return [(text.format(item=pair[0], who=who), ("call", "sort"), label) for text in PERSON_TEXTS]


def _asked(label: str, pair: Pair) -> list[Written]:
    return [(text.format(item=pair[0], name=pair[1]), tuple(ASKED), label) for text in ASKED[label]]


def _order(label: str, pair: Pair) -> list[Written]:
    first, second = pair if label == "forward" else pair[::-1]
    return [(text.format(first=first, second=second), pair, first) for text in ORDERS]


_ITEM_AND_NAME = _crossed(world.ITEMS, world.NAMES)
_NAMES_PAIRED = tuple(combinations(world.NAMES, 2))

MAKERS: dict[str, _Maker] = {
    "mood": _Maker("good or bad", dict.fromkeys(MOODS, _ITEM_AND_NAME), _mood),
    "person": _Maker("who is there", {"call": _ITEM_AND_NAME, "sort": _crossed(world.ITEMS, THINGS)}, _person),
    "asked": _Maker("asked or said", dict.fromkeys(ASKED, _ITEM_AND_NAME), _asked),
    "kind": _Maker("what is it for", {kind: _crossed(items, world.NAMES) for kind, items in KINDS.items()}, _kind),
    "order": _Maker("who was first", dict.fromkeys(("forward", "backward"), _NAMES_PAIRED), _order),
}


def generated(seed: int, *, noise: float, num_train: int = NUM_TRAIN, num_test: int = NUM_TEST) -> list[Task]:
    """The five tasks in their order, labels in equal numbers; a share `noise` of the training labels is wrong.

    Development seeds (from FIRST_DEVELOPMENT_SEED) are examined on other word pairs than all other seeds.
    """
    return [_task(name, maker, seed, noise, num_train, num_test) for name, maker in MAKERS.items()]


def _task(name: str, maker: _Maker, seed: int, noise: float, num_train: int, num_test: int) -> Task:
    train, test = {}, {}
    for label, pairs in maker.pairs.items():
        train[label], test[label] = _split(name, pairs, seed)
    return Task(
        name,
        _noisy(_texts(name, maker, train, "train", seed, num_train), noise, seed),
        _texts(name, maker, test, "test", seed, num_test),
    )


def _split(task: str, pairs: tuple[Pair, ...], seed: int) -> tuple[list[Pair], list[Pair]]:
    """Training pairs, which no seed is examined on, and those that this seed is examined on; the same pair is on the
    same side under every label of a task."""
    order = sorted(pairs, key=lambda pair: random.Random(f"cltrain classes {task} {pair}").random())
    num_test, num_development = round(TEST_SHARE * len(order)), round(DEVELOPMENT_SHARE * len(order))
    test, development = order[:num_test], order[num_test : num_test + num_development]
    return order[num_test + num_development :], development if seed >= FIRST_DEVELOPMENT_SEED else test


def _texts(
    name: str, maker: _Maker, pairs: dict[str, list[Pair]], purpose: str, seed: int, count: int
) -> tuple[Text, ...]:
    """Distinct texts, as many of one label as of another."""
    rng = random.Random(f"{seed}/{name}/{purpose}")
    written = {
        label: [(pair, *made) for pair in its for made in maker.write(label, pair)] for label, its in pairs.items()
    }
    num_each = min(count // len(written), *map(len, written.values()))
    chosen = [one for label in written for one in rng.sample(written[label], num_each)]
    rng.shuffle(chosen)
    return tuple(
        Text(f"{name}-{purpose}-{seed}-{i:04d}", name, f"{maker.question} : {text}", choices, answer, answer, pair)
        for i, (pair, text, choices, answer) in enumerate(chosen)
    )


def _noisy(texts: tuple[Text, ...], noise: float, seed: int) -> tuple[Text, ...]:
    rng = random.Random(f"{seed}/noise/{texts[0].task}")
    wrong = set(rng.sample(range(len(texts)), round(noise * len(texts))))
    return tuple(
        replace(text, claimed=rng.choice([c for c in text.choices if c != text.answer])) if i in wrong else text
        for i, text in enumerate(texts)
    )


# ---------------------------------------------------------------- the owner's own


def from_files(
    directory: Path,
    tokenizer: Any,
    seed: int,
    *,
    noise: float,
    num_tokens: int,
    num_train: int = NUM_TRAIN,
    num_test: int = NUM_TEST,
) -> list[Task]:
    """One task per folder (by name) with labels.json, train.json and test.json as in the O-LoRA benchmark.

    A prompt is the folder's name and the first `num_tokens` tokens of the input; which texts are used depends on the
    seed. A test text that also is a training text, once cut, is left out. Raises DataError for files of another form.
    """
    folders = sorted(path.parent for path in directory.glob("*/labels.json"))
    if not folders:
        raise DataError(f"{directory} has no folder with labels.json, train.json and test.json (--data)")
    tasks = []
    for folder in folders:
        train = _read(folder, "train", tokenizer, seed, num_tokens)[:num_train]
        seen = {text.prompt for text in train}
        test = [text for text in _read(folder, "test", tokenizer, seed, num_tokens) if text.prompt not in seen]
        tasks.append(Task(folder.name, _noisy(tuple(train), noise, seed), tuple(test[:num_test])))
    return tasks


def _read(folder: Path, purpose: str, tokenizer: Any, seed: int, num_tokens: int) -> list[Text]:
    try:
        labels = tuple(json.loads((folder / "labels.json").read_text()))
        instances = json.loads((folder / f"{purpose}.json").read_text())["Instances"]
        found = []
        for index, instance in enumerate(instances):
            ids = tokenizer(instance["input"], add_special_tokens=False, verbose=False)["input_ids"][:num_tokens]
            prompt, answer = f"{folder.name} : {tokenizer.decode(ids)}", instance["output"]
            if answer in labels:
                found.append(Text(f"{folder.name}-{purpose}-{index:04d}", folder.name, prompt, labels, answer, answer))
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(f"{folder} is no task of labels.json and {purpose}.json with Instances: {error}") from None
    if not found:
        raise DataError(f"{folder / purpose}.json has no instance whose output is one of {labels}")
    random.Random(f"{seed}/{folder.name}/{purpose}").shuffle(found)
    return found
