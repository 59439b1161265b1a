"""A second kind of stream: short texts to be answered with one word, five tasks in turn, or the owner's own tasks.

Everything is a pure function of a seed. A task's training and test texts are made of different word pairs, whichever
the seed. The words are those that the demo's base was pretrained on; the questions and answers it has never seen.
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

NUM_TRAIN, NUM_TEST = 96, 60  # texts of each task
TEST_SHARE = 0.25  # of the word pairs


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

ORDERS = {
    True: ("{one} came before {two}", "{one} is here and {two} will come", "{two} came when {one} had left"),
    False: ("{one} came when {two} had left", "{one} will come , {two} is here", "{two} came before {one}"),
}


@dataclass(frozen=True)
class _Maker:
    """How one task is made: its word pairs, each under the label it allows, and a text with choices for a pair."""

    question: str
    pairs: dict[str, tuple[Pair, ...]]  # by label, or by what decides it
    write: Callable[[str, Pair, random.Random], tuple[str, tuple[str, ...], str]]  # text, choices, answer


def _crossed(left: Iterable[str], right: Iterable[str]) -> tuple[Pair, ...]:
    right = tuple(right)
    return tuple((one, two) for one in left for two in right)


def _kind(label: str, pair: Pair, rng: random.Random) -> tuple[str, tuple[str, ...], str]:
    return rng.choice(KIND_TEXTS).format(item=pair[0], name=pair[1]), tuple(KINDS), label


def _mood(label: str, pair: Pair, rng: random.Random) -> tuple[str, tuple[str, ...], str]:
    return rng.choice(MOODS[label]).format(item=pair[0], name=pair[1]), tuple(MOODS), label


def _person(label: str, pair: Pair, rng: random.Random) -> tuple[str, tuple[str, ...], str]:
    who = pair[1] if label == "call" else f"the {pair[1]}"
    return rng.choice(PERSON_TEXTS).format(item=pair[0], who=who), ("call", "sort"), label


def _asked(label: str, pair: Pair, rng: random.Random) -> tuple[str, tuple[str, ...], str]:
    return rng.choice(ASKED[label]).format(item=pair[0], name=pair[1]), tuple(ASKED), label


def _order(label: str, pair: Pair, rng: random.Random) -> tuple[str, tuple[str, ...], str]:
    one, two = pair if label == "forward" else pair[::-1]
    was_first = rng.random() < 0.5
    return rng.choice(ORDERS[was_first]).format(one=one, two=two), (one, two), one if was_first else two


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
    """The five tasks in their order, labels in equal numbers; a share `noise` of the training labels is wrong."""
    return [_task(name, maker, seed, noise, num_train, num_test) for name, maker in MAKERS.items()]


def _task(name: str, maker: _Maker, seed: int, noise: float, num_train: int, num_test: int) -> Task:
    train, test = {}, {}
    for label, pairs in maker.pairs.items():
        train[label], test[label] = _split(name, pairs)
    return Task(
        name,
        _noisy(_texts(name, maker, train, "train", seed, num_train), noise, seed),
        _texts(name, maker, test, "test", seed, num_test),
    )


def _split(task: str, pairs: tuple[Pair, ...]) -> tuple[list[Pair], list[Pair]]:
    """Training and test pairs; the same pair is on the same side under every label of a task, whatever the seed."""
    order = sorted(pairs, key=lambda pair: random.Random(f"cltrain classes {task} {pair}").random())
    num_test = round(TEST_SHARE * len(order))
    return order[num_test:], order[:num_test]


def _texts(
    name: str, maker: _Maker, pairs: dict[str, list[Pair]], purpose: str, seed: int, count: int
) -> tuple[Text, ...]:
    rng = random.Random(f"{seed}/{name}/{purpose}")
    labels = list(pairs)
    found = []
    for index in range(count):
        label = labels[index % len(labels)]
        pair = rng.choice(pairs[label])
        text, choices, answer = maker.write(label, pair, rng)
        prompt = f"{maker.question} : {text}"
        found.append(Text(f"{name}-{purpose}-{seed}-{index:04d}", name, prompt, choices, answer, answer, pair))
    rng.shuffle(found)
    return tuple(found)


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
