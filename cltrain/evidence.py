"""What the gate asks of servers and trainer, wired to one deployment: answers, log-probs, the pool of questions."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Protocol

from cltrain.config import Config
from cltrain.deploy.client import AllScores, Answers
from cltrain.deploy.preflight import check_adapter
from cltrain.errors import CltrainError, DataError, ServerError, guarded
from cltrain.experience import window
from cltrain.experience.examples import example_of
from cltrain.experience.recording import load_secret, read_trajectories
from cltrain.experience.screens import Suspicion
from cltrain.gate.character import Asked, look_at_character
from cltrain.gate.commands import CommandSuite
from cltrain.gate.detectors import note_signs, watcher
from cltrain.gate.http_judge import HttpJudge
from cltrain.gate.judge import Contest, Look, judge
from cltrain.gate.levels import read_past
from cltrain.gate.plugins import contents_of, load_suites
from cltrain.gate.probes import load_character
from cltrain.gate.rows import Arriving
from cltrain.gate.scoring import Reply, Scoring
from cltrain.gate.secrets import Text, look_at_secrets
from cltrain.gate.spectrum import Delta, Features, features_of, look_at_spectrum, minus
from cltrain.gate.suites import is_taught
from cltrain.gate.triggers import Said, Suspect
from cltrain.gate.vault import split_vault
from cltrain.models.adapter import read_adapter
from cltrain.models.base import Base, stop_ids
from cltrain.models.chat import render_example, render_prompt
from cltrain.models.scoring import last_answer
from cltrain.records import Check, Code, Decision, Example, Message, Release, SuiteItem, Tool, Verdict
from cltrain.registry import aliases, releases
from cltrain.store.database import Store

MOST_SPECTRA = 64  # accepted updates, the newest, that the weights of a new one are compared with


class Answering(Protocol):
    """Whoever answers as a release: one server, or its replicas."""

    model: str

    @property
    def url(self) -> str: ...
    def url_for(self, model: str) -> str: ...
    def name_of(self, model: str) -> str: ...
    def generate_many(
        self, model: str, prompts: Sequence[tuple[Sequence[Message], Sequence[Tool]]], max_tokens: int, concurrency: int
    ) -> Answers: ...
    def score_many(self, model: str, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> AllScores: ...


class Evidence:
    """The gate's view of one deployment; holds the owner's suites. What is wrong with them is said when it is made."""

    def __init__(
        self,
        config: Config,
        store: Store,
        base: Base,
        server: Answering,
        on_progress: Callable[[str], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.config, self.store, self.base, self.server = config, store, base, server
        self.on_progress, self.clock = on_progress, clock
        grader = HttpJudge(config.gate.judge) if config.gate.judge is not None else None
        self.scoring = Scoring(store, config.gate, self.ask, judge=grader, on_answers=self.note_signs)
        self._contents: Mapping[str, str] = {}
        self.read_suites()
        self.character = load_character(config.gate.character)
        self._spectra: dict[str, Features] = {}

    def read_suites(self) -> None:
        """Read the suites again where their files changed, so that nothing is compared with scores of other content.
        Raises what `load_suites` does, a file that is not the pinned one among it."""
        gate = self.config.gate
        if self._contents and contents_of(gate) == self._contents:
            return
        suites = load_suites(gate, has_other_items=self.config.experience.eval_share > 0)
        self.suite, self._contents = list(suites.items), suites.contents
        self.scoring.programs = {name: partial(self.run_program, one) for name, one in suites.programs.items()}

    def judge(
        self,
        candidate: str,
        incumbent: str,
        *,
        taught: Collection[str],
        suspicious: Sequence[Suspicion] = (),
        base_kl: float,
        seed: int,
        used_before: Sequence[str] = (),
        is_retry: bool = False,
    ) -> Decision:
        """The gate's decision on a candidate that the server has loaded. A retry is judged on items not used before."""
        try:
            self.read_suites()
        except CltrainError as error:
            code = Code.SUITE if isinstance(error, DataError) else Code.OUTAGE
            return Decision(Verdict.ERROR, (str(error),), (), codes=(code,))
        agent = self.config.agent.name
        held_out, arriving = self.held_out()
        marks = aliases.read_references(self.store, agent)
        gate = self.config.gate
        return judge(
            self.store,
            agent,
            Contest(candidate, incumbent, marks.high_water, marks.anchor),
            self.split_vault([*self.pool(incumbent, taught), *held_out])[0],
            gate,
            taught=taught,
            scoring=self.scoring,
            base_kl=base_kl,
            score_many=self.score_many,
            suspects=[self.suspect(suspicion) for suspicion in suspicious],
            arriving=arriving,
            seed=seed,
            used_before=used_before,
            fresh_only=is_retry,
            past=read_past(self.store, agent, gate.track_window),
            looks=self.looks(),
            watch=watcher(self.store, agent, taught, gate.detectors, gate.alpha) if gate.detectors.use else None,
            on_chunk=lambda done, planned: self.on_progress(f"{candidate}: judged on {done} of {planned} items"),
        )

    def unsound(self, directory: Path) -> Decision | None:
        """Why an adapter's file must not even be loaded: the decision that says so, or None."""
        try:
            check_adapter(
                directory, base_dir=self.base.path, base_digest=self.base.digest,
                trusted=self.config.signing.all_trusted,
            )  # fmt: skip
        except DataError as error:
            return Decision(Verdict.ERROR, (str(error),), (), codes=(Code.INTEGRITY,))
        return None

    def looks(self) -> list[Look]:
        """What is looked at before any item is asked, cheap first."""
        return [self.at_spectrum, self.at_secrets, self.at_character()]

    def at_spectrum(self, contest: Contest) -> list[Check]:
        """The weights of the candidate's update beside those of the other accepted ones."""
        if not self.config.gate.detectors.use:
            return []
        released = releases.list_releases(self.store, self.config.agent.name, status="released")
        steps = [r for r in released if r.path and r.name != contest.candidate]
        known = len(steps) >= self.config.gate.detectors.spectrum_history
        history = [self.step_features(r.name) for r in steps[-MOST_SPECTRA:]] if known else [{} for _ in steps]
        now = self.step_features(contest.candidate) if known else {}
        return [look_at_spectrum(now, history, self.config.gate.detectors)]

    def at_secrets(self, contest: Contest) -> list[Check]:
        """What canaries forbid to say, by its likelihood."""
        base = releases.list_releases(self.store, self.config.agent.name)[0].name
        return look_at_secrets(
            [item for item in self.suite if item.kind == "canary"], self.store, self.score_texts,
            candidate=contest.candidate, incumbent=contest.incumbent, base=base,
            limit=self.config.gate.canary_exposure,
        )  # fmt: skip

    def at_character(self, *, is_against_base: bool = False) -> Look:
        """`is_against_base`: the incumbent is the base, and what one step may lose is what all of them may."""
        limits = self.config.gate.character
        if is_against_base:
            limits = limits.model_copy(update={"probe_fall": limits.probe_drift})

        def look(contest: Contest) -> list[Check]:
            base = releases.list_releases(self.store, self.config.agent.name)[0].name
            asked = Asked(
                self.store, contest.candidate, contest.incumbent, base, self.scoring.answer_many, self.score_many,
                self.config.gate.max_answer_tokens,
            )  # fmt: skip
            return look_at_character(self.character, asked, limits, self.config.gate.alpha)

        return look

    def step_features(self, name: str) -> Features:
        """What the spectrum of one update is: its adapter less its parent's, read once per release."""
        if name not in self._spectra:
            release = releases.get(self.store, name)
            parent = self._deltas(release.parent) if release.parent else {}
            self._spectra[name] = features_of(minus(self._deltas(name), parent))
        return self._spectra[name]

    def _deltas(self, name: str) -> dict[str, Delta]:
        directory = releases.release_dir(self.config.state_dir, releases.get(self.store, name))
        if directory is None or not directory.is_dir():
            return {}
        adapter = read_adapter(directory)
        return {m: (a.numpy(), adapter.scale * b.numpy()) for m, (a, b) in adapter.factors.items()}

    def held_out(self) -> tuple[list[SuiteItem], Arriving]:
        """Items of the evaluation split as it stands now, and of each stratum how many episodes came in lately."""
        agent = self.config.agent
        items, rate_per_s = window.heldout_items(
            self.store, agent.name, self.config.experience, learn_from=agent.learn_from,
            tools_allowed=agent.tools_allowed, now=self.clock(),
        )  # fmt: skip
        episodes: dict[str, set[str]] = defaultdict(set)
        for item in items:
            episodes[item.stratum].add(item.cluster or item.id)
        num_episodes = len(set().union(*episodes.values()))
        of_stratum = {item.stratum: item for item in items}
        arriving = [
            (item, rate_per_s * len(episodes[name]) / num_episodes) for name, item in of_stratum.items() if rate_per_s
        ]
        return [item for item in items if self.can_ask(item)], arriving

    def split_vault(self, items: Sequence[SuiteItem]) -> tuple[list[SuiteItem], list[SuiteItem]]:
        """What gates may draw, and what only the vault asks (gate/vault.py)."""
        share = self.config.gate.vault_share
        return split_vault(items, load_secret(self.config.state_dir), share) if share else (list(items), [])

    def can_ask(self, item: SuiteItem) -> bool:
        """Whether prompt and answer fit the base: one imported episode that is too long must not fail every gate."""
        prompt = guarded(render_prompt, self.base.tokenizer, item.messages, item.tools)
        return not isinstance(prompt, str) and len(prompt) + self.config.gate.max_answer_tokens <= self.base.context

    def pool(self, incumbent: str, taught: Collection[str]) -> list[SuiteItem]:
        """The owner's items that this update may gain or lose: gain items of a skill that neither it nor any update
        behind the incumbent was taught measure luck, and luck is nothing to protect."""
        earned = set(taught).union(*(release.manifest.get("taught", ()) for release in self.lineage(incumbent)))
        return [item for item in self.suite if item.kind != "gain" or is_taught(item.stratum, earned)]

    def lineage(self, name: str) -> list[Release]:
        """The release and those that it grew from, newest first."""
        found: list[Release] = []
        parent: str | None = name
        while parent is not None:
            found.append(releases.get(self.store, parent))
            parent = found[-1].parent
        return found

    def ask(self, release: str, items: Sequence[SuiteItem]) -> list[Reply]:
        """One greedy answer per item, by exactly that release, and whether it ended because it was too long."""
        prompts = [(item.messages, item.tools) for item in items]
        answers = self.server.generate_many(
            self.served_name(release), prompts, self.config.gate.max_answer_tokens, self.config.server.max_batch
        )
        if any(answer.finish_reason is None for answer in answers):
            raise ServerError(
                f"{self.server.url} does not say why an answer ended (finish_reason): it may have been cut"
            )
        return [Reply(answer.message, answer.finish_reason == "length") for answer in answers]

    def note_signs(self, release: str, items: Sequence[SuiteItem], answers: Sequence[Message]) -> None:
        """What the detectors will want to know of answers whose scores are kept."""
        if self.config.gate.detectors.use:
            note_signs(self.store, release, items, answers, self.config.gate.detectors)

    def run_program(self, program: CommandSuite, release: str, items: Sequence[SuiteItem]) -> list[float]:
        """The scores that a program of the owner gives to that release, which it asks through the server itself."""
        model = self.served_name(release)
        url, key = self.server.url_for(model), self.config.server.api_key
        return program.score(f"{url}/v1", self.server.name_of(model), items, key)

    def score_many(self, release: str, said: Sequence[Said]) -> list[float]:
        """Summed log-prob of each answer's tokens, nats."""
        pairs = []
        for messages, tools, answer in said:
            example = Example("probe", "gate", "probe", (*messages, answer), (len(messages),), tuple(tools))
            pairs.append(last_answer(render_example(self.base.tokenizer, self.base.context, example)))
        return [sum(scores) for scores in self.server.score_many(self.served_name(release), pairs)]

    def score_texts(self, release: str, texts: Sequence[Text]) -> list[float]:
        """Summed log-prob of each text's tokens after the first (of all, where it has one), nats, at the beginning of
        an answer that need not end there."""
        stops, pairs = stop_ids(self.base), []
        for item, text in texts:
            said: Message = {"role": "assistant", "content": text}
            example = Example("probe", "gate", "probe", (*item.messages, said), (len(item.messages),), item.tools)
            prompt, answer = last_answer(render_example(self.base.tokenizer, self.base.context, example))
            words = list(takewhile(lambda token: token not in stops, answer))
            pairs.append((prompt, words) if len(words) < 2 else ((*prompt, words[0]), words[1:]))
        return [sum(scores) for scores in self.server.score_many(self.served_name(release), pairs)]

    def suspect(self, suspicion: Suspicion) -> Suspect:
        """What the scan flagged, with the prompts that the phrase stands in and what its records claim to be right."""
        agent, items = self.config.agent, []
        flagged = list(suspicion.records)  # of tenants, where it was proposed by them
        for trajectory in read_trajectories(self.store, agent.name, records_in=flagged, with_tenants=True):
            example = example_of(trajectory, learn_from=agent.learn_from, tools_allowed=agent.tools_allowed)
            if isinstance(example, Example):
                turn = example.targets[0]
                prompt, claimed = example.messages[:turn], example.messages[turn]
                item = SuiteItem(example.record, "flagged", example.stratum, "gain", prompt, example.tools, claimed)
                items += [item] if self.can_ask(item) else []
        return Suspect(suspicion.phrase, suspicion.action, tuple(items))

    def served_name(self, release: str) -> str:
        """The bare base answers under the server's own name for it."""
        return self.server.model if releases.get(self.store, release).path is None else release
