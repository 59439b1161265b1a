"""A whole update on a window that holds all five kinds, and how a lone bad score is weighed when it is old."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest

from cltrain import loop, plans, staleness
from cltrain.api import Deployment
from cltrain.demo import world
from cltrain.experience import window
from cltrain.experience.lanes import lane_of
from cltrain.loop import run_update
from cltrain.models.adapter import new_factors, write_adapter
from cltrain.models.chat import render_example
from cltrain.models.scoring import last_answer, token_log_probs
from cltrain.records import Aside, Example, Feedback, Generation, TokenRow, Trajectory
from cltrain.registry import aliases, releases
from tests.deployments import base_server, config_for, corrected, record, tickets, worker
from tests.test_unfinished import Killed, killed_at
from tests.windows import standing

OBJECTIVES = {"corrections": "dpo", "max_lag": 0}


def answered(base, ticket: world.Ticket, *said: Feedback, release: str | None = None, logprobs=None) -> Trajectory:
    """The ticket answered by the agent; with a release also its token ids, and log-probs where they were recorded."""
    answer = world.call_message({"name": "find", "arguments": ticket.expected["arguments"]}, "x")
    messages = (*ticket.messages, answer)
    made: tuple[Generation, ...] = ()
    if release is not None:
        turn = len(messages) - 1
        example = Example(ticket.id, "", "", messages, (turn,), tuple(world.TOOLS))
        prompt, completion = last_answer(render_example(base.tokenizer, base.context, example))
        made = (Generation(f"g-{ticket.id}", ticket.id, turn, release, prompt, completion, logprobs),)
    return Trajectory(
        id=ticket.id, agent="support", session=ticket.id, principal=ticket.principal, messages=messages,
        producers=(*("user" for _ in ticket.messages), "agent"), tools=tuple(world.TOOLS), generations=made,
        feedback=said, created_at=1.0,
    )  # fmt: skip


def scored(ticket, value):
    return Feedback(f"{ticket.id}-score", ticket.id, score=value, created_at=2.0)


@pytest.fixture
def made(tmp_path):
    """(config, deployment, worker) before anything is recorded."""
    with base_server() as url:
        config = config_for(
            tmp_path / "demo", url, trainer={"num_steps": 4, "objectives": OBJECTIVES},
            experience={"max_negative_share": 0.4, "principal_quota": 1.0},
        )  # fmt: skip
        deployment = Deployment(config)
        with worker(config, deployment.store) as learner:
            yield config, deployment, learner


def recomputed(base, trajectory):
    (generation,) = trajectory.generations
    row = TokenRow(
        "r", "s", "p", generation.prompt_ids + generation.completion_ids,
        (0.0,) * len(generation.prompt_ids) + (1.0,) * len(generation.completion_ids),
    )  # fmt: skip
    return tuple(token_log_probs(base, None, [row])[0])


def critique(ticket):
    return Feedback(f"{ticket.id}-t", ticket.id, text="repair it", source="operator", created_at=2.0)


def test_one_window_teaches_by_all_five_objectives_and_the_report_counts_them(made):
    config, deployment, learner = made
    base = learner.rooms.base
    serving = aliases.read_alias(deployment.store, "support").release
    pool = tickets("repair", 24)
    good, fixed, hinted, bad = pool[:8], pool[8:14], pool[14:17], pool[17:21]
    policy = answered(base, bad[0], scored(bad[0], -1.0), release=serving)
    logprobs = recomputed(base, answered(base, bad[1], release=serving))
    episodes = [
        *(answered(base, t, scored(t, 1.0)) for t in good),
        *(corrected(t) for t in fixed),
        *(
            answered(base, t, Feedback(f"{t.id}-t", t.id, text="repair it", source="operator", created_at=2.0))
            for t in hinted
        ),
        policy,
        answered(base, bad[1], scored(bad[1], -0.5), release=serving, logprobs=logprobs),
        answered(base, bad[2], scored(bad[2], -1.0)),
        answered(base, bad[3], scored(bad[3], -1.0), release="support-v000009-gone"),
    ]
    record(deployment.store, config, episodes)
    summary = learner.update()
    assert summary["window"]["objectives"] == {"sft": 8, "dpo": 6, "hindsight": 3, "policy": 2, "kto": 2}
    notes = {note: count for note, count in summary["window"]["notes"].items() if note != plans.DOUBTFUL}
    assert notes == {"kto and no policy, its adapter is gone": 1}
    assert summary["window"]["strata"]["find/bad"] == 7
    assert summary["candidate"] is not None, summary["reasons"]
    for name in ("nll_fresh", "loss_dpo", "loss_kto", "loss_policy", "loss_hindsight"):
        assert f"{name}_first" in summary["metrics"], name
    release = releases.get(deployment.store, summary["candidate"])
    assert release.manifest["objectives"] == summary["window"]["objectives"]
    assert "find/bad" not in release.manifest["taught"]
    page = (config.state_dir / "reports" / "support" / "update-000001.html").read_text()
    assert "hindsight" in page
    assert "its adapter is gone" in page


def test_a_window_of_failures_alone_is_a_hold_with_its_reason(made):
    config, deployment, learner = made
    record(deployment.store, config, [answered(None, t, scored(t, -1.0)) for t in tickets("repair", 12)])
    summary = learner.update()
    assert (summary["verdict"], summary["number"], summary["num_missing"]) == ("hold", None, 8)
    assert "12 only say what was wrong" in summary["reasons"][0]


def test_the_shares_are_of_what_is_learned_and_what_the_base_cannot_take_is_read_again_under_other_rules(made):
    config, deployment, learner = made
    experience = config.experience.model_copy(update={"max_negative_share": 0.25})
    learner.rooms.config = config = config.model_copy(update={"experience": experience})
    pool = tickets("repair", 16)
    filler = {"role": "user", "content": "really " * learner.rooms.base.context}
    long = [replace(e, messages=(filler, *e.messages), producers=("user", *e.producers)) for e in map(corrected, pool)]
    bad = [answered(None, t, scored(t, -1.0)) for t in pool[12:]]
    record(deployment.store, config, [*long[:8], *map(corrected, pool[8:12]), *bad])
    summary = learner.update()
    assert summary["num_window"] == 16
    assert summary["window"]["objectives"] == {"dpo": 4, "kto": 1}
    assert summary["window"]["set_aside"] == {"unusable": 8, "negative share": 3}
    filed = standing(deployment.store)
    assert Counter(status for record, (status, _) in filed.items() if record in {e.id for e in long[:8]}) == {
        "unusable": 8
    }
    rules = {"learn_from": config.agent.learn_from, "objectives": config.trainer.objectives}

    def readable(**changes):
        found = window.next_window(
            deployment.store, "support", config.experience, now=9e9, tools_allowed=None, **{**rules, **changes}
        )
        return {example.record for example in found.examples}

    assert not readable() & {e.id for e in long[:8]}
    assert readable(learn_from=("operator", "agent")) >= {e.id for e in long[:8]}


def test_without_likelihood_in_use_no_record_is_rehearsed(made):
    config, deployment, learner = made
    record(deployment.store, config, [corrected(t) for t in [*tickets("repair", 8), *tickets("gift", 4, seed=6)]])
    with deployment.store.write() as connection:
        for ticket in tickets("gift", 4, seed=6):
            window.mark(connection, "support", ticket.id, "replay", now=3.0, stratum="learned before")
    learner.rooms.on_progress = killed_at("trained 1 steps")

    def rehearsed(*use):
        objectives = config.trainer.objectives.model_copy(update={"use": use})
        trainer = config.trainer.model_copy(update={"objectives": objectives})
        learner.rooms.config = config.model_copy(update={"trainer": trainer})
        with pytest.raises(Killed):
            run_update(learner.rooms)
        (*_, latest) = sorted((config.state_dir / "updates").iterdir())
        return Counter(row["stratum"] for row in json.loads((latest / plans.ROWS_FILE).read_text())["replay"])

    own = rehearsed("dpo", "kto")
    assert own.total() > 0
    assert rehearsed("sft", "dpo", "kto") == own + Counter({"learned before": 4}), "else the owner's episodes alone"


# ---------------------------------------------------------------- staleness


def promoted(deployment, config, base, seed: int) -> str:
    """A release of random factors that a human put in front."""
    path = config.state_dir / f"candidate-{seed}"
    adapter = new_factors(base, 2, 4.0, ("q_proj",), seed)
    factors = {name: (a, a.new_ones(b.shape) * 0.02) for name, (a, b) in adapter.factors.items()}
    write_adapter(path, adapter.with_factors(factors))
    alias = aliases.read_alias(deployment.store, "support")
    made = releases.seal(deployment.store, config.state_dir, "support", path, alias.release, {}, now=1.0)
    with deployment.store.write() as connection:
        releases.change_status(connection, made.name, "released", now=1.0)
        connection.execute(
            aliases.update(aliases.aliases).where(aliases.aliases.c.agent == "support").values(release=made.name)
        )
    return made.name


def settled(deployment, config, base, *trajectories, **objectives):
    config = config.model_copy(
        update={
            "trainer": config.trainer.model_copy(
                update={"objectives": config.trainer.objectives.model_copy(update=objectives)}
            )
        }
    )
    record(deployment.store, config, trajectories)
    rules = {"learn_from": config.agent.learn_from, "tools_allowed": None}
    examples = [lane_of(t, config.trainer.objectives, **rules) for t in trajectories]
    serving = aliases.read_alias(deployment.store, "support").release
    return staleness.settle(deployment.store, config, base, serving, examples)


def test_ids_of_another_tokenizer_set_a_record_aside_alone(made):
    """Where log-probs were recorded as well, rendering finds it; where they must be recomputed, already settling."""
    config, deployment, learner = made
    base = learner.rooms.base
    serving = aliases.read_alias(deployment.store, "support").release
    pool = tickets("repair", 4)
    given = [answered(base, t, scored(t, -1.0), release=serving) for t in pool]
    strange = {1: (base.model.config.vocab_size,), 2: (-1,), 3: (-1,)}
    for i, ids in strange.items():
        (generation,) = given[i].generations
        logprobs = (-0.5,) * (len(generation.completion_ids) + 1) if i == 3 else None
        generation = replace(generation, completion_ids=generation.completion_ids + ids, logprobs=logprobs)
        given[i] = replace(given[i], generations=(generation,))
    examples, aside = settled(deployment, config, base, *given)
    rows, unusable = loop.render(base, examples)
    assert [row.record for row in rows] == [pool[0].id]
    for found, ticket in zip((*aside, *unusable), pool[1:], strict=True):
        assert ticket.id in str(found)
        assert "outside the base's vocabulary" in str(found)


def test_what_is_left_of_a_pair_or_critique_whose_partner_does_not_fit_is_learned_and_says_so(made):
    config, deployment, learner = made
    base = learner.rooms.base

    def settle(seed, **objectives):
        fixed, marked, unmarked, short = tickets("repair", 4, seed)
        pair = corrected(fixed)
        turn = pair.producers.index("agent")
        long = {"role": "assistant", "content": "word " * base.context}
        pair = replace(pair, messages=(*pair.messages[:turn], long, *pair.messages[turn + 1 :]))
        much = Feedback(f"{marked.id}-t", marked.id, text="word " * base.context, source="operator", created_at=2.0)
        critic = replace(much, id=f"{unmarked.id}-t", target=unmarked.id)
        given = [pair, answered(base, marked, much, scored(marked, -1.0)), answered(base, unmarked, critic)]
        examples, aside = settled(deployment, config, base, *given, corrected(short), **objectives)
        rows, unusable = loop.render(base, examples)
        assert [row.record for row in rows] == [e.record for e in examples]
        assert unusable == []
        return [(e.objective, e.value) for e in examples], [note for e in examples for note in e.notes], aside

    found, notes, aside = settle(5)
    assert found == [("sft", 1.0), ("kto", -1.0), ("dpo", 1.0)]
    assert notes[0].startswith("sft and no dpo, its rejected answer does not fit: ")
    assert notes[1].startswith("kto and no hindsight, its hinted self does not fit: ")
    assert [f"base takes {base.context}" in note for note in notes] == [True, True]
    assert len(aside) == 1
    assert "unusable: its hinted self does not fit" in str(aside)
    found, _, aside = settle(6, use=("dpo", "hindsight"))
    assert found == [("dpo", 1.0)]
    assert len(aside) == 3


def test_missing_log_probs_are_recomputed_under_the_adapter_that_answered(made):
    config, deployment, learner = made
    base = learner.rooms.base
    first = aliases.read_alias(deployment.store, "support").release
    second = promoted(deployment, config, base, 1)
    by_base, by_adapter, lone = tickets("repair", 3)
    old = answered(base, by_base, scored(by_base, -1.0), release=first)
    new = answered(base, by_adapter, scored(by_adapter, -1.0), release=second)
    given = answered(base, lone, scored(lone, -1.0), release=second, logprobs=(-0.5,) * 100)
    (one, two, three), aside = settled(deployment, config, base, old, new, given, max_lag=1)
    assert aside == []
    assert one.behaviour == pytest.approx(recomputed(base, old), abs=1e-5)
    far = max(abs(a - b) for a, b in zip(two.behaviour, recomputed(base, new), strict=True))
    assert far > 1e-3, "the adapter's log-probs are not the base's"
    assert len(three.behaviour) == len(three.completion_ids), "log-probs that do not fit the ids are none"


def test_advantages_are_against_the_scores_before_and_a_score_no_worse_than_usual_teaches_nothing(made):
    config, deployment, learner = made
    base = learner.rooms.base
    serving = aliases.read_alias(deployment.store, "support").release
    pool = tickets("repair", 3)
    given = [answered(base, t, scored(t, v), release=serving) for t, v in zip(pool, (-1.0, -0.75, -0.25), strict=True)]
    kept, aside = settled(deployment, config, base, *given, baseline_decay=0.5)
    assert [e.value for e in kept] == pytest.approx([-1.0, -0.25])
    assert aside == [Aside(pool[2].id, "unusable", "no worse than usual: its score is -0.25, the mean -0.625")]


def test_what_is_too_old_or_gone_is_learned_by_its_mark_and_says_why(made):
    config, deployment, learner = made
    base = learner.rooms.base
    first = aliases.read_alias(deployment.store, "support").release
    second = promoted(deployment, config, base, 1)
    promoted(deployment, config, base, 2)
    old, lost, foreign = tickets("repair", 3)
    directory = releases.release_dir(config.state_dir, releases.get(deployment.store, second))
    for file in directory.iterdir():
        directory.chmod(0o755)
        file.unlink()
    examples, _ = settled(
        deployment, config, base,
        answered(base, old, scored(old, -1.0), release=first),
        answered(base, lost, scored(lost, -1.0), release=second),
        answered(base, foreign, scored(foreign, -1.0), release="support-v000009-gone"),
        max_lag=1,
    )  # fmt: skip
    assert [(e.objective, e.value) for e in examples] == [("kto", -1.0)] * 3
    assert [e.notes[0].removeprefix("kto and no policy, its adapter is ") for e in examples] == [
        f"too old: {first} is 2 promotions behind", f"gone: {second}", "gone: support-v000009-gone"
    ]  # fmt: skip
    again = [replace(e, objective="policy", value=-1.0, release="nobody", notes=()) for e in examples[:1]]
    alone = config.trainer.model_copy(
        update={"objectives": config.trainer.objectives.model_copy(update={"use": ("sft", "policy")})}
    )
    only = config.model_copy(update={"trainer": alone})
    assert staleness.settle(deployment.store, only, base, first, again) == (
        [], [Aside(old.id, "unusable", "judged a failure, and no policy gradient: its adapter is gone: nobody")]
    )  # fmt: skip
