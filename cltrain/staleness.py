"""What each example is learned by once base and incumbent are known. Whose log-probs a lone bad score is weighed by:
recorded ones while they are fresh, else the archived adapter's.

What is too old, or cannot be recomputed, is learned by its mark alone (kto); what has a partner that the base cannot
take, without it; and a note says why.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from cltrain.config import Config
from cltrain.errors import DataError, guarded
from cltrain.experience.baselines import usual_scores
from cltrain.experience.lanes import as_undesired, without_partner
from cltrain.models.adapter import read_adapter
from cltrain.models.base import Base
from cltrain.models.chat import UnfitPartner, render_example, render_rows
from cltrain.models.forward import check_row
from cltrain.models.scoring import token_log_probs
from cltrain.records import Aside, Example
from cltrain.registry import aliases, releases
from cltrain.store.database import Store


def settle(
    store: Store, config: Config, base: Base, incumbent: str, examples: Sequence[Example]
) -> tuple[list[Example], list[Aside]]:
    """The same examples, oldest first, with every policy one settled: its value the advantage over the usual score and
    its behaviour known, or turned into a kto one with a note. And those that teach nothing now: unusable.

    A score no worse than usual is no advantage that may be followed: it would make an answer likelier that somebody
    called wrong and nobody verified. A pair or a critique whose partner does not fit the base becomes what is left of
    it, also with a note.
    """
    policy = [example.record for example in examples if example.objective == "policy"]
    objectives, agent = config.trainer.objectives, config.agent
    usual = (
        usual_scores(store, agent.name, policy, learn_from=agent.learn_from, decay=objectives.baseline_decay)
        if policy
        else {}
    )
    lineage = aliases.ancestry(store, incumbent) if policy else []

    def one(example: Example) -> Example | str:
        if example.objective in ("dpo", "hindsight"):
            return _with_partner(config, base, example)
        if example.objective != "policy":
            return example
        if (why := _too_old(store, lineage, example, objectives.max_lag)) is not None:
            return _by_its_mark(example, config, why)
        advantage = example.value - usual[example.record]
        if advantage >= 0:
            return f"no worse than usual: its score is {example.value:g}, the mean {usual[example.record]:.3g}"
        return _with_behaviour(store, config, base, replace(example, value=advantage))

    settled: list[Example] = []
    aside: list[Aside] = []
    for example in examples:
        found = guarded(one, example)
        if isinstance(found, str):
            aside.append(Aside(example.record, "unusable", found))
        else:
            settled.append(found)
    return settled, aside


def _too_old(store: Store, lineage: Sequence[str], example: Example, max_lag: int) -> str | None:
    """Why its log-probs, recorded or not, say nothing of the incumbent."""
    name = example.release
    if name not in lineage:
        try:
            is_gone = name is None or releases.get(store, name).status == "deleted"
        except DataError:
            is_gone = True
        return f"its adapter is gone: {name}" if is_gone else f"its adapter is no ancestor of what serves: {name}"
    lag = lineage.index(name)
    return f"its adapter is too old: {name} is {lag} promotions behind" if lag > max_lag else None


def _with_partner(config: Config, base: Base, example: Example) -> Example | str:
    try:
        render_rows(base.tokenizer, base.context, example)
    except UnfitPartner as error:
        return without_partner(example, config.trainer.objectives, str(error))
    except DataError:
        pass  # the row itself: rendered once more with all others, set aside with its reason
    return example


def _with_behaviour(store: Store, config: Config, base: Base, example: Example) -> Example | str:
    assert example.prompt_ids is not None
    assert example.completion_ids is not None
    assert example.release is not None
    if example.behaviour is not None and len(example.behaviour) == len(example.completion_ids):
        return example
    try:
        release = releases.get(store, example.release)
        releases.verify_release(config.state_dir, release)
        directory = releases.release_dir(config.state_dir, release)
    except (DataError, OSError):
        return _by_its_mark(example, config, f"its adapter is gone: {example.release}")
    try:
        return replace(example, behaviour=_recomputed(base, directory, example))
    except DataError as error:  # too long for the base, not its ids, or no adapter that it can read
        return f"unusable: {error}"


def _recomputed(base: Base, directory: Path | None, example: Example) -> tuple[float, ...]:
    row = render_example(base.tokenizer, base.context, replace(example, objective="sft"))
    check_row(base, row)
    return tuple(token_log_probs(base, read_adapter(directory) if directory else None, [row])[0])


def _by_its_mark(example: Example, config: Config, why: str) -> Example | str:
    found = as_undesired(example, config.trainer.objectives, why)
    return found if isinstance(found, str) else replace(found, notes=(*found.notes, f"kto and no policy, {why}"))
