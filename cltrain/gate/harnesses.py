"""Inspect AI and lm-evaluation-harness behind the protocol of command suites (gate/commands.py).

Run as a file by whatever interpreter has the harness installed, so it imports nothing of cltrain: one JSON request on
stdin, JSON lines on stdout. What a harness cannot score is an error here; both would report a zero for some of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

LETTERS = {"C": 1.0, "P": 0.5, "I": 0.0, "N": 0.0}  # Inspect: correct, partially, incorrect, no answer
NO_ANSWER = "cltrain: no answer"
Row = dict[str, Any]


def list_inspect(options: Row) -> Iterator[Row]:
    """The ids of the task's samples, without running any."""
    with _inspect_log(options, model="mockllm/model", run_samples=False) as log:
        tag = f"inspect_ai {version('inspect_ai')}, task {log.eval.task_version}"
        for sample in log.eval.dataset.sample_ids or ():
            yield {"id": str(sample), "version": tag}


def score_inspect(options: Row, request: Row) -> Iterator[Row]:
    """Each wanted sample once, greedily, through the OpenAI-compatible endpoint; `metric` names the scorer."""
    with _inspect_log(options, model="mockllm/model", run_samples=False) as log:
        by_text = {str(sample): sample for sample in log.eval.dataset.sample_ids or ()}  # numbers there, texts here
    with _inspect_log(
        options,
        model=f"openai-api/cltrain/{request['model']}",
        model_base_url=request["base_url"],
        model_args={"api_key": request.get("api_key", "none")},
        sample_id=[by_text[one] for one in request["ids"]],
        fail_on_error=True,
        epochs=1,
        max_retries=1,
        temperature=0.0,
    ) as log:
        if log.status != "success":
            sys.exit(f"Inspect ended with status {log.status}: {log.error.message if log.error else 'no reason given'}")
        for sample in log.samples or ():
            if sample.output.empty or sample.output.stop_reason == "content_filter":
                sys.exit(f"sample {sample.id} was not answered")
            scores = {name: score.value for name, score in (sample.scores or {}).items()}
            value = _only(scores, options.get("metric"), f"sample {sample.id}")
            yield {"id": str(sample.id), "score": LETTERS.get(value, value) if isinstance(value, str) else value}


@contextmanager
def _inspect_log(options: Row, **more: Any) -> Iterator[Any]:
    """The log of one run; its samples are read from a file that is there until the block ends."""
    from inspect_ai import eval as run

    task, path = options.get("task"), options.get("path")
    where = f"{path}@{task}" if path and task else path or task
    with tempfile.TemporaryDirectory() as logs:
        (log,) = run(where, log_dir=logs, log_format="json", display="none", log_level="error", **more)
        yield log


def list_lm_eval(options: Row) -> Iterator[Row]:
    """The task's evaluation documents by number; an edited document is a new item."""
    _, task = _lm_eval_task(options)
    tag = f"lm_eval {version('lm_eval')}, task {task.VERSION}"
    for number, doc in enumerate(task.eval_docs):
        content = json.dumps(doc, sort_keys=True, default=str)
        yield {"id": str(number), "version": f"{tag}, {hashlib.sha256(content.encode()).hexdigest()[:16]}"}


def score_lm_eval(options: Row, request: Row) -> Iterator[Row]:
    """Each wanted document once, through the chat endpoint; `metric` is `name` or, where filters differ, `name,filter`.

    The endpoint gives no log-probs of a whole prompt in the form that the harness reads: tasks that generate only.
    """
    os.environ["LMEVAL_MODEL_NONE_ANSWER_PLACEHOLDER"] = NO_ANSWER  # else a missing answer is an empty one, scored zero
    from lm_eval import simple_evaluate

    name = options["task"]
    manager, task = _lm_eval_task(options)
    found = simple_evaluate(
        model="local-chat-completions",
        model_args={
            "model": request["model"],
            "base_url": f"{request['base_url']}/chat/completions",
            "header": {"Authorization": f"Bearer {request.get('api_key', 'none')}"},
            "tokenizer_backend": None,
            "num_concurrent": 1,
            "max_retries": 1,
        },
        tasks=[name],
        samples={name: sorted(int(one) for one in request["ids"])},  # in another order 0.4.13 swaps the numbers
        task_manager=manager,
        apply_chat_template=True,
        bootstrap_iters=0,
    )
    assert found is not None
    scores: dict[str, Row] = {}
    for row in found["samples"][name]:
        if row["doc"] != task.eval_docs[row["doc_id"]]:
            sys.exit(f"lm-eval calls a document of {name} number {row['doc_id']} that is another one")
        if any(answer in (None, NO_ANSWER) for answers in row["resps"] for answer in answers):
            sys.exit(f"document {row['doc_id']} of {name} was not answered")
        one = scores.setdefault(str(row["doc_id"]), {})
        one.update({f"{metric},{row['filter']}": row[metric] for metric in row["metrics"]})
    for doc, values in scores.items():
        yield {"id": doc, "score": _only(values, options.get("metric"), f"document {doc}")}


def _lm_eval_task(options: Row) -> tuple[Any, Any]:
    """The harness's index of tasks, with those of `path` in it, and the one that is meant."""
    from lm_eval.tasks import TaskManager

    manager, name = TaskManager(include_path=options.get("path")), options["task"]
    found = manager.load(name)["tasks"]
    if list(found) != [name]:
        sys.exit(f"{name} is no single task of lm-eval but a group: name one of {', '.join(found)}")
    return manager, found[name]


def _only(scores: Row, wanted: str | None, what: str) -> Any:
    """The one score that is meant: that of `metric`, else the only one there is."""
    named = {name: value for name, value in scores.items() if wanted in (None, name, name.partition(",")[0])}
    if len(named) != 1:
        sys.exit(f"{what} has the scores {', '.join(scores) or 'none'}: name one of them by `metric`, not {wanted!r}")
    (value,) = named.values()
    return value


def main() -> None:
    """argv: the harness and its options as JSON. Whatever the harness prints goes to stderr, stdout is the answer."""
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    harness, options, request = sys.argv[1], json.loads(sys.argv[2]), json.load(sys.stdin)
    listing, scoring = {"inspect": (list_inspect, score_inspect), "lm_eval": (list_lm_eval, score_lm_eval)}[harness]
    try:
        rows = list(listing(options) if request.get("list") else scoring(options, request))
    except ModuleNotFoundError as error:
        wanted = {"inspect": "inspect-ai openai", "lm_eval": "'lm-eval[api]'"}[harness]
        sys.exit(
            f"{error} in {sys.executable}: pip install {wanted} in an environment of its own, set `python` to that"
        )
    for row in rows:
        print(json.dumps(row), file=answer)
    answer.close()


if __name__ == "__main__":
    main()
