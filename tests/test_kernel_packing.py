"""Packed rows and prefix trees: loss and gradients are those of the rows one by one, in float64 on small models."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from cltrain_kernels import attention as attending
from cltrain_kernels.attention import Attention, attention_for, dense_mask, packed_hidden
from cltrain_kernels.packing import Bucket, Packed, Row, pack, pack_all, ratios, segment
from torch import Tensor
from torch.nn import functional as F

VOCABULARY = 13


def model_of(family: str) -> Any:
    import transformers

    config = getattr(transformers, f"{family}Config")(
        vocab_size=VOCABULARY, hidden_size=12, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=4, max_position_embeddings=64, sliding_window=None, attn_implementation="sdpa",
    )  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    for module in list(model.modules()):  # transformers' own norms compute in float32 whatever comes in
        for name, child in module.named_children():
            if type(child).__name__.endswith("RMSNorm"):
                setattr(module, name, torch.nn.RMSNorm(child.weight.shape[0], eps=child.variance_epsilon))
    return model.double().eval()


def branches(seed: int, num: int = 6) -> list[Row]:
    """Rows that branch here and there, some equal, some a prefix of another, some of one token."""
    rng = random.Random(seed)
    rows = [Row((3,), (1.0,)), Row((4, 5), (0.0, 1.0))]
    while len(rows) < num:
        stem = rng.choice(rows)
        keep = rng.randint(0, len(stem.ids))
        tail = [rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 6))]
        weights = [rng.choice([0.0, 0.5, 1.0]) for _ in range(keep + len(tail))]
        rows.append(Row((*stem.ids[:keep], *tail), tuple(weights)))
    return rows


def flat_gradients(model: Any, rows: Sequence[Row]) -> tuple[float, list[Tensor]]:
    """Loss and gradients of the rows one by one, by transformers' own causal path."""
    model.zero_grad()
    total = 0.0
    for row in rows:
        logits_TV = model(torch.tensor([row.ids]), use_cache=False).logits[0]
        if len(row.ids) > 1:
            nll_T = F.cross_entropy(logits_TV[:-1], torch.tensor(row.ids[1:]), reduction="none")
            loss = (nll_T * torch.tensor(row.weights[1:], dtype=torch.float64)).sum()
            loss.backward()
            total += float(loss.detach())
    return total, [p.grad.clone() for p in model.parameters()]


def packed_gradients(model: Any, packed: Sequence[Packed], attention: Attention) -> tuple[float, list[Tensor]]:
    model.zero_grad()
    total = 0.0
    for one in packed:
        hidden_MD = packed_hidden(model.model, one, attention)[one.sources_M]
        nll_M = F.cross_entropy(model.lm_head(hidden_MD), one.targets_M, reduction="none")
        loss = (nll_M * one.weights_M.double()).sum()
        loss.backward()
        total += float(loss.detach())
    return total, [p.grad.clone() for p in model.parameters()]


def assert_same(ours: tuple[float, list[Tensor]], theirs: tuple[float, list[Tensor]]) -> None:
    assert ours[0] == pytest.approx(theirs[0], rel=1e-12)
    for one, other in zip(ours[1], theirs[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("family", ["Qwen2", "Llama", "Qwen3", "Mistral"])
@pytest.mark.parametrize("attention", ["mask", "chains"])
def test_packed_rows_give_the_gradients_of_the_rows_one_by_one(family: str, attention: Attention) -> None:
    model, rows = model_of(family), branches(1)
    packed = pack([segment([row]) for row in rows], Bucket(64, 40, 8))
    assert not packed.is_tree
    assert_same(packed_gradients(model, [packed], attention), flat_gradients(model, rows))


@pytest.mark.parametrize("family", ["Qwen2", "Llama"])
@pytest.mark.parametrize("attention", ["mask", "chains"])
@pytest.mark.parametrize("min_shared", [1, 3])
def test_trees_give_the_gradients_of_their_branches_one_by_one(
    family: str, attention: Attention, min_shared: int
) -> None:
    model = model_of(family)
    groups = [branches(seed) for seed in (1, 2, 3)]
    buckets = (Bucket(32, 32, 16), Bucket(64, 64, 16))
    packed = pack_all([segment(rows, min_shared) for rows in groups], buckets)
    assert any(one.is_tree for one in packed)
    assert ratios(packed)["ratio_tree"] == sum(len(row.ids) for rows in groups for row in rows) / sum(
        one.num_used for one in packed
    )
    assert_same(
        packed_gradients(model, packed, attention), flat_gradients(model, [row for rows in groups for row in rows])
    )


def test_permuting_segments_permutes_the_gradients_of_their_places() -> None:
    model, rows = model_of("Qwen2"), branches(4)
    embedded: list[Tensor] = []

    def keep(_: Any, __: Any, output: Tensor) -> None:
        output.retain_grad()
        embedded.append(output)

    model.model.embed_tokens.register_forward_hook(keep)
    order = [3, 0, 5, 1, 4, 2]
    bucket = Bucket(64, 40, 8)
    straight = packed_gradients(model, [pack([segment([row]) for row in rows], bucket)], "chains")
    moved = packed_gradients(model, [pack([segment([rows[i]]) for i in order], bucket)], "chains")
    assert_same(moved, straight)
    sizes = [len(row.ids) for row in rows]
    by_row, by_moved = (e.grad[0] for e in embedded)
    parts = by_row[: sum(sizes)].split(sizes)
    torch.testing.assert_close(by_moved[: sum(sizes)], torch.cat([parts[i] for i in order]), rtol=1e-9, atol=1e-15)
    assert not by_moved[sum(sizes) :].any(), "a dead place got a gradient"


def test_tree_of_known_shape() -> None:
    rows = [
        Row((1, 2, 3), (0.0, 0.0, 1.0)),
        Row((1, 2, 4, 5), (0.0, 0.0, 1.0, 1.0)),
        Row((1, 2), (0.0, 2.0)),
        Row((7,), (1.0,)),
    ]
    one = segment(rows)
    assert one.ids == (1, 2, 3, 4, 5, 7)
    assert one.positions == (0, 1, 2, 2, 3, 0)
    assert one.ends == (5, 5, 3, 5, 5, 6)
    assert one.predictions == ((0, 2, 2.0), (1, 3, 1.0), (1, 4, 1.0), (3, 5, 1.0))
    assert one.num_flat == 10
    packed = pack([segment([Row((9,), (0.0,))]), one], Bucket(8, 5, 3))
    assert packed.starts_S.tolist() == [0, 1, 6, 7, 8]
    assert packed.sources_M.tolist() == [1, 2, 2, 4, 0]
    sees = [[0], [1], [1, 2], [1, 2, 3], [1, 2, 4], [1, 2, 4, 5], [6], [7]]
    assert [row.nonzero().flatten().tolist() for row in dense_mask(packed)] == sees


def test_equal_rows_are_one_branch_with_both_weights() -> None:
    one = segment([Row((1, 2), (0.0, 0.25))] * 3)
    assert (one.ids, one.predictions) == ((1, 2), ((0, 2, 0.75),))


def test_a_long_row_is_no_recursion() -> None:
    row = Row(tuple(range(5000)), (1.0,) * 5000)
    assert segment([row]).ends == (5000,) * 5000


def test_packing_fills_buckets_in_one_order_and_loses_nothing() -> None:
    rng = random.Random(0)
    rows = [Row(tuple(rng.randrange(9) for _ in range(n)), (1.0,) * n) for n in rng.choices(range(2, 30), k=40)]
    buckets = [Bucket(16, 16, 8), Bucket(32, 32, 8), Bucket(64, 64, 8)]
    packed = pack_all([segment([row]) for row in rows], buckets)
    assert sum(float(one.weights_M.sum()) for one in packed) == sum(len(row.ids) - 1 for row in rows)
    assert all(one.bucket in buckets for one in packed)
    assert ratios(packed)["fill"] > 0.9
    again = pack_all([segment([row]) for row in rows], buckets)
    assert all(torch.equal(a.ids_T, b.ids_T) for a, b in zip(packed, again, strict=True))


def test_what_cannot_be_packed_is_named() -> None:
    long = segment([Row((1,) * 9, (1.0,) * 9)])
    with pytest.raises(ValueError, match="segment 1 has 9 tokens and 8 predictions; the largest bucket takes 8 and 8"):
        pack_all([segment([Row((1,), (1.0,))]), long], [Bucket(8, 8, 2)])
    with pytest.raises(ValueError, match="does not fit"):
        pack([long], Bucket(8, 8, 2))
    silent = segment([Row((1, 2), (1.0, 0.0))])
    with pytest.raises(ValueError, match="no supervised token"):
        pack([silent], Bucket(8, 8, 2))
    with pytest.raises(ValueError, match="no supervised token"):
        pack_all([silent], [Bucket(8, 8, 2)])
    with pytest.raises(ValueError, match="a weight for each"):
        Row((1, 2), (1.0,))
    with pytest.raises(ValueError, match="at least one row"):
        segment([])
    tree = pack([segment([Row((1, 2), (0.0, 1.0)), Row((1, 3), (0.0, 1.0))])], Bucket(8, 8, 2))
    with pytest.raises(ValueError, match="varlen attention knows rows only"):
        packed_hidden(model_of("Llama").model, tree, "varlen")


def test_a_sliding_window_shorter_than_the_bucket_is_refused() -> None:
    model = model_of("Mistral")
    model.config.sliding_window = 4
    with pytest.raises(ValueError, match="sliding window of 4"):
        packed_hidden(model.model, pack([segment([Row((1, 2), (0.0, 1.0))])], Bucket(8, 8, 2)), "mask")


def test_the_model_attends_as_before_afterwards() -> None:
    model = model_of("Llama")
    ids = torch.arange(6)[None]
    before = model(ids).logits
    packed_hidden(model.model, pack([segment([Row((1, 2), (0.0, 1.0))])], Bucket(8, 8, 2)), "chains")
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model(ids).logits, before)


def test_attention_is_chosen_from_the_table_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    attending._say_once.cache_clear()
    with caplog.at_level("INFO"):
        assert attention_for(torch.device("cpu"), torch.float32, is_tree=False) == "chains"
        assert attention_for(torch.device("cpu"), torch.float32, is_tree=True) == "chains"
        cuda = torch.device("cuda")
        assert attention_for(cuda, torch.float32, is_tree=False) == "chains"
        assert attention_for(cuda, torch.float32, is_tree=False, is_captured=True) == "mask"
        assert attention_for(cuda, torch.bfloat16, is_tree=True) == "chains"
        assert attention_for(cuda, torch.bfloat16, is_tree=True, is_captured=True) == "mask"
        on_gpu = [attention_for(cuda, torch.bfloat16, is_tree=False, is_captured=is_it) for is_it in (False, True)]
    assert on_gpu == (["varlen"] * 2 if attending._varlen() else ["chains", "mask"])
    assert "packed rows in torch.float32 on cpu attend by chains" in caplog.text


@pytest.mark.parametrize("max_mask", [0, 1 << 22])
def test_a_mask_is_made_once_for_all_layers_and_none_where_it_would_be_large(
    monkeypatch: pytest.MonkeyPatch, max_mask: int
) -> None:
    model = model_of("Qwen2")
    rows = [Row((*range(10), i, i), (0.0,) * 10 + (1.0,) * 2) for i in (1, 2)]
    rows.append(Row((*range(10), *range(11)), (1.0,) * 21))  # as long as what it shares: no mask is worth it
    packed = pack([segment(rows)], Bucket(40, 30, 1))
    seen: list[Tensor] = []
    masked = attending._masked

    def watched(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None) -> Tensor:
        seen.append(mask)
        return masked(query, key, value, mask, scaling)

    monkeypatch.setattr(attending, "_masked", watched)
    monkeypatch.setattr(attending, "MAX_MASK", max_mask)
    assert_same(packed_gradients(model, [packed], "chains"), flat_gradients(model, rows))
    assert [tuple(mask.shape) for mask in seen] == ([(2, 12)] * 4 if max_mask else [])
    assert len({mask.data_ptr() for mask in seen}) == len(seen) / len(model.model.layers)


def test_dead_places_are_no_row_that_a_window_must_hold() -> None:
    model = model_of("Mistral")
    model.config.sliding_window = 4
    rows = [Row((1, 2, 3, 4), (1.0,) * 4)]
    packed = pack([segment(rows)], Bucket(32, 4, 2))
    assert packed.longest == 4
    assert_same(packed_gradients(model, [packed], "chains"), flat_gradients(model, rows))
    with pytest.raises(ValueError, match="5 tokens do not fit a sliding window of 4"):
        packed_hidden(model.model, pack([segment([Row((1,) * 5, (1.0,) * 5)])], Bucket(32, 4, 2)), "chains")


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("min_shared", [1, 2, 4])
def test_a_trie_holds_every_row_and_shares_what_is_long_enough(seed: int, min_shared: int) -> None:
    rows = branches(seed, num=9)
    one = segment(rows, min_shared)
    for i, row in enumerate(rows):
        places = one.places(i)[: len(row.ids)]
        assert tuple(one.ids[place] for place in places) == row.ids
        assert [one.positions[place] for place in places] == list(range(len(row.ids)))
        assert all(a < b < one.ends[a] for a, b in itertools.pairwise(places)), "a token does not see the one before"
    assert sum(weight for _, _, weight in one.predictions) == sum(sum(row.weights[1:]) for row in rows)
    followed = {chain.above[-1] for chain in one.chains if chain.above}
    assert all(one.chains[i].end - one.chains[i].begin >= min_shared for i in followed)
    assert len({(one.ids[c.begin], c.above) for c in one.chains}) == len(one.chains) or min_shared > 1


def test_long_rows_are_compared_quickly() -> None:
    stem = tuple(range(100_000))
    began = time.process_time()
    one = segment([Row((*stem, i, *stem), (0.0,) * 200_001) for i in range(8)])
    assert len(one.ids) == 100_000 + 8 * 100_001
    assert time.process_time() - began < 2.0
