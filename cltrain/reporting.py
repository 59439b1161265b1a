"""Pages and sinks of one deployment: what the store holds, handed to monitoring."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sqlalchemy import select

from cltrain.config import Config
from cltrain.errors import DataError
from cltrain.monitoring import report
from cltrain.monitoring.outbox import Sink
from cltrain.monitoring.wandb_sink import WandbSink
from cltrain.records import BoundReport
from cltrain.store.database import Store
from cltrain.store.schema import aliases, updates


def write_report(store: Store, config: Config, number: int | None) -> Path:
    """The page of one update, or of the whole run with one page per update behind it."""
    summaries = _summaries(store, config.agent.name)
    if number is not None:
        for summary in summaries:
            if summary["number"] == number:
                return write_update(config, summary)
        last = summaries[-1]["number"] if summaries else None
        raise DataError(f"{config.agent.name} has no update {number}; the last is {last}")
    for summary in summaries:
        write_update(config, summary)
    rows = [{**_as_shown(summary), "page": _page(config, summary["number"]).name} for summary in summaries]
    return report.run_page(
        _home(config) / "index.html",
        config.agent.name,
        rows,
        serving=_serving(store, config.agent.name),
        curves={"Held-out success, by what the gate compared": _curves(summaries)},
    )


def write_update(config: Config, summary: dict[str, Any]) -> Path:
    """The page of one update from its stored summary."""
    summary = _as_shown(summary)
    bounds = BoundReport(**summary["bounds"]) if summary.get("bounds") else None
    decision = report.read_decision(summary["decision"]) if summary.get("decision") else None
    return report.update_page(_page(config, summary["number"]), summary, decision, bounds, run_page="index.html")


def sinks(config: Config) -> list[Sink]:
    """Where events go beside the store."""
    if config.monitoring.wandb == "off":
        return []
    return [
        WandbSink(
            config.state_dir, agent=config.agent.name, project=config.monitoring.project, mode=config.monitoring.wandb
        )
    ]


def _serving(store: Store, agent: str) -> str | None:
    with store.read() as connection:
        return connection.execute(select(aliases.c.release).where(aliases.c.agent == agent)).scalar()


def _summaries(store: Store, agent: str) -> list[dict[str, Any]]:
    query = select(updates).where(updates.c.agent == agent, updates.c.state != "training").order_by(updates.c.number)
    with store.read() as connection:
        rows = connection.execute(query).all()
    return [
        {
            "agent": agent, "number": row.number, "state": row.state, "verdict": row.verdict, "mode": row.mode,
            "parent": row.parent, "candidate": row.candidate, "started_at": row.started_at,
            "reason": "; ".join((row.summary or {}).get("reasons", ())[:1]), **(row.summary or {}),
        }
        for row in rows
    ]  # fmt: skip


def _as_shown(summary: dict[str, Any]) -> dict[str, Any]:
    """A discarded update was never judged: its page says that instead of showing a verdict."""
    return {**summary, "verdict": None, "decision": None} if summary.get("state") == "discarded" else summary


def _curves(summaries: list[dict[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    curves: dict[str, list[tuple[float, float]]] = {}
    for summary in summaries:
        for check in (summary.get("decision") or {}).get("checks", ()):
            if check["name"].startswith("stratum ") and "/" not in check["name"] and check["candidate"] is not None:
                curves.setdefault(check["name"].removeprefix("stratum "), []).append(
                    (summary["number"], check["candidate"])
                )
    return curves


def _home(config: Config) -> Path:
    return config.state_dir / "reports" / config.agent.name


def _page(config: Config, number: int) -> Path:
    return _home(config) / f"update-{number:06d}.html"
