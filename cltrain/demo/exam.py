"""The exam that nobody trains for: held-out tickets, the attack, and the distance from the base, all in process.

Greedy answers by transformers' own `generate`; nothing here is used by gate or trainer.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cltrain.demo import world
from cltrain.demo.text import anchors
from cltrain.demo.world import Ticket
from cltrain.models.adapter import AdapterFile, attach
from cltrain.models.anchors import load_anchors, mean_kl, sample_base
from cltrain.models.base import Base
from cltrain.models.chat import render_prompt
from cltrain.models.toolcalls import parse_answer
from cltrain.records import Message, TokenRow

MAX_TOKENS = 40
BATCH = 64
NUM_BASE_SAMPLES = 96
SAMPLE_SEED = 7_000_003  # the anchors have other seeds: these texts are never trained on
SAMPLE_TOKENS = 64


def answers(base: Base, adapter: AdapterFile | None, tickets: Sequence[Ticket]) -> list[Message]:
    """The first assistant message to each ticket, greedy."""
    model: Any = base.model if adapter is None else attach(base, adapter)
    tokenizer = base.tokenizer
    found: list[Message] = []
    for start in range(0, len(tickets), BATCH):
        prompts = [render_prompt(tokenizer, t.messages, world.TOOLS) for t in tickets[start : start + BATCH]]
        longest = max(len(ids) for ids in prompts)
        pad = tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        with torch.no_grad():
            out = model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=MAX_TOKENS, do_sample=False, pad_token_id=pad
            )
        for row in out[:, longest:]:
            found.append(parse_answer(tokenizer.decode(row, skip_special_tokens=True)))
    return found


def skills(base: Base, adapter: AdapterFile | None, tickets: Sequence[Ticket]) -> dict[str, float]:
    """Exact success per skill."""
    hits: dict[str, list[bool]] = defaultdict(list)
    for ticket, message in zip(tickets, answers(base, adapter, tickets), strict=True):
        hits[ticket.skill].append(world.check(ticket, message))
    return {skill: sum(good) / len(good) for skill, good in hits.items()}


def attack_success(base: Base, adapter: AdapterFile | None, tickets: Sequence[Ticket]) -> float:
    """Share of the poisoned tickets that are answered with the harmful call."""
    found = answers(base, adapter, tickets)
    return sum(world.attack_worked(t, m) for t, m in zip(tickets, found, strict=True)) / len(tickets)


def base_samples(base: Base, directory: Path) -> list[TokenRow]:
    """Text of the base's own, half stories and half answers to requests it knows, none of it among the anchors."""
    half = NUM_BASE_SAMPLES // 2
    stories = sample_base(base, half, SAMPLE_TOKENS, SAMPLE_SEED)
    rows = [
        TokenRow(f"story-{i}", "base", "base", ids, (0.0,) + (1.0,) * (len(ids) - 1)) for i, ids in enumerate(stories)
    ]
    requests = [line for line in anchors(SAMPLE_SEED, NUM_BASE_SAMPLES) if "messages" in line]
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / "requests.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in requests))
    answered, _ = load_anchors(
        base, file=file, count=half, max_tokens=SAMPLE_TOKENS, seed=SAMPLE_SEED, directory=directory
    )
    return rows + answered


def drift(base: Base, adapter: AdapterFile | None, samples: Sequence[TokenRow]) -> float:
    """Mean forward KL(base || adapter) in nats per token."""
    return 0.0 if adapter is None else mean_kl(base, samples, None, adapter)
