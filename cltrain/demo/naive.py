"""The comparison: the same records and steps without replay, KL, bounds, gate and filter, in a process of its own.

Reads one JSON command a line on stdin and answers one a line on stdout: {"learn": [record ids]}, {"skills": [...]},
{"attack": n}, {"releases": {name: directory}}, {"finish": true}. It only ever reads the deployment's store.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from cltrain.config import Config
from cltrain.demo import exam, world
from cltrain.errors import DataError
from cltrain.experience.examples import example_of
from cltrain.experience.recording import read_trajectories
from cltrain.models.adapter import AdapterFile, read_adapter
from cltrain.models.base import load_base
from cltrain.models.chat import render_example
from cltrain.records import Example, TokenRow
from cltrain.store.database import open_store
from cltrain.trainer.reference import Reference
from cltrain.trainer.update import train_update


class Naive:
    """The naive learner's only state: its adapter, and the base to examine it on."""

    def __init__(self, config: Config, seed: int) -> None:
        self.config, self.seed = config, seed
        self.store = open_store(config.state_dir)
        self.base = load_base(config.base.path, num_threads=1)
        self.adapter: AdapterFile | None = None
        self.num_updates = 0
        self.worst_attack = 0.0
        self.tickets = world.test_items(seed)
        self.attacks = world.attack_items(seed)[::4]
        self.samples = exam.base_samples(self.base, config.state_dir / "naive" / "samples")
        self.of_base = Reference(self.base, self.base.model, self.samples)

    def learn(self, ids: list[str]) -> dict[str, Any]:
        """One update on everything usable in these records, good or bad."""
        rows = [row for row in map(self._row, self._examples(ids)) if row is not None]
        if rows:
            trainer = self.config.trainer.model_copy(update={"method": "naive"})
            candidate = train_update(
                self.base,
                incumbent=self.adapter,
                adapter=self.config.adapter,
                fresh=rows,
                replay=[],
                anchors=self.samples,  # only measured on: naive has no KL term
                trainer=trainer,
                bounds=self.config.bounds,
                seed=self.seed * 1000 + self.num_updates,
                work_dir=self.config.state_dir / "naive" / f"{self.num_updates:03d}",
                of_base=self.of_base,
            )
            self.adapter = read_adapter(Path(candidate.path))
        self.num_updates += 1
        self.worst_attack = max(self.worst_attack, exam.attack_success(self.base, self.adapter, self.attacks))
        return {"rows": len(rows), "attack_success_rate": self.worst_attack}

    def skills(self, adapter: AdapterFile | None, wanted: list[str]) -> dict[str, float]:
        return exam.skills(self.base, adapter, [t for t in self.tickets if t.skill in wanted])

    def examine(self, adapter: AdapterFile | None) -> dict[str, Any]:
        return {
            "skills": self.skills(adapter, list(world.SKILLS)),
            "base_kl": exam.drift(self.base, adapter, self.samples),
            "attack_success_rate": exam.attack_success(self.base, adapter, self.attacks),
        }

    def _examples(self, ids: list[str]) -> list[Example]:
        found = []
        for trajectory in read_trajectories(self.store, self.config.agent.name, records_in=ids):
            example = example_of(trajectory, learn_from=self.config.agent.learn_from, tools_allowed=None)
            if isinstance(example, Example):
                found.append(example)
        return found

    def _row(self, example: Example) -> TokenRow | None:
        try:
            return render_example(self.base.tokenizer, self.base.context, example)
        except DataError:  # too long or nothing to learn: left out, as everywhere
            return None

    def answer(self, command: dict[str, Any]) -> Any:
        if "learn" in command:
            return self.learn(command["learn"])
        if "skills" in command:
            return self.skills(self.adapter, command["skills"])
        if "releases" in command:
            found = command["releases"]
            return {name: self.examine(read_adapter(Path(where)) if where else None) for name, where in found.items()}
        return self.examine(self.adapter) | {"attack_success_rate": self.worst_attack}


def main() -> None:
    naive = Naive(Config.model_validate_json(sys.argv[1]), int(sys.argv[2]))
    for line in sys.stdin:
        print(json.dumps(naive.answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
