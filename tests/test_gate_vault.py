"""The vault: sealed by a secret, whole episodes at a time, opened once in a week, one bit out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from cltrain.config import GateConfig
from cltrain.errors import DataError, ServerError
from cltrain.gate.vault import DAY_S, Opening, open_vault, split_vault
from cltrain.records import SuiteItem
from cltrain.store.database import Store, open_store

CONFIG = GateConfig(vault_share=0.2)


def _items(num: int, kind: str = "gain", turns: int = 1) -> list[SuiteItem]:
    return [
        SuiteItem(f"{kind}{i}:{turn}", "own", "s", kind, (), cluster=f"e{i}" if turns > 1 else None)  # type: ignore[arg-type]
        for i in range(num)
        for turn in range(turns)
    ]


def test_the_share_is_sealed_by_the_secret_and_an_episode_whole() -> None:
    items = _items(1000, turns=3)
    drawn, sealed = split_vault(items, b"one", 0.2)
    assert len(drawn) + len(sealed) == 3000
    assert 150 < len(sealed) / 3 < 250
    assert not {item.cluster for item in drawn} & {item.cluster for item in sealed}
    assert {item.id for item in sealed} != {item.id for item in split_vault(items, b"two", 0.2)[1]}
    canaries = _items(100, "canary")
    assert split_vault(canaries, b"one", 0.9)[0] == canaries


def _open(store: Store, lost: int, now: float, ask: Callable[[str], None] = lambda _: None) -> Opening:
    sealed = _items(400)

    def score(release: str, items: Sequence[SuiteItem]) -> list[float]:
        ask(release)
        return [float(release == "base" or i >= lost) for i in range(len(items))]

    return open_vault(store, "support", sealed, CONFIG, incumbent="now", base="base", score_items=score, now=now)


def test_the_vault_says_only_whether_more_than_the_margin_was_lost(tmp_path: Path) -> None:
    assert _open(open_store(tmp_path / "a"), lost=60, now=0.0).has_lost is True
    assert _open(open_store(tmp_path / "b"), lost=0, now=0.0).has_lost is False
    assert _open(open_store(tmp_path / "c"), lost=20, now=0.0).has_lost is False  # exactly the margin


def test_the_vault_is_asked_once_in_seven_days_even_when_it_failed(tmp_path: Path) -> None:
    store, asked = open_store(tmp_path), []

    def fail(release: str) -> None:
        raise ServerError("gone")

    with pytest.raises(ServerError):
        _open(store, lost=60, now=0.0, ask=fail)
    shut = _open(store, lost=60, now=6.9 * DAY_S, ask=asked.append)
    assert shut == Opening(None, 7 * DAY_S)
    assert asked == []
    assert _open(store, lost=60, now=7 * DAY_S, ask=asked.append) == Opening(True, 14 * DAY_S)
    assert asked == ["now", "base"]


def test_an_empty_vault_and_missing_scores_are_errors(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    ask = {"incumbent": "now", "base": "base", "now": 0.0}
    with pytest.raises(DataError, match=r"gate\.vault_share"):
        open_vault(store, "support", [], CONFIG, score_items=lambda _, items: [1.0], **ask)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="40 items"):
        open_vault(store, "support", _items(40), CONFIG, score_items=lambda _, items: [float("nan")] * 40, **ask)  # type: ignore[arg-type]
