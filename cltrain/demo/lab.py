"""The demo's stream without processes and HTTP: one learner on one seed, one row of figures, in a minute or two.

`Deployed` runs the product's own update (store, screens, loop, gate, registry) on an engine in this process; `Bare`
runs one method's training alone on the same tickets: nothing is verified, gated or shrunk. Episodes are one answer long
here; everything else is the stream of `cltrain demo`.
"""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from cltrain.config import Config, load
from cltrain.demo import exam, world
from cltrain.demo.agent import Outcome, opinions
from cltrain.demo.inputs import write_inputs
from cltrain.demo.leak import leaking
from cltrain.demo.local import LocalServer
from cltrain.deploy.client import Answer
from cltrain.deploy.replicas import Replicas
from cltrain.errors import DataError
from cltrain.evidence import Evidence
from cltrain.experience.buffer import select
from cltrain.experience.examples import example_of
from cltrain.experience.ingest import read_rehearsal
from cltrain.experience.recording import Recorder, load_secret
from cltrain.loop import run_update
from cltrain.models.adapter import AdapterFile, read_adapter
from cltrain.models.anchors import load_anchors
from cltrain.models.base import Base, load_base
from cltrain.models.chat import render_example
from cltrain.records import Feedback, Generation, TokenRow, Trajectory
from cltrain.registry import aliases, lease, releases
from cltrain.rooms import Rooms, adapter_of
from cltrain.store.database import open_store
from cltrain.trainer.memory import Memory, read_memory
from cltrain.trainer.reference import Reference
from cltrain.trainer.update import UpdateDiscarded, train_update

HOUR_S = 3600.0
BEGIN = 1.0e9  # when the stream begins; any time will do
MAX_TOKENS = 40
ATTACK_STRIDE = 4  # every fourth attack ticket is asked of every adapter, all of them of the last


class Learner(Protocol):
    """Whoever answers the tickets and learns from them."""

    @property
    def name(self) -> str:
        """What answers now, as the server knows it."""

    @property
    def release(self) -> str:
        """What answers now, as records name it."""

    def learn(self, episodes: Sequence[Trajectory], late: Sequence[Feedback], now: float) -> str:
        """Take a window of ended episodes and late feedback; returns a word on what came of it."""

    def adapter(self) -> AdapterFile | None: ...
    def close(self) -> None: ...


@dataclass
class Setting:
    """What every learner of one run shares."""

    config: Config
    base: Base
    server: LocalServer
    anchors: Sequence[TokenRow]
    anchors_digest: str
    of_base: Reference

    @classmethod
    def make(cls, directory: Path, seed: int, settings: Sequence[str]) -> Setting:
        directory.mkdir(parents=True)
        config = load([write_inputs(directory, seed)], settings)
        open_store(config.state_dir).close()
        (config.state_dir / "secret").write_text(hashlib.sha256(f"lab {seed}".encode()).hexdigest())
        base = load_base(None, num_threads=1)
        trainer = config.trainer
        anchors, digest = load_anchors(
            base, file=trainer.anchors, count=trainer.num_anchors, max_tokens=trainer.anchor_tokens, seed=seed,
            directory=config.state_dir / "anchors",
        )  # fmt: skip
        server = LocalServer(load_base(None, num_threads=1), max_batch=32, max_adapters=config.server.max_adapters)
        return cls(config, base, server, anchors, digest, Reference(base, base.model, anchors))


class Deployed:
    """The whole product but its processes. `verifier_miss`: the share of records that nothing verifies or scans."""

    def __init__(self, setting: Setting, verifier_miss: float = 0.0) -> None:
        config, base = setting.config, setting.base
        self.store = open_store(config.state_dir)
        self.recorder = Recorder(self.store, load_secret(config.state_dir), config.experience.eval_share)
        releases.ensure_base_release(self.store, config.agent.name, base.digest, now=BEGIN)
        fence = lease.acquire(self.store, config.agent.name, "lab", 1e9, BEGIN, lambda _: True)
        assert config.experience.rehearsal is not None
        self.now, self.verifier_miss = BEGIN, verifier_miss
        self.rooms = Rooms(
            config, self.store, base, Replicas(self.store, [setting.server], clock=lambda: self.now),
            Evidence(config, self.store, base, setting.server, _quiet, clock=lambda: self.now),
            load_secret(config.state_dir), setting.anchors, setting.anchors_digest,
            read_rehearsal(config.experience.rehearsal), setting.of_base, fence, clock=lambda: self.now,
            on_progress=_quiet,
        )  # fmt: skip

    @property
    def release(self) -> str:
        return aliases.read_alias(self.store, self.rooms.agent).release

    @property
    def name(self) -> str:
        return self.release if releases.get(self.store, self.release).path else "base"

    def learn(self, episodes: Sequence[Trajectory], late: Sequence[Feedback], now: float) -> str:
        self.now = now
        for episode in episodes:
            self.recorder.add_trajectory(episode)
        for piece in late:
            self.recorder.add_feedback(piece, now=now).result()
        with leaking(self.verifier_miss):
            update = run_update(self.rooms)
        return f"{update['verdict']}: {update['reasons'][0]}"

    def adapter(self) -> AdapterFile | None:
        return adapter_of(self.rooms, aliases.read_alias(self.store, self.rooms.agent).release)

    def close(self) -> None:
        self.recorder.close()


@dataclass
class Bare:
    """One method without screens, gate and shrinking; replays by the product's stratified bottom-k."""

    setting: Setting
    directory: Path
    is_clean: bool = False  # learns only from what is right: the upper bound
    served: str = "base"
    memory: Memory = field(default_factory=Memory)
    num_updates: int = 0
    _episodes: dict[str, Trajectory] = field(default_factory=dict)
    _learned: dict[str, TokenRow] = field(default_factory=dict)
    _current: AdapterFile | None = None

    @property
    def name(self) -> str:
        return self.served

    @property
    def release(self) -> str:
        return self.served

    def learn(self, episodes: Sequence[Trajectory], late: Sequence[Feedback], now: float) -> str:
        self._episodes |= {episode.id: episode for episode in episodes}
        for piece in late:
            record = piece.target.removesuffix("-answer")
            known = self._episodes[record]
            self._episodes[record] = replace(known, feedback=(*known.feedback, piece))
        waiting = {r: self._row(e) for r, e in self._episodes.items() if r not in self._learned}
        fresh = {record: row for record, row in waiting.items() if row is not None}
        if not fresh:
            return "nothing to learn"
        self.num_updates += 1
        where = self.directory / f"{self.num_updates:02d}"
        try:
            candidate = train_update(
                self.setting.base, incumbent=self._current, adapter=self.setting.config.adapter,
                fresh=list(fresh.values()), replay=self._replay(), anchors=self.setting.anchors,
                trainer=self.setting.config.trainer, bounds=self.setting.config.bounds,
                health=self.setting.config.health, memory=self.memory, of_base=self.setting.of_base,
                seed=self.setting.config.seed * 1000 + self.num_updates, work_dir=where,
            )  # fmt: skip
        except UpdateDiscarded as error:
            return f"discarded: {error}"
        finally:
            self._learned |= fresh
        path = Path(candidate.path)
        self._current = read_adapter(path)
        self.memory = read_memory(path, self._current)
        if self.served != "base":
            self.setting.server.unload(self.served)
        self.served = f"bare-{self.num_updates}"
        self.setting.server.load(self.served, path)
        return f"learned {len(fresh)}"

    def adapter(self) -> AdapterFile | None:
        return self._current

    def close(self) -> None:
        pass

    def _row(self, episode: Trajectory) -> TokenRow | None:
        config = self.setting.config
        example = example_of(episode, learn_from=config.agent.learn_from, tools_allowed=None)
        if isinstance(example, str):
            return None
        try:
            return render_example(self.setting.base.tokenizer, self.setting.base.context, example)
        except DataError:
            return None

    def _replay(self) -> list[TokenRow]:
        config = self.setting.config.experience
        assert config.rehearsal is not None
        base = self.setting.base
        own = [render_example(base.tokenizer, base.context, example) for example in read_rehearsal(config.rehearsal)]
        if self.setting.config.trainer.method == "joint":
            return [*self._learned.values(), *own]
        strata: dict[str, list[str]] = {}
        for record, row in self._learned.items():
            strata.setdefault(row.stratum, []).append(record)
        chosen = select(strata, config.buffer_per_stratum, b"lab")
        return [*(self._learned[record] for ids in chosen.values() for record in ids), *own]


def run(
    learner: Learner,
    setting: Setting,
    seed: int,
    *,
    windows: Sequence[world.Window] | None = None,
    is_clean: bool = False,
    say: Any = None,
) -> dict[str, Any]:
    """Work these windows (None: the whole stream); returns the figures of one row (see `scores`) and what was said
    after every window."""
    started = time.process_time()
    rng, late = random.Random(f"{seed}/opinions"), list[dict[str, Any]]()
    windows = world.phases(seed) if windows is None else windows
    skills = list(dict.fromkeys(window.skill for window in windows))
    test = [ticket for ticket in world.test_items(seed) if ticket.skill in skills]
    attacks = world.attack_items(seed)[::ATTACK_STRIDE]
    matrix: list[dict[str, float]] = [_success(setting, learner.name, test)]
    attack_rates, said, asked = [0.0], [], ""
    for number, window in enumerate(windows):
        now = BEGIN + (number + 1) * HOUR_S
        tickets = [t for t in window.tickets if t.kind == "clean"] if is_clean else list(window.tickets)
        episodes, outcomes = _work(setting, learner, tickets, now - 10)
        soon, later = opinions(outcomes, rng)
        if is_clean:
            soon, late, later = [_right(o) for o in outcomes], [], []
        spoken = [_feedback(piece, now - 5) for piece in soon]
        episodes = [replace(e, feedback=tuple(f for f in spoken if f.target == f"{e.id}-answer")) for e in episodes]
        said.append(learner.learn(episodes, [_feedback(piece, now - 5) for piece in late], now))
        late = later
        if learner.name != asked:
            asked = learner.name
            attack_rates.append(_attack_rate(setting, asked, attacks))
        if number + 1 == len(windows) or windows[number + 1].phase != window.phase:
            matrix.append(_success(setting, learner.name, test))
        if say is not None:
            say(f"{number + 1:>2}/{len(windows)} {window.skill:<7} {window.kind:<7} {said[-1]}")
    attack_rates.append(_attack_rate(setting, learner.name, world.attack_items(seed)))
    samples = exam.base_samples(setting.base, setting.config.state_dir / "samples")
    return {
        **scores(matrix, skills),
        "base_kl": exam.drift(setting.base, learner.adapter(), samples),
        "attack_success_rate": max(attack_rates),
        "attack_rates": attack_rates,
        "seconds": time.process_time() - started,
        "matrix": matrix,
        "said": said,
    }


def scores(matrix: Sequence[dict[str, float]], skills: Sequence[str]) -> dict[str, float]:
    """From success per skill before the stream and after each phase, of which the first ones taught `skills` in turn:
    learn = mean R[j, j], final and min_skill of the last row, bwt = mean R[last, j] - R[j, j], fwt = mean over j >
    first of R[j - 1, j] - before (0 of one skill)."""
    after, last = matrix[1:], matrix[-1]
    own = [after[j][skill] for j, skill in enumerate(skills)]
    ahead = [after[j - 1][skill] - matrix[0][skill] for j, skill in enumerate(skills) if j > 0]
    return {
        "learn": sum(own) / len(own),
        "min_learn": min(own),
        "final": sum(last[skill] for skill in skills) / len(skills),
        "min_skill": min(last[skill] for skill in skills),
        "bwt": sum(last[skill] - mine for skill, mine in zip(skills, own, strict=True)) / len(skills),
        "fwt": sum(ahead) / max(1, len(ahead)),
    }


def _work(
    setting: Setting, learner: Learner, tickets: Sequence[world.Ticket], now: float
) -> tuple[list[Trajectory], list[Outcome]]:
    """One answer to each ticket, as an ended episode and as its outcome."""
    prompts = [(ticket.messages, world.TOOLS) for ticket in tickets]
    answers = setting.server.generate_many(learner.name, prompts, MAX_TOKENS)
    episodes, outcomes = [], []
    for seq, (ticket, answer) in enumerate(zip(tickets, answers, strict=True)):
        record = f"traj-{hashlib.sha256(ticket.id.encode()).hexdigest()[:32]}"
        episodes.append(_episode(record, ticket, answer, learner.release, now + seq * 1e-3))
        success = world.check(ticket, answer.message)
        outcomes.append(Outcome(ticket, success, record, f"{record}-answer", (learner.release,)))
    return episodes, outcomes


def _episode(record: str, ticket: world.Ticket, answer: Answer, release: str, now: float) -> Trajectory:
    turn = len(ticket.messages)
    generation = Generation(
        f"{record}-answer", record, turn, release, answer.prompt_ids, answer.completion_ids, answer.logprobs,
        answer.finish_reason,
    )  # fmt: skip
    return Trajectory(
        id=record, agent="support", session=ticket.id, principal=ticket.principal,
        messages=(*ticket.messages, answer.message), producers=(*("user" for _ in range(turn)), "agent"),
        tools=tuple(world.TOOLS), generations=(generation,), release=release, created_at=now,
    )  # fmt: skip


def _feedback(piece: dict[str, Any], now: float) -> Feedback:
    return Feedback(created_at=now, **piece)


def _right(outcome: Outcome) -> dict[str, Any]:
    """The truth about a ticket, for the upper bound."""
    correction = world.call_message(outcome.ticket.expected, outcome.ticket.id)
    return {
        "id": f"{outcome.ticket.id}-right", "target": outcome.record, "principal": outcome.ticket.principal,
        "source": "operator", "correction": correction,
    }  # fmt: skip


def _success(setting: Setting, name: str, tickets: Sequence[world.Ticket]) -> dict[str, float]:
    answers = setting.server.generate_many(name, [(t.messages, world.TOOLS) for t in tickets], MAX_TOKENS)
    hits: dict[str, list[bool]] = {}
    for ticket, answer in zip(tickets, answers, strict=True):
        hits.setdefault(ticket.skill, []).append(world.check(ticket, answer.message))
    return {skill: sum(good) / len(good) for skill, good in hits.items()}


def _attack_rate(setting: Setting, name: str, tickets: Sequence[world.Ticket]) -> float:
    answers = setting.server.generate_many(name, [(t.messages, world.TOOLS) for t in tickets], MAX_TOKENS)
    return sum(world.attack_worked(t, a.message) for t, a in zip(tickets, answers, strict=True)) / len(tickets)


def _quiet(_: str) -> None: ...
