"""A store with a bare base, and releases in it that were promoted as a worker would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sqlalchemy import insert, select

from cltrain.registry.aliases import (
    move_alias,
    read_alias,
)
from cltrain.registry.releases import ensure_base_release, get, seal
from cltrain.store.database import Store, open_store
from cltrain.store.schema import screenings, updates

BASE_DIGEST = "ab" * 32
BASE = f"support-v000000-{BASE_DIGEST[:12]}"


def new_store(tmp_path: Path) -> Store:
    store = open_store(tmp_path / "state")
    ensure_base_release(store, "support", BASE_DIGEST, now=1.0)
    return store


def sealed(store: Store, tmp_path: Path, parent: str, weights: str, manifest: dict[str, Any] | None = None) -> str:
    directory = tmp_path / f"candidate-{weights}"
    directory.mkdir(exist_ok=True)
    (directory / "adapter_config.json").write_text("{}")
    (directory / "adapter_model.safetensors").write_text(weights)
    return seal(store, tmp_path / "state", "support", directory, parent, manifest or {}, now=2.0).name


def promoted(store: Store, tmp_path: Path, weights: str, fence: int, *, raises_high_water: bool = False) -> str:
    """One whole update: sealed from the incumbent, learned two records, promoted."""
    alias = read_alias(store, "support")
    name = sealed(store, tmp_path, alias.release, weights)
    with store.write() as connection:
        number = get(store, name).number
        values = {"state": "done", "verdict": "promote", "mode": "auto", "fence": fence, "manifest": {}}
        connection.execute(
            insert(updates).values(
                id=f"update-{weights}",
                agent="support",
                number=number,
                parent=alias.release,
                candidate=name,
                started_at=2.0,
                **values,
            )
        )
        for status in ("waiting", "replay", "unusable"):
            connection.execute(
                insert(screenings).values(
                    record=f"{weights}-{status}",
                    agent="support",
                    status=status,
                    update=f"update-{weights}",
                    changed_at=2.0,
                )
            )
    move_alias(store, "support", expected=alias, to=name, fence=fence, now=3.0, raises_high_water=raises_high_water)
    return name


def statuses(store: Store) -> dict[str, str]:
    with store.read() as connection:
        return {r.record: r.status for r in connection.execute(select(screenings))}
