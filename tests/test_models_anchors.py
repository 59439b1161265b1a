"""Anchors: reproducible, pinned, checked; and the KL measured on them against a plain float64 computation."""

import json

import pytest
import torch

from cltrain.errors import DataError
from cltrain.models.adapter import new_factors
from cltrain.models.anchors import load_anchors, mean_kl, read_anchors, sample_base
from cltrain.models.base import load_base
from tests.tiny import TOOLS, make_tiny_base, ticket


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return load_base(make_tiny_base(tmp_path_factory.mktemp("base") / "llama"))


def moved(base, seed):
    adapter = new_factors(base, 4, 8.0, ("q_proj", "down_proj"), seed=1)
    generator = torch.Generator().manual_seed(seed)
    return adapter.with_factors(
        {m: (a, 0.1 * torch.randn(b.shape, generator=generator)) for m, (a, b) in adapter.factors.items()}
    )


def test_sampling_depends_on_seed_and_row_alone(base):
    some = sample_base(base, 4, 24, seed=5)
    assert sample_base(base, 4, 24, seed=5) == some
    assert sample_base(base, 2, 24, seed=5) == some[:2]
    assert sample_base(base, 4, 24, seed=6) != some
    assert len(set(some)) == 4
    start = base.tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert all(row[0] == start and 1 < len(row) <= 24 for row in some)


def test_samples_follow_the_base_distribution(base):
    """First tokens of 4000 samples against the base's own probabilities: chi-square over the likely tokens."""
    samples = sample_base(base, 4000, 2, seed=0)
    with torch.no_grad():
        expected = torch.softmax(base.model(torch.tensor([[samples[0][0]]])).logits[0, -1].double(), -1) * 4000
    counts = torch.bincount(torch.tensor([row[1] for row in samples]), minlength=len(expected))
    likely = expected > 8
    chi = ((counts[likely] - expected[likely]) ** 2 / expected[likely]).sum()
    num = int(likely.sum())
    assert num > 20
    assert chi < num + 5 * (2 * num) ** 0.5


def test_anchors_are_pinned_and_read_back(base, tmp_path):
    arguments = {"file": None, "count": 6, "max_tokens": 20, "seed": 1, "directory": tmp_path / "anchors"}
    rows, digest = load_anchors(base, **arguments)
    (pinned,) = (tmp_path / "anchors").iterdir()
    assert pinned.name == f"{base.digest[:12]}-{digest[:12]}.jsonl"
    assert load_anchors(base, **arguments) == (rows, digest) == read_anchors(pinned)
    assert all(row.weights[0] == 0 and set(row.weights[1:]) == {1.0} for row in rows)


def test_changed_anchors_are_refused(base, tmp_path):
    arguments = {"file": None, "count": 3, "max_tokens": 20, "seed": 1, "directory": tmp_path}
    load_anchors(base, **arguments)
    (pinned,) = tmp_path.iterdir()
    pinned.write_bytes(pinned.read_bytes().replace(b"1.0]", b"0.5]", 1))
    with pytest.raises(DataError, match="changed since"):
        load_anchors(base, **arguments)
    with pytest.raises(DataError, match="changed since"):
        load_anchors(base, **{**arguments, "seed": 2})
    pinned.write_bytes(b"garbage")
    with pytest.raises(DataError, match="changed since"):
        load_anchors(base, **arguments)


def test_anchors_with_another_header_are_refused_and_not_made_anew(base, tmp_path):
    arguments = {"file": None, "count": 3, "max_tokens": 20, "seed": 1, "directory": tmp_path}
    load_anchors(base, **arguments)
    (pinned,) = tmp_path.iterdir()
    changed = pinned.read_bytes().replace(b'"seed": 1', b'"seed": 3')
    pinned.write_bytes(changed)
    with pytest.raises(DataError, match="changed since"):
        load_anchors(base, **arguments)
    assert pinned.read_bytes() == changed


def test_the_owners_texts_and_conversations_become_anchors(base, tmp_path):
    file = tmp_path / "mine.jsonl"
    lines = [
        {"text": "the parcel is late " * 9},
        {"messages": ticket("A")},
        {"messages": ticket("A")[:1], "tools": TOOLS},
    ]
    file.write_text("\n".join(json.dumps(line) for line in lines))
    rows, _ = load_anchors(base, file=file, count=3, max_tokens=16, seed=1, directory=tmp_path / "anchors")
    assert len(rows) == 3
    assert len(rows[0].ids) == 16
    learned = [i for i, weight in zip(rows[1].ids, rows[1].weights, strict=True) if weight]
    assert base.tokenizer.decode(learned).endswith("</tool_call><|im_end|>I have done it.<|im_end|>")
    assert 1 <= sum(rows[2].weights) <= 16, "the base wrote this answer"


def test_too_few_anchors_are_refused_with_their_count(base, tmp_path):
    file, arguments = tmp_path / "mine.jsonl", {"max_tokens": 16, "seed": 1, "directory": tmp_path / "anchors"}
    line = json.dumps({"text": "the parcel is late"}) + "\n"
    for num_lines, count in ((1, 64), (7, 64), (2, 3)):
        file.write_text(line * num_lines)
        with pytest.raises(DataError, match=f"gave {num_lines} anchors .* at least {min(count, 8)} are needed"):
            load_anchors(base, file=file, count=count, **arguments)
    assert not (tmp_path / "anchors").exists()
    for num_lines, count in ((8, 64), (3, 3)):
        file.write_text(line * num_lines)
        assert len(load_anchors(base, file=file, count=count, **arguments)[0]) == num_lines


def test_a_bad_anchor_line_is_named(base, tmp_path):
    file = tmp_path / "mine.jsonl"
    for bad in ('{"text": "a b c"}\n{"txt": 1}', "{}", "nonsense", '{"messages": []}'):
        file.write_text(bad)
        with pytest.raises(DataError, match=r"mine\.jsonl:\d: not an anchor"):
            load_anchors(base, file=file, count=9, max_tokens=16, seed=1, directory=tmp_path / "anchors")


def test_mean_kl_is_the_forward_kl_of_plain_float64_models(base, tmp_path):
    rows, _ = load_anchors(base, file=None, count=5, max_tokens=17, seed=1, directory=tmp_path)
    p, q = moved(base, 1), moved(base, 2)

    def log_probs(adapter, ids):
        model = load_base(base.path).model.double()
        with torch.no_grad():
            for module, (a_RK, b_NR) in adapter.factors.items() if adapter else ():
                model.get_submodule(module).weight += adapter.scale * b_NR.double() @ a_RK.double()
            return torch.log_softmax(model(torch.tensor([ids])).logits[0, :-1], -1)

    for one, other in ((None, q), (p, q)):
        parts = [(log_probs(one, row.ids), log_probs(other, row.ids)) for row in rows]
        kl = torch.cat([(lp.exp() * (lp - lq)).sum(-1) for lp, lq in parts])
        assert mean_kl(base, rows, one, other) == pytest.approx(float(kl.mean()), rel=1e-4)
    assert mean_kl(base, rows, p, p) == pytest.approx(0, abs=1e-6)
