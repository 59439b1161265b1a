"""How good the agent's work of a kind usually is: what a bad score is compared with, so that one sample can teach.

The running mean of REINFORCE with a group of one, in the order in which the episodes began.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sqlalchemy import and_, exists, select

from cltrain.errors import guarded
from cltrain.experience.examples import decisive, first_tool, score_of, unfit
from cltrain.experience.reading import read_trajectories
from cltrain.records import Trajectory
from cltrain.store.database import Store
from cltrain.store.schema import feedback, records

NUM_READ = 400  # scored records before the newest one asked for: what came earlier has faded


def usual_scores(
    store: Store, agent: str, wanted: Sequence[str], *, learn_from: Sequence[str], decay: float
) -> dict[str, float]:
    """For each wanted record the mean score of its kind of work before it, from the agent's training split.

    A kind of work is the first tool that the episode's listed answers call; good and bad scores count alike.
    """
    is_scored = exists().where(feedback.c.record == records.c.id, feedback.c.score.is_not(None))
    with store.read() as connection:
        last = connection.scalar(select(records.c.seq).where(records.c.id.in_(wanted)).order_by(records.c.seq.desc()))
        is_known = and_(records.c.agent == agent, records.c.split == "train", records.c.seq <= (last or 0), is_scored)
        newest = select(records.c.id).where(is_known).order_by(records.c.seq.desc()).limit(NUM_READ)
        ids = list(connection.scalars(newest))
    trajectories = read_trajectories(store, agent, records_in=[*ids, *wanted])
    scored = [guarded(_scored, trajectory, learn_from) for trajectory in trajectories]
    means = baselines([one for one in scored if isinstance(one, tuple)], decay)
    return {record: means.get(record, 0.0) for record in wanted}


def baselines(scored: Iterable[tuple[str, str, float]], decay: float) -> dict[str, float]:
    """For each (record, kind, score), in time order, the exponential mean of its kind before it; 0 before any score."""
    means: dict[str, float] = {}
    before: dict[str, float] = {}
    for record, kind, score in scored:
        before[record] = means.get(kind, 0.0)
        means[kind] = decay * before[record] + (1 - decay) * score
    return before


def _scored(trajectory: Trajectory, learn_from: Sequence[str]) -> tuple[str, str, float] | None:
    said = decisive(trajectory.feedback)
    answers = [
        message
        for message, producer in zip(trajectory.messages, trajectory.producers, strict=True)
        if message.get("role") == "assistant" and producer in learn_from
    ]
    if said is None or not answers or unfit(trajectory):
        return None
    return trajectory.id, first_tool(answers), score_of(said)
