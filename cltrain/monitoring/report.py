"""Static pages that a person can judge an update by: one per update, one for the run. No scripts, no network.

Everything that comes from data is escaped. A part whose numbers are missing is left out, never filled with zeros. What
became of an update after its verdict (a person's yes, a rollback) counts for more than the verdict.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from cltrain.errors import DataError
from cltrain.monitoring import plain, plots, verdicts
from cltrain.records import BoundReport, Check, Code, Decision, Verdict

KEPT = 10  # bars of one kind; the smallest are pooled
MARK = re.compile(r'name="cltrain-facts" content="([^"]*)"')

BUDGETS = (
    ("step_frobenius", "Size of this step", "of the base weights' norm"),
    ("drift_frobenius", "Distance from the base, all updates together", "of the base weights' norm"),
    ("step_kl", "Change of behaviour in this step", "nats per token"),
    ("drift_kl", "Change of behaviour since the base", "nats per token"),
    ("step_spectral", "Size of this step in its strongest direction", "of the base weights' norm"),
    ("drift_spectral", "Distance from the base in its strongest direction", "of the base weights' norm"),
    ("day_frobenius", "Steps of the last 24 hours, this one included", "of the base weights' norm"),
    ("num_tokens", "Tokens learned from", "tokens"),
    ("num_steps", "Steps taken", "steps"),
)

AUDIT_TONES = {"ok": "promote", "warning": "hold", "alarm": "reject", "error": "error"}

OPTIONAL = (
    "id", "mode", "state", "verdict", "reason", "parent", "candidate", "serving", "started_at", "finished_at", "window",
    "replay", "metrics", "steps", "timings", "facts", "settings", "bounds", "decision", "truth", "is_caught", "page",
    "standing", "history", "frozen", "as_of", "taught",
)  # fmt: skip


def update_page(
    path: Path,
    update: Mapping[str, Any],
    decision: Decision | None,
    bounds: BoundReport | None,
    *,
    options: str,
    run_page: str | None = None,
    mark: str = "",
) -> Path:
    """Write the page of one update and return its path.

    `update` has `agent` and `number`, and as far as known: `id`, `mode`, `state`, `verdict`, `reason` (why discarded),
    `parent`, `candidate`, `serving` (release names), `started_at`, `finished_at` (seconds since the epoch), `window`
    {num_examples, num_waiting, strata, principals (of what was learned), strata_left, principals_left (of the others),
    objectives, set_aside, notes (each name -> count), suspicious (list of {phrase, principal, action, count}),
    is_refused, reason}, `replay` (stratum -> count), `metrics` (name -> value), `steps` (list of {step, loss, ...}),
    `timings` (stage -> seconds), `facts` (name -> text: digests, seed, versions), `settings` (name -> value).
    What became of it: `standing` (a key of verdicts.SINCE, or `serves`), `history` (list of {kind, at, payload} of the
    log of decisions), `frozen` (why learning is), `as_of` (when all this was read). What it learned: `taught` {shown
    (list of {record, principal, by, asked, said, learned}), num_learned, num_gone, judges (principal -> text)}.

    `options` make a command about this deployment, `run_page` is a relative link, `mark` is kept for `mark_of`.
    Raises DataError when `agent` or `number` is missing.
    """
    update = _complete(update)
    verdict = _verdict(update, decision)
    standing = verdicts.standing(update, verdict)
    headline, meaning = verdicts.said(update, standing, verdict)
    window = update["window"] or {}
    steps = update["steps"] or []
    names = sorted({name for step in steps for name in step} - {"step"})
    checks = decision.checks if decision else ()
    settings = update["settings"] or {}
    return _write(
        path,
        "update.html",
        update=update,
        agent=update["agent"],
        title=f"Update {update['number']} of {update['agent']}",
        tone=standing or verdict or "none",
        headline=headline,
        meaning=meaning,
        reasons=verdicts.reasons(update, decision, window),
        history=verdicts.history(update),
        can_promote=standing in ("waits", "observed"),
        options=options,
        mark=mark,
        decision=decision,
        window=window,
        taught=update["taught"] or {},
        strata=_parted(window.get("strata"), window.get("strata_left")),
        principals=_parted(window.get("principals"), window.get("principals_left")),
        objectives=_bars(window.get("objectives")),
        replay=_bars(update.get("replay")),
        set_aside=_grouped(window.get("set_aside")),
        notes=_grouped(window.get("notes")),
        settings=settings,
        sentences={check.name: plain.sentence(check, settings) for check in checks},
        glossary=plain.GLOSSARY,
        budgets=_budgets(bounds),
        bounds=bounds,
        interval_plot=plots.intervals(checks),
        checks=checks,
        seconds_saved=_seconds_saved(decision, update["timings"] or {}),
        loss_plot=plots.lines(
            {
                name: [(s["step"], s[name]) for s in steps if name in s]
                for name in names
                if "loss" in name or name == "kl"
            },
            x="step",
            y="nats",
        ),
        timings=_bars(update.get("timings"), keep=20, is_sorted=False),
        run_page=run_page,
    )


def run_page(
    path: Path,
    agent: str,
    updates: Sequence[Mapping[str, Any]],
    *,
    options: str,
    serving: str | None = None,
    frozen: str | None = None,
    as_of: float | None = None,
    curves: Mapping[str, Mapping[str, plots.Points]] | None = None,
    comparison: Mapping[str, Mapping[str, Any]] | None = None,
    note: str | None = None,
    audits: Sequence[Mapping[str, Any]] = (),
    trends: Sequence[Mapping[str, Any]] = (),
    mark: str = "",
) -> Path:
    """Write the page of the whole run and return its path.

    Each of `updates` is what update_page takes, plus as far as known `bounds` (BoundReport or its mapping), `truth`
    (what kind of window it was, for example clean, poisoned or junk: only a simulation knows), `is_caught` (the window
    was rejected or filtered) and `page` (a relative link). `curves` are plots: title -> series -> (update number,
    share in [0, 1]) points. `comparison` is a table: column -> name -> value, for example cltrain beside naive.
    `audits` are rows of that table with their `number`, newest first; `trends` are those of cltrain.trends.as_json.
    """
    updates = sorted((_complete(update) for update in updates), key=lambda update: update["number"])
    rows = [_row(update) for update in updates]
    marks = {float(row["number"]): row["tone"] for row in rows}
    counts = Counter(row["tone"] for row in rows)
    tiles = {tone: text for tone, text in verdicts.TILES.items() if tone not in verdicts.SINCE or counts[tone]}
    return _write(
        path,
        "run.html",
        agent=agent,
        title=f"How {agent} learned",
        tone="none",
        rows=rows,
        tiles=[(tone, text, counts[tone]) for tone, text in tiles.items()],
        waiting=[row for row in rows if row["tone"] == "waits"],
        serving=serving,
        frozen=frozen,
        as_of=as_of,
        options=options,
        mark=mark,
        note=note,
        curves=[
            (title, plots.lines(series, x="update", y="share right", is_share=True, marks=marks))
            for title, series in (curves or {}).items()
        ],
        drift_plot=_drift_plot(rows, marks),
        drift=next((row["budgets"] for row in reversed(rows) if row["budgets"] and row["tone"] == "promote"), None),
        windows=_windows(updates),
        audits=[{**audit, "tone": AUDIT_TONES[audit["outcome"]]} for audit in audits],
        trends=trends,
        columns=list(comparison or {}),
        compared=_compared(comparison or {}),
    )


CODES_BY_NAME = {  # of checks that were stored before they had one
    "canaries": Code.CANARY, "base": Code.BASE_KL, "trigger": Code.TRIGGER, "stratum": Code.STRATUM,
    "small": Code.STRATUM, "retention": Code.RETENTION, "overall": Code.RETENTION, "gain": Code.GAIN,
    "high-water": Code.HIGH_WATER,
}  # fmt: skip


def _code_of(check: Mapping[str, Any]) -> Code:
    return Code(check["code"]) if "code" in check else CODES_BY_NAME.get(check["name"].split()[0], Code.OUTAGE)


def read_decision(values: Mapping[str, Any]) -> Decision:
    """A Decision from its stored mapping (dataclasses.asdict through JSON)."""
    checks = tuple(
        Check(**{**check, "code": _code_of(check), "verdict": Verdict(check["verdict"])})
        for check in values.get("checks", ())
    )
    return Decision(
        **{
            **values,
            "verdict": Verdict(values["verdict"]),
            "checks": checks,
            "reasons": tuple(values.get("reasons", ())),
            "items_used": tuple(values.get("items_used", ())),
            "outcome": tuple(values["outcome"]) if values.get("outcome") else None,
            "codes": tuple(Code(code) for code in values.get("codes", ())),
        }
    )


def _seconds_saved(decision: Decision | None, timings: Mapping[str, float]) -> float | None:
    """About how long the gate would have gone on asking what it did not need to."""
    if decision is None or not decision.num_asked or "gate" not in timings:
        return None
    return timings["gate"] * (decision.num_planned / decision.num_asked - 1)


def _complete(update: Mapping[str, Any]) -> dict[str, Any]:
    """The update with None for everything that it leaves out."""
    for key in ("agent", "number"):
        if key not in update:
            raise DataError(f"a report needs {key!r} of every update; got {', '.join(sorted(update)) or 'nothing'}")
    return dict.fromkeys(OPTIONAL) | dict(update)


def _verdict(update: Mapping[str, Any], decision: Decision | None) -> str | None:
    if decision is not None:
        return decision.verdict.value
    return str(update["verdict"]) if update.get("verdict") else None


def mark_of(page: Path) -> str | None:
    """The `mark` that a page was written with; None for no page or an older one."""
    try:
        with page.open(encoding="utf-8") as file:
            found = MARK.search(file.read(400))
    except OSError:
        return None
    return found.group(1) if found else None


def _parted(taken: Mapping[str, int] | None, left: Mapping[str, int] | None) -> list[tuple[str, int, int, float]]:
    """(name, learned, not learned, one record's share of the widest bar), most learned first, the rest pooled."""
    taken, left = taken or {}, left or {}
    names = sorted({*taken, *left}, key=lambda name: (-taken.get(name, 0), -left.get(name, 0), name))
    rows = [(name, taken.get(name, 0), left.get(name, 0)) for name in names]
    if len(rows) > KEPT:
        rest = rows[KEPT - 1 :]
        rows = [*rows[: KEPT - 1], (f"{len(rest)} others", sum(r[1] for r in rest), sum(r[2] for r in rest))]
    widest = max((row[1] + row[2] for row in rows), default=0) or 1
    return [(*row, 1 / widest) for row in rows]


def _grouped(counts: Mapping[str, int] | None) -> list[tuple[str, int]]:
    """(reason, how often), most often first; which record is doubled is no reason of its own."""
    grouped: Counter[str] = Counter()
    for reason, count in (counts or {}).items():
        grouped[re.sub(r"^duplicate of .*", "duplicate of another record", reason, flags=re.DOTALL)] += count
    return sorted(grouped.items(), key=lambda item: (-item[1], item[0]))


def _budgets(bounds: BoundReport | Mapping[str, Any] | None) -> list[dict[str, Any]]:
    if bounds is None:
        return []
    values = asdict(bounds) if isinstance(bounds, BoundReport) else bounds
    return [
        {"label": label, "unit": unit, "used": values[key], "limit": values[f"{key}_limit"],
         "share": values[key] / values[f"{key}_limit"]}
        for key, label, unit in BUDGETS
        if key in values
    ]  # fmt: skip


def _bars(
    counts: Mapping[str, float] | None, *, keep: int = KEPT, is_sorted: bool = True
) -> list[tuple[str, float, float]]:
    """(name, value, share of the largest) with everything after the first `keep` pooled."""
    items = list((counts or {}).items())
    if is_sorted:
        items.sort(key=lambda item: (-item[1], item[0]))
    if len(items) > keep:
        items = [*items[: keep - 1], (f"{len(items) - keep + 1} others", sum(v for _, v in items[keep - 1 :]))]
    largest = max((value for _, value in items), default=0) or 1
    return [(name, value, value / largest) for name, value in items]


def _row(update: Mapping[str, Any]) -> dict[str, Any]:
    decision = read_decision(update["decision"]) if update["decision"] else None
    verdict = _verdict(update, decision)
    standing = verdicts.standing(update, verdict)
    headline, meaning = verdicts.said(update, standing, verdict)
    window = update.get("window") or {}
    values = update.get("bounds")
    since = verdicts.history(update) if standing else []
    why = since[-1][1] if since else " ".join(verdicts.reasons(update, decision, window)) or meaning
    return {
        **update,
        "tone": standing or verdict or "none",
        "headline": headline,
        "reason": why,
        "budgets": _budgets(values),
        "shrink": None
        if values is None
        else (values.shrink if isinstance(values, BoundReport) else values.get("shrink")),
        "num_examples": window.get("num_examples"),
    }


def _drift_plot(rows: Sequence[Mapping[str, Any]], marks: Mapping[float, str]) -> str | None:
    series: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        for budget, name in zip(row["budgets"][1::2], ("weights", "behaviour"), strict=False):
            series.setdefault(name, []).append((row["number"], budget["share"]))
    return plots.lines(series, x="update", y="share of the drift budget", limit=("limit", 1.0), marks=marks)


def _windows(updates: Sequence[Mapping[str, Any]]) -> list[tuple[str, int, int]]:
    """(kind, number, caught) for the updates whose kind is known."""
    found: dict[str, list[bool]] = {}
    for update in updates:
        if update.get("truth"):
            found.setdefault(str(update["truth"]), []).append(bool(update.get("is_caught")))
    return [(kind, len(caught), sum(caught)) for kind, caught in sorted(found.items())]


def _compared(comparison: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, list[Any]]]:
    names = dict.fromkeys(name for column in comparison.values() for name in column)
    return [(name, [column.get(name) for column in comparison.values()]) for name in names]


@cache
def _environment() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    made = Environment(
        loader=PackageLoader("cltrain.monitoring"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    made.filters |= {"number": _number, "percent": lambda x: f"{100 * x:.0f}%", "when": _when, "seconds": _seconds}
    return made


def _write(path: Path, template: str, **values: Any) -> Path:
    """Render and put in place in one move, so that a reader never sees half a page."""
    text = _environment().get_template(template).render(**values)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, draft = tempfile.mkstemp(dir=path.parent, prefix=".page-")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
    os.chmod(draft, 0o644)
    os.replace(draft, path)
    return path


def _number(value: Any) -> str:
    if value is None:
        return "\N{EN DASH}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer() and abs(value) < 1e6):
        return f"{int(value):,}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _when(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%d %b %Y, %H:%M:%S UTC")


def _seconds(value: float) -> str:
    if value < 1:
        return f"{1000 * value:.0f} ms"
    if value < 120:
        return f"{value:.1f} s"
    return f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.1f} h"
