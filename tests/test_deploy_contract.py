"""What a server that takes adapters at run time must do, asked of three real ones, ours, mistral.rs and vLLM, and of a
stand-in for SGLang."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from cltrain.api import Deployment
from cltrain.config import from_dict
from cltrain.deploy import probes, proof
from cltrain.deploy.preflight import check_adapter
from cltrain.deploy.residents import reconcile
from cltrain.doctor import examine
from cltrain.errors import DataError, ServerError
from cltrain.models.adapter import AdapterFile, read_adapter
from cltrain.models.base import Base, load_base
from cltrain.models.chat import render_example
from cltrain.models.digest import adapter_digest, shipped_base
from cltrain.models.scoring import last_answer, token_log_probs
from cltrain.records import Example, TokenRow
from cltrain.registry import releases
from cltrain.rooms import NOISE
from tests.deployments import config_for, corrected, record, tickets, worker
from tests.engines import KINDS, MAX_ADAPTERS, VLLM_PYTHON, Served
from tests.serving import TARGETS, random_adapter

ASK = [{"role": "user", "content": "please refund the order A17"}]
TALK = (
    ("where is my order ?", "the lamp is on its way to anna ."),
    ("please refund the vase", "no , the vase was sold to jack ."),
    ("what is in the box ?", "two pens and a much too small lamp"),
)
NUM_STREAMED = 150  # tokens: many times what an unload takes

Weights = dict[str, np.ndarray[Any, Any]]


def _marks(engine: str) -> list[pytest.MarkDecorator]:
    return [pytest.mark.vllm, pytest.mark.timeout(1200)] if engine == "vllm" else []


on_each = pytest.mark.parametrize("served", [pytest.param(e, id=e, marks=_marks(e)) for e in KINDS], indirect=True)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Served]]:
    """One server of each kind that is asked for, for the whole file."""
    running: dict[str, Served] = {}

    def get(engine: str) -> Served:
        if engine == "vllm" and not VLLM_PYTHON.is_file():
            give_up = pytest.fail if "CLTRAIN_VLLM_PYTHON" in os.environ else pytest.skip
            give_up(f"there is no vLLM at {VLLM_PYTHON}: scripts/test --vllm installs it and runs this")
        if engine not in running:
            running[engine] = Served(KINDS[engine], shipped_base())
        return running[engine]

    yield get
    for served in running.values():
        served.close()


@pytest.fixture
def served(request: pytest.FixtureRequest, fleet: Callable[[str], Served]) -> Iterator[Served]:
    """The server that the test names, without adapters."""
    served = fleet(request.param)
    yield served
    for name in served.client.list():
        served.client.unload(name)


@dataclass(frozen=True)
class Version:
    name: str
    path: Path
    weights: AdapterFile


@pytest.fixture(scope="module")
def base() -> Base:
    return load_base(None)


@pytest.fixture(scope="module")
def versions(base: Base, tmp_path_factory: pytest.TempPathFactory) -> tuple[Version, Version]:
    """Two releases under names that are never used again."""
    found = []
    for number in (1, 2):
        path = random_adapter(base, tmp_path_factory.mktemp("adapters") / str(number), number)
        name = f"support-v{number:06d}-{adapter_digest(path)[:12]}"
        found.append(Version(name, path, read_adapter(path)))
    first, second = found
    return first, second


@pytest.fixture(scope="module")
def rows(base: Base) -> list[TokenRow]:
    """What proofs are made of: rendered talks whose answers carry weight."""
    found = []
    for number, (asked, said) in enumerate(TALK):
        messages = ({"role": "user", "content": asked}, {"role": "assistant", "content": said})
        found.append(render_example(base.tokenizer, base.context, Example(str(number), "p", "s", messages, (1,))))
    return found


def prove(
    served: Served,
    name: str,
    base: Base,
    weights: AdapterFile,
    rows: Sequence[TokenRow],
    trained_on: Base | None = None,
) -> proof.Proof:
    """As after every rollout: the server's log-probs against the trainer's own forward; the bare base served before."""
    expected = token_log_probs(trained_on or base, weights, rows)
    of_base = token_log_probs(base, None, rows)
    return proof.prove(
        served.client, name, "base", [last_answer(row) for row in rows], expected, of_base, NOISE["float32"]
    )


def stream(served: Served, model: str) -> Iterator[tuple[str, tuple[float, ...]]]:
    """Text and log-probs of every chunk of a long greedy answer, as they arrive."""
    body = {
        "model": served.client.name_of(model),
        "messages": ASK,
        "max_tokens": NUM_STREAMED,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "logprobs": True,
    }
    with httpx.stream("POST", f"{served.client.url}/v1/chat/completions", json=body, timeout=300) as response:
        assert response.status_code == 200
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line[6:])
            assert chunk.get("model") == body["model"], chunk
            (choice,) = chunk["choices"]
            entries = (choice.get("logprobs") or {}).get("content") or ()
            yield choice["delta"].get("content") or "", tuple(entry["logprob"] for entry in entries)


def whole(chunks: Iterable[tuple[str, tuple[float, ...]]]) -> tuple[str, list[float]]:
    """What the chunks say together: how many tokens share one is a matter of timing."""
    texts, logprobs = zip(*chunks, strict=True)
    return "".join(texts), [value for part in logprobs for value in part]


@on_each
def test_every_version_answers_under_its_own_name(served, versions):
    for version in versions:
        served.client.load(version.name, version.path)
    assert served.client.list() == {version.name: str(version.path) for version in versions}
    answers = [served.client.generate(name, ASK, max_tokens=12) for name in ("base", *served.client.list())]
    assert [answer.model for answer in answers] == ["base", *(version.name for version in versions)]
    assert len({answer.completion_ids for answer in answers}) == 3


@on_each
def test_a_load_may_be_repeated(served, versions):
    first, _ = versions
    served.client.load(first.name, first.path)
    served.client.load(first.name, first.path)
    assert served.client.list() == {first.name: str(first.path)}


@on_each
def test_a_name_is_never_given_to_another_directory(served, versions):
    first, second = versions
    served.client.load(first.name, first.path)
    with pytest.raises(ServerError, match="already serves"):
        served.client.load(first.name, second.path)
    assert served.client.list() == {first.name: str(first.path)}


@on_each
def test_an_unknown_adapter_is_an_error_and_never_the_base(served, versions, rows, tmp_path):
    first, _ = versions
    with pytest.raises(ServerError, match=r"does not (exist|list)"):
        served.client.generate(first.name, ASK, max_tokens=1)
    with pytest.raises(ServerError, match=r"does not (exist|list)"):
        served.client.score_many(first.name, [last_answer(rows[0])])
    with pytest.raises(ServerError, match="did not load"):
        served.client.load(first.name, tmp_path / "nowhere")
    served.client.unload(first.name)
    assert served.client.list() == {}


@on_each
def test_an_unload_leaves_a_running_stream_as_it_was(served, versions):
    first, _ = versions
    served.client.load(first.name, first.path)
    whole(stream(served, first.name))  # whatever a first request warms up
    reference = whole(stream(served, first.name))
    running = stream(served, first.name)
    begun = next(running)
    served.client.unload(first.name)
    with pytest.raises(ServerError, match=r"404|does not list"):
        served.client.generate(first.name, ASK, max_tokens=1)
    assert served.client.list() == {}
    assert whole([begun, *running]) == reference
    assert len(reference[1]) > NUM_STREAMED // 2


@on_each
def test_log_probs_are_the_trainers_own(served, base, versions, rows):
    got = served.client.score_many("base", [last_answer(row) for row in rows])
    for ours, expected in zip(got, token_log_probs(base, None, rows), strict=True):
        assert ours == pytest.approx(expected, abs=NOISE["float32"])
    for version in versions:
        served.client.load(version.name, version.path)
        found = prove(served, version.name, base, version.weights, rows)
        assert found.verdict == "proved"
        assert found.max_error <= NOISE["float32"] < 100 * NOISE["float32"] < found.separation


@on_each
def test_another_versions_weights_under_the_name_are_not_proved(served, base, versions, rows):
    first, second = versions
    served.client.load(first.name, second.path)
    with pytest.raises(proof.NotProvedError, match="neither it nor the incumbent fits"):
        prove(served, first.name, base, first.weights, rows)


@on_each
def test_a_rollback_answers_as_before(served, versions):
    first, second = versions
    served.client.load(first.name, first.path)
    before = [served.client.generate(first.name, ASK, max_tokens=40) for _ in range(2)]
    served.client.load(second.name, second.path)
    other = served.client.generate(second.name, ASK, max_tokens=40)
    after = served.client.generate(first.name, ASK, max_tokens=40)
    assert other.completion_ids != after.completion_ids
    assert after == before[1]
    assert after.logprobs is not None


@on_each
def test_a_restarted_server_gets_its_adapters_back(served, versions):
    wanted = {version.name: version.path for version in versions}
    assert reconcile(served.client, wanted) == tuple(wanted)
    before = {name: served.client.generate(name, ASK, max_tokens=12).completion_ids for name in wanted}
    served.restart()
    assert served.client.list() == {}
    with pytest.raises(ServerError, match=r"404|does not list"):
        served.client.generate(versions[0].name, ASK, max_tokens=1)
    assert reconcile(served.client, wanted) == tuple(wanted)
    assert reconcile(served.client, wanted) == ()
    assert {name: served.client.generate(name, ASK, max_tokens=12).completion_ids for name in wanted} == before


def _wrong_prefix(weights: Weights) -> Weights:
    return {name.replace("base_model.model.model.", "base_model.model."): value for name, value in weights.items()}


def _wrong_shape(weights: Weights) -> Weights:
    return {k: v[:, : v.shape[1] // 2].copy() if k.endswith("lora_A.weight") else v for k, v in weights.items()}


def _one_layer_only(weights: Weights) -> Weights:
    return {name: value for name, value in weights.items() if ".layers.0." in name}


def _nan(weights: Weights) -> Weights:
    name = sorted(weights)[-1]
    return {**weights, name: np.full_like(weights[name], np.nan)}


def damaged(whole: Path, directory: Path, change: Callable[[Weights], Weights]) -> Path:
    shutil.copytree(whole, directory)
    file = directory / "adapter_model.safetensors"
    with safe_open(file, "np") as opened:
        metadata = opened.metadata()
    save_file(change(load_file(file)), file, metadata=metadata)
    return directory


on_vllm = pytest.mark.parametrize("served", [pytest.param("vllm", id="vllm", marks=_marks("vllm"))], indirect=True)


@on_vllm
def test_the_doctor_finds_nothing_bad_with_a_vllm_that_is_started_as_we_say(served, tmp_path):
    served.client.check_takes(8, TARGETS, MAX_ADAPTERS)
    assert served.client._send("GET", "/metrics").text.count('engine="0"') > 0, "or data parallel would not be seen"
    server = {"kind": "vllm", "url": served.client.url, "model": "base", "max_adapters": MAX_ADAPTERS}
    found = [one for one in examine(from_dict({"home": str(tmp_path), "server": server})) if one["what"] == "server"]
    assert [one["detail"] for one in found if one["state"] == "bad"] == []
    assert [one for one in found if "/v1/load_lora_adapter" in one["detail"] and one["state"] == "note"]
    assert [one for one in found if "a model name that is a path is unknown there" in one["detail"]]


@on_vllm
def test_a_whole_update_of_the_worker_is_loaded_proved_and_judged_there(served, tmp_path):
    server = {"kind": "vllm", "url": served.client.url, "model": "base", "max_adapters": MAX_ADAPTERS}
    config = config_for(tmp_path, served.client.url, server=server, gate={"items_per_gate": 80})
    deployment = Deployment(config)
    record(deployment.store, config, [corrected(ticket) for ticket in tickets("repair", 24)])
    with worker(config, deployment.store) as learner:
        summary = learner.update()
        name = summary["candidate"]
        assert (summary["proof"], summary["verdict"] in ("promote", "hold")) == ("proved", True), summary["reasons"]
        kept = probes.kept_of(deployment.store, name)
        directory = releases.release_dir(config.state_dir, releases.get(deployment.store, name))
        served.client.load(name, directory)
        assert probes.prove_on(served.client, name, "base", kept).verdict == "proved"
        other = random_adapter(learner.rooms.base, tmp_path / "other", 9)
        served.client.load("other", other)
        with pytest.raises(proof.NotProvedError, match="neither it nor the incumbent fits"):
            probes.prove_on(served.client, "other", "base", kept)
    deployment.store.close()


@pytest.fixture(scope="module")
def other_base(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Base:
    """The shipped base after somebody's full fine-tune: every shape the same, no weight."""
    directory = shutil.copytree(shipped_base(), tmp_path_factory.mktemp("other") / "base")
    weights = load_file(directory / "model.safetensors")
    noise = np.random.default_rng(0)
    moved = {k: v + 0.02 * noise.standard_normal(v.shape).astype(v.dtype) for k, v in weights.items()}
    save_file(moved, directory / "model.safetensors", metadata={"format": "pt"})
    return load_base(directory)


DAMAGE = {"wrong-prefix": _wrong_prefix, "wrong-shape": _wrong_shape, "one-layer-only": _one_layer_only, "nan": _nan}
REFUSED_BY_PREFLIGHT = {
    "wrong-prefix": "lacks",
    "wrong-shape": "has shape",
    "one-layer-only": "lacks",
    "wrong-base": "trained on base",
    "nan": "NaN",
}
REFUSED_BY_ENGINE = {
    "embedded": ("wrong-prefix", "wrong-shape", "one-layer-only", "wrong-base", "nan"),
    "mistralrs": ("wrong-prefix", "wrong-shape"),
    "vllm": (),
}
ON_EACH_DEFECT = [  # last in the file, and NaN last of all: it poisons what vLLM says to others
    pytest.param(
        engine,
        defect,
        defect in REFUSED_BY_ENGINE[engine],
        id=f"{engine}-{'refuses' if defect in REFUSED_BY_ENGINE[engine] else 'accepts'}-{defect}",
        marks=_marks(engine),
    )
    for engine in REFUSED_BY_ENGINE  # the stand-in's engine is ours: what a real SGLang refuses is not known
    for defect in REFUSED_BY_PREFLIGHT
]


@pytest.mark.parametrize(("served", "defect", "is_refused"), ON_EACH_DEFECT, indirect=["served"])
def test_a_bad_adapter_is_caught_before_and_after_it_is_loaded(
    served, defect, is_refused, base, other_base, versions, rows, tmp_path
):
    if defect == "wrong-base":
        path, trained_on = random_adapter(other_base, tmp_path / "bad", 1), other_base
        weights = read_adapter(path)
    else:
        path, trained_on = damaged(versions[0].path, tmp_path / "bad", DAMAGE[defect]), base
        weights = versions[0].weights  # what the trainer had in memory
    with pytest.raises(DataError, match=REFUSED_BY_PREFLIGHT[defect]):
        check_adapter(path, base_dir=served.base_dir)
    if is_refused:
        with pytest.raises(ServerError, match="did not load"):
            served.client.load(f"bad-{defect}", path)
        assert served.client.list() == {}
        return
    served.client.load(f"bad-{defect}", path)
    assert served.client.list() == {f"bad-{defect}": str(path)}
    with pytest.raises(ServerError if defect == "nan" else proof.NotProvedError) as caught:
        prove(served, f"bad-{defect}", base, weights, rows, trained_on)
    if defect == "wrong-prefix":
        assert "it is base that answers" in str(caught.value)
