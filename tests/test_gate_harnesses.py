"""Inspect AI and lm-evaluation-harness as suites, run for real where an interpreter has them:

    CLTRAIN_HARNESS_PYTHON=/path/to/venv/bin/python pytest tests/test_gate_harnesses.py

(`pip install inspect-ai openai "lm-eval[api]"` there; seen with inspect_ai 0.3.285 and lm_eval 0.4.13.)
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from cltrain.config import GateConfig
from cltrain.errors import DataError, ServerError
from cltrain.gate.plugins import load_suites
from tests.judging import Reply, chat_server

PYTHON = os.environ.get("CLTRAIN_HARNESS_PYTHON")
CAPITALS = {"France": "Paris", "Italy": "Rome", "Spain": "Madrid"}

INSPECT = """
from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.scorer import includes

@task
def capitals():
    samples = [Sample(id=i + 1, input=f"Capital of {c}?", target=t) for i, (c, t) in enumerate(CAPITALS.items())]
    return Task(dataset=samples, scorer=includes())
"""
LM_EVAL = """
task: capitals
dataset_path: json
dataset_kwargs: {data_files: FILE}
test_split: train
output_type: generate_until
doc_to_text: "Capital of {{country}}?"
doc_to_target: "{{capital}}"
generation_kwargs: {until: [], max_gen_toks: 16}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
metadata: {version: 1.0}
"""


def table(kind: str, tmp_path: Path) -> dict[str, Any]:
    if kind == "inspect":
        path = tmp_path / "capitals.py"
        path.write_text(f"CAPITALS = {CAPITALS!r}\n{INSPECT}")
    else:
        path = tmp_path / "tasks"
        path.mkdir()
        rows = [json.dumps({"country": country, "capital": capital}) for country, capital in CAPITALS.items()]
        (path / "capitals.jsonl").write_text("\n".join(rows))
        (path / "capitals.yaml").write_text(LM_EVAL.replace("FILE", str(path / "capitals.jsonl")))
    return {"name": "ext", "kind": kind, "task": "capitals", "path": str(path), "python": PYTHON}


@pytest.mark.skipif(PYTHON is None, reason="CLTRAIN_HARNESS_PYTHON names no interpreter that has the harnesses")
@pytest.mark.parametrize("kind", ["inspect", "lm_eval"])
def test_a_harness_scores_each_item_by_its_own_number_and_fails_where_nobody_answers(kind: str, tmp_path: Path) -> None:
    broken: list[Reply] = []

    def answer(request: dict[str, Any]) -> Reply:
        asked = request["messages"][-1]["content"]
        asked = asked if isinstance(asked, str) else asked[0]["text"]
        assert (request["model"], request["temperature"]) == ("support-v1", 0)
        if "Spain" in asked:
            return broken[-1] if broken else "Lisbon"
        return next(capital for country, capital in CAPITALS.items() if country in asked)

    found = load_suites(GateConfig(suites=[table(kind, tmp_path)]), has_other_items=True)  # type: ignore[arg-type]
    france, italy, spain = found.items
    assert [item.rule["id"] for item in found.items] == (["1", "2", "3"] if kind == "inspect" else ["0", "1", "2"])
    program = found.programs["ext"]
    with chat_server(answer) as server:
        assert program.score(server.url, "support-v1", [spain, france], "the key") == [0.0, 1.0]  # in this order
        assert {h.get("authorization", h.get("Authorization")) for h in server.headers} == {"Bearer the key"}
        broken.append(500)
        with pytest.raises(ServerError, match="exit code"):
            program.score(server.url, "support-v1", [italy, spain])
        broken.append({"message": {"role": "assistant", "content": None}, "finish_reason": "content_filter"})
        with pytest.raises((ServerError, DataError), match="was not answered"):
            program.score(server.url, "support-v1", [spain])
