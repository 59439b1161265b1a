"""What tenants learned, each for itself, as a proposal to the shared agent: only what several of them have.

A stratum is proposed when at least `tenants.min_contributors` tenants learned it, by updates that served. Of its
records those are left out that hold a word which fewer of them have: a name, a secret, a phrase of one tenant alone.
What is left is judged as any update, by `stricter` rules. It stays with its tenants: the update's reads name their
records.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import select

from cltrain.config import Config
from cltrain.experience import buffer
from cltrain.experience.verify import text_of
from cltrain.records import Aside, Example, LearningMode, Message, TokenRow, Verdict
from cltrain.registry import aliases, releases
from cltrain.registry.tenants import tenants_in
from cltrain.store.database import Store
from cltrain.store.schema import releases as release_rows
from cltrain.store.schema import screenings, updates

WORD = re.compile(r"[^\W_]+")
MAX_DIGITS = 6  # a longer number is taken literally: of an account, a card, a telephone


@dataclass(frozen=True, slots=True)
class Proposal:
    """`examples` have their tenant's agent as principal; `contributors` by stratum; `refused` says why
    another stratum is not proposed, and `num_missing` how many tenants the nearest of them lacks."""

    examples: tuple[Example, ...]
    contributors: dict[str, list[str]]
    set_aside: tuple[Aside, ...]
    refused: tuple[str, ...]
    num_missing: int = 0


def stricter(config: Config) -> Config:
    """What the shared agent judges a proposal by: a gain must be shown at a level that is `share_strictness` times as
    small, no tenant has more of it than one of `min_contributors`, and a person says yes."""
    tenants, mode = config.tenants, config.agent.mode
    if mode is LearningMode.AUTO and tenants.share_needs_yes:
        mode = LearningMode.APPROVE
    quota = min(config.experience.principal_quota, 1 / tenants.min_contributors)
    alpha = config.gate.alpha / tenants.share_strictness
    num_items = math.ceil(config.gate.items_per_gate * math.log(alpha) / math.log(config.gate.alpha))  # as many more
    gate = {"alpha": alpha, "items_per_gate": num_items, "promote_on": "gain"}
    return config.model_copy(
        update={
            "agent": config.agent.model_copy(update={"mode": mode}),
            "gate": config.gate.model_copy(update=gate),
            "experience": config.experience.model_copy(update={"principal_quota": quota}),
        }
    )


def propose(store: Store, config: Config, serving: str, strata: Sequence[str] = ()) -> Proposal:
    """What may be proposed to the shared agent that serves `serving`, of these strata (none: of all)."""
    known = set(_shared_before(store, config.agent.name, serving))
    found: defaultdict[str, dict[str, list[Example]]] = defaultdict(dict)
    with store.read() as connection:
        tenants = tenants_in(connection, config.agent.name)
    for tenant in tenants:
        ids = [record for record in _learned_by(store, tenant) if record not in known]
        for example in _examples(store, config, tenant, ids):
            found[example.stratum].setdefault(tenant, []).append(replace(example, principal=tenant))
    proposal = chosen(found, config.tenants.min_contributors, strata)
    return replace(proposal, examples=tuple(in_turn(proposal.examples)[: config.experience.max_window]))


def chosen(found: Mapping[str, Mapping[str, Sequence[Example]]], k: int, strata: Sequence[str] = ()) -> Proposal:
    """Of stratum -> tenant -> examples what at least `k` tenants have in common. `strata` that nobody learned are
    refused like those that too few did."""
    examples: list[Example] = []
    contributors: dict[str, list[str]] = {}
    aside: list[Aside] = []
    refused: list[str] = []
    num_missing: list[int] = []
    for stratum in sorted(set(strata) or set(found)):
        had = found.get(stratum, {})
        common, rare = in_common(had, k) if len(had) >= k else (had, [])
        if len(common) < k:
            num_missing.append(k - len(common))
            refused.append(_too_few(stratum, sorted(had), len(common), k))
            continue
        examples += [example for some in common.values() for example in some]
        contributors[stratum] = sorted(common)
        aside += [Aside(one.record, "waiting", "has a word that too few tenants have") for one in rare]
    return Proposal(
        tuple(examples), contributors, tuple(aside), tuple(refused), min(num_missing, default=0) if not examples else 0
    )


def in_turn(examples: Sequence[Example]) -> list[Example]:
    """One of each stratum and tenant after the other, as long as each has any: whatever it is cut to is as even as it
    can be."""
    nth: Counter[tuple[str, str]] = Counter()
    order: list[tuple[int, int]] = []
    for index, example in enumerate(examples):
        nth[example.stratum, example.principal] += 1
        order.append((nth[example.stratum, example.principal], index))
    return [examples[index] for _, index in sorted(order)]


def in_common(had: Mapping[str, Sequence[Example]], k: int) -> tuple[dict[str, list[Example]], list[Example]]:
    """Each tenant's examples all of whose words at least `k` of these tenants use, and the others.

    In what is asked, and in what an answer copies from there, short numbers count as alike: orders and dates differ.
    What an answer says of itself counts letter by letter, because that is what would be learned.
    """
    users: defaultdict[str, set[str]] = defaultdict(set)
    for tenant, examples in had.items():
        for example in examples:
            for word in _words([*example.messages, {"content": json.dumps(example.tools)}]):
                users[word].add(tenant)
                users[_shape(word)].add(tenant)

    def is_common(example: Example) -> bool:
        own = {word for turn in example.targets for word in _words(example.messages[turn : turn + 1])}
        around = _words(m for i, m in enumerate(example.messages) if i not in example.targets)
        around |= _words([{"content": json.dumps(example.tools)}])
        said = (own - around) | {_shape(word) for word in around}
        return all(len(users[word]) >= k for word in said)

    common = {tenant: [one for one in examples if is_common(one)] for tenant, examples in had.items()}
    rare = [one for examples in had.values() for one in examples if not is_common(one)]
    return {tenant: some for tenant, some in common.items() if some}, rare


def by_enough(rows: Sequence[TokenRow], k: int) -> tuple[list[TokenRow], list[Aside]]:
    """The rows of strata in which at least `k` tenants are left after all that was set aside, and the others."""
    tenants: defaultdict[str, set[str]] = defaultdict(set)
    for row in rows:
        tenants[row.stratum].add(row.principal)
    kept = [row for row in rows if len(tenants[row.stratum]) >= k]
    few = {row.record: row.stratum for row in rows if len(tenants[row.stratum]) < k}
    return kept, [
        Aside(one, "waiting", f"fewer than {k} tenants are left in {stratum}") for one, stratum in few.items()
    ]


def rehearsed(store: Store, config: Config, serving: str, secret: bytes) -> list[Example]:
    """What was shared by updates behind `serving` and its tenants still rehearse: so does the shared agent."""
    ids = set(_shared_before(store, config.agent.name, serving))
    if not ids:
        return []
    with store.read() as connection:
        tenants = tenants_in(connection, config.agent.name)
    found = {e.record: e for tenant in tenants for e in _examples(store, config, tenant, sorted(ids))}
    strata: defaultdict[str, list[str]] = defaultdict(list)
    for record, example in found.items():
        strata[example.stratum].append(record)
    kept = buffer.select(strata, config.experience.buffer_per_stratum, secret)
    return [found[record] for _, records in sorted(kept.items()) for record in records]


def not_proposed(agent: str, serving: str, proposal: Proposal, min_window: int) -> dict[str, Any]:
    """The answer where fewer than `min_window` records can be proposed: a hold without a number."""
    num_found = len(proposal.examples)
    reasons = list(proposal.refused)
    if num_found:
        missing = f"{min_window - num_found} are missing (experience.min_window)"
        reasons.append(f"{num_found} records may be shared, {missing}")
    return {
        "agent": agent, "number": None, "verdict": str(Verdict.HOLD), "candidate": None, "serving": serving,
        "reasons": reasons or ["no tenant has learned anything that it was served"],
        "num_missing": proposal.num_missing or min_window - num_found, "forecast_s": None,
    }  # fmt: skip


def _too_few(stratum: str, had: Sequence[str], num_left: int, k: int) -> str:
    rule = f"{k - num_left} missing (tenants.min_contributors = {k})"
    if num_left < len(had) and len(had) >= k:
        return f"{stratum}: {len(had)} tenants learned it, {num_left} with words that {k} of them have: {rule}"
    return f"{stratum}: {len(had)} tenants learned it ({', '.join(had) or 'none'}): {rule}"


def _learned_by(store: Store, tenant: str) -> list[str]:
    """The tenant's records that a release which still may serve was taught, and that are rehearsed."""
    served = (
        select(updates.c.id)
        .join(release_rows, release_rows.c.name == updates.c.candidate)
        .where(updates.c.agent == tenant, release_rows.c.status == "released")
    )
    query = select(screenings.c.record).where(
        screenings.c.agent == tenant, screenings.c.status == "replay", screenings.c["update"].in_(served)
    )
    with store.read() as connection:
        return sorted(connection.scalars(query))


def _shared_before(store: Store, agent: str, serving: str) -> list[str]:
    """Records of tenants that the releases behind `serving` were taught."""
    behind = (releases.get(store, name) for name in aliases.ancestry(store, serving))
    return [
        record
        for one in behind
        if one.agent == agent and one.manifest.get("shared")
        for record in one.manifest["learned"]
    ]


def _examples(store: Store, config: Config, tenant: str, ids: Sequence[str]) -> list[Example]:
    agent = config.agent
    return buffer.learned_examples(store, tenant, ids, learn_from=agent.learn_from, tools_allowed=agent.tools_allowed)


def _words(messages: Iterable[Message]) -> set[str]:
    said = []
    for message in messages:
        functions = (call.get("function") or {} for call in message.get("tool_calls") or ())
        calls = " ".join(f"{f.get('name')} {f.get('arguments')}" for f in functions)
        said.append(f"{text_of(message)} {calls}")
    return {word.casefold() for word in WORD.findall(" ".join(said))}


def _shape(word: str) -> str:
    """The word with its digits alike; a longer number is itself."""
    num_digits = sum(character.isdigit() for character in word)
    return re.sub(r"\d", "0", word) if num_digits <= MAX_DIGITS else word
