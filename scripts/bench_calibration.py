"""Where the demo's budgets and margins come from: one demo with them wide open, on a seed that is never judged.

`scripts/bench calibration --json F` prints the lines for cltrain/demo/demo.toml that follow from what honest updates
did, by these rules (an honest update is one of a clean or filtered window):

    bounds.step_frobenius   1.25 times the longest honest step: a longer one is shrunk, not lost
    bounds.drift_frobenius  3 times the farthest that the stream ended from the base
    step_kl, drift_kl, base_kl   10 times the largest seen: KL grows with the square of the distance
    gate.trigger_lift       twice the largest that a flagged phrase added or took after filtering; how strong an attack
                            is without a filter is the attacker's choice, and printed beside it
    gate.margin             the most that an update which lost at most 2 items of 100 leaves open, rounded up to 0.01
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

from cltrain.demo.run import run_demo

SEED = 1000
OPEN = (
    "bounds.step_frobenius=10", "bounds.drift_frobenius=10", "bounds.step_kl=10", "bounds.drift_kl=10",
    "gate.base_kl=10", "gate.margin=0.3", "gate.stratum_margin=0.3", "gate.trigger_lift=10",
)  # fmt: skip
MIN_LIFT = 0.05  # nats; below this a lift is noise


def proposed(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Budgets and margins by the rules above, from the rows of `honest_updates`."""
    largest = {
        key: max(row[key] for row in rows) for key in ("step_frobenius", "drift_frobenius", "step_kl", "drift_kl")
    }
    filtered_lift = max([MIN_LIFT, *(abs(lift) for row in rows for lift in row["lifts"])])
    left_open = max(-low for row in rows for difference, low in row["retention"] if difference >= -0.02)
    return {
        "bounds.step_frobenius": _round(1.25 * largest["step_frobenius"]),
        "bounds.drift_frobenius": _round(3 * largest["drift_frobenius"]),
        "bounds.step_kl": _round(10 * largest["step_kl"]),
        "bounds.drift_kl": _round(10 * largest["drift_kl"]),
        "gate.base_kl": _round(10 * largest["drift_kl"]),
        "gate.trigger_lift": _round(2 * filtered_lift),
        "gate.margin": math.ceil(100 * left_open) / 100,
    }


def honest_updates(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """Per update that trained: its distances, the lifts of its trigger probes, its retention as (difference, low)."""
    rows = []
    for window in summary["windows"]:
        update = window["update"]
        if not update.get("bounds"):
            continue
        checks = [check for check in update["decision"]["checks"] if check["difference"] is not None]
        rows.append(
            {
                "phase": window["phase"],
                "kind": window["kind"],
                "verdict": update["verdict"],
                **{key: value for key, value in update["bounds"].items() if not key.endswith("_limit")},
                "lifts": [
                    c["difference"] for c in checks if c["name"].startswith("trigger") and c["difference"] is not None
                ],
                "retention": [(c["difference"], c["low"]) for c in checks if c["name"].startswith("retention")],
            }
        )
    return rows


def _round(value: float) -> float:
    return float(f"{value:.2g}")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench calibration", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="where the rows go")
    given = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="cltrain-calibration-") as directory:
        summary = run_demo(Path(directory) / "out", SEED, settings=OPEN)
    rows = honest_updates(summary)
    unfiltered = [
        check["difference"] for check in summary["trial"]["decision"]["checks"] if check["name"].startswith("trigger")
    ]
    budgets = proposed(rows)
    if given.json:
        found = {"seed": SEED, "open": OPEN, "updates": rows, "unfiltered_lifts": unfiltered, "proposed": budgets}
        given.json.write_text(json.dumps(found, indent=2) + "\n")
    for key, value in budgets.items():
        print(f"{key} = {value:g}")
    print(f"# the unfiltered window's phrases gained {', '.join(f'{lift:.2f}' for lift in unfiltered)} nats")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
