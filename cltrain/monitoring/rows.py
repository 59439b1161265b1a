"""One flat row of numbers per update: the names that wandb, dashboards and exports share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from cltrain.records import BoundReport, Decision


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
