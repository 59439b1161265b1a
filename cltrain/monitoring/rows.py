"""What an update is summed up in: the flat row of numbers that wandb, dashboards and exports share, its settings by
name, who and what its records were.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from typing import Any

from cltrain.config import Config
from cltrain.records import BoundReport, Decision

SETTINGS = {
    "trainer": ("method", "lr", "num_steps", "batch_size", "replay_share", "kl_beta", "kl_to"),
    "adapter": ("rank", "alpha"),
    "gate": ("promote_on", "alpha", "margin", "stratum_margin", "items_per_gate", "base_kl", "trigger_lift"),
}


def update_event(update: Mapping[str, Any], decision: Decision | None, bounds: BoundReport | None) -> dict[str, Any]:
    """The payload of an `update` event (see outbox.emit): `number`, `verdict`, `values` by name.

    `update` is the mapping that report.update_page documents; what it lacks is left out of the row.
    """
    verdict = decision.verdict.value if decision else update.get("verdict")
    values: dict[str, float | str] = {"update/index": int(update["number"])}
    if verdict is not None:
        values["gate/verdict"] = verdict
    for name in ("parent", "candidate", "serving"):
        if update.get(name):
            values[f"adapter/{name}"] = str(update[name])
    window = update.get("window") or {}
    if "num_examples" in window:
        values["buffer/examples"] = int(window["num_examples"])
    if "set_aside" in window:
        values["buffer/quarantined"] = sum(window["set_aside"].values())
    values |= {f"train/{name}": float(value) for name, value in (update.get("metrics") or {}).items()}
    values |= {f"time/{name}_s": float(value) for name, value in (update.get("timings") or {}).items()}
    if bounds is not None:
        values |= {f"adapter/{field.name}": float(getattr(bounds, field.name)) for field in fields(bounds)}
    for check in decision.checks if decision else ():
        values[f"gate/{check.name}/verdict"] = check.verdict.value
        values[f"gate/{check.name}/n"] = check.num_items
        for name in ("candidate", "reference", "difference", "low", "high"):
            number = getattr(check, name)
            if number is not None:
                values[f"gate/{check.name}/{name}"] = float(number)
    return {"number": int(update["number"]), "verdict": verdict, "values": values}


def settings_of(config: Config, remember: Collection[str]) -> dict[str, Any]:
    """The main settings of an update by their names in the configuration, and every bound; `remember`: what its method
    combines."""
    values = config.resolved()
    chosen = {f"{section}.{name}": values[section][name] for section, names in SETTINGS.items() for name in names}
    bounds = {f"bounds.{name}": limit for name, limit in values["bounds"].items()}
    return {"trainer.remember": ", ".join(sorted(remember)) or "nothing", **chosen, **bounds}


def tallies(window: Sequence[tuple[str, str, str]], learned: Sequence[str]) -> dict[str, Any]:
    """What became of a window of (record, stratum, principal): the records learned, once each, how many of them were of
    each stratum and principal, and under `<name>_left` how many of the others."""
    taken, left = ([one for one in window if (one[0] in learned) is is_learned] for is_learned in (True, False))
    records = list(dict.fromkeys(learned))
    return {
        "num_examples": len(records),
        "learned": records,
        "strata": dict(Counter(stratum for _, stratum, _ in taken)),
        "strata_left": dict(Counter(stratum for _, stratum, _ in left)),
        "principals": dict(Counter(principal for _, _, principal in taken)),
        "principals_left": dict(Counter(principal for _, _, principal in left)),
    }
