"""What a page says of an update's verdict, why it fell, and what became of the candidate since.

`update` is everywhere the mapping that report.update_page documents, with None for what it leaves out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cltrain.monitoring import plain
from cltrain.records import Decision, Verdict

SAID = {
    Verdict.PROMOTE.value: ("Promoted", "The candidate is better and broke nothing that is protected."),
    Verdict.HOLD.value: ("On hold", "There is not enough evidence yet to say that the candidate may serve."),
    Verdict.REJECT.value: ("Rejected", "The candidate may not serve. What served before goes on serving."),
    Verdict.ERROR.value: ("No verdict", "Something failed on the way. What served before goes on serving."),
}
SINCE = {
    "waits": ("Waits for your yes", "The gate would let the candidate serve. Nothing moves until a person says yes."),
    "observed": ("Would be promoted", "The gate would let the candidate serve. Nothing moved."),
    "outdated": ("Passed, never served", "What the candidate was compared with serves no more: it is too late for it."),
    "tried": ("On trial", "The gate let it pass. It is tried on live traffic, and serves when that shows no harm."),
    "taken_back": ("Taken back", "The gate let it pass, and it was taken back while it was tried on live traffic."),
    "rolled_back": ("Rolled back", "The candidate served and was taken back."),
    "trial": ("A trial that passed", "The gate would have let the candidate serve. A trial is thrown away."),
}
DISCARDED = ("Discarded", "The update was thrown away before it was judged. What served before goes on serving.")
RUNNING = ("Under way", "This update has not ended yet.")

TILES = {
    "promote": "promoted",
    "waits": "waiting for a yes",
    "observed": "would be promoted",
    "outdated": "passed, never served",
    "trial": "trials that passed",
    "tried": "on trial",
    "taken_back": "taken back",
    "rolled_back": "rolled back",
    "hold": "on hold",
    "reject": "rejected",
    "error": "without a verdict",
}


def standing(update: Mapping[str, Any], verdict: str | None) -> str | None:
    """What became of a promotion, a key of SINCE; None where the verdict says it all."""
    if verdict != Verdict.PROMOTE.value or update["standing"] == "serves":
        return None
    if update["standing"] is not None:
        return str(update["standing"])
    has_moved = update["candidate"] in (None, update["serving"])
    of_mode = {"observe": "observed", "approve": "waits", "trial": "trial"}
    return None if has_moved else of_mode.get(str(update["mode"]))


def said(update: Mapping[str, Any], standing: str | None, verdict: str | None) -> tuple[str, str]:
    if standing is not None:
        return SINCE[standing]
    if verdict in SAID:
        return SAID[verdict]
    return DISCARDED if update.get("state") == "discarded" else RUNNING


def reasons(update: Mapping[str, Any], decision: Decision | None, window: Mapping[str, Any]) -> list[str]:
    """One plain sentence per check that decided; then what is no check's, each said once."""
    checks = decision.checks if decision else ()
    settled = plain.decisive(checks, decision.verdict.value) if decision else []
    plainly = [plain.sentence(check, update["settings"] or {}) for check in settled]
    if decision and decision.verdict is Verdict.PROMOTE and len(settled) < len(checks):
        plainly.append(f"None of the other {len(checks) - len(settled)} checks found a loss.")
    texts = [*(decision.reasons if decision else ()), update.get("reason"), window.get("reason")]
    others: list[str] = []
    for text in filter(None, texts):
        is_known = text.startswith(tuple(f"{check.name}: " for check in checks))
        if not is_known and not any(text in other or other in text for other in others):
            others.append(text)
    return plainly + others


def history(update: Mapping[str, Any]) -> list[tuple[float, str]]:
    """(when, what) happened to the candidate after the verdict."""
    lines = []
    for entry in update["history"] or ():
        payload = entry["payload"]
        if entry["kind"] == "rollout":
            text = _tried(payload)
        elif entry["kind"] == "promote":
            who = "A person said yes" if payload["is_human"] else "The gate said yes"
            text = f"{who}: {payload['to']} serves from here on."
        elif update["candidate"] in payload["undone"]:
            then = ", and learning was frozen" if payload["freeze"] else ""
            text = (
                f"Rolled back to {payload['to']} ({payload['reason']}): {payload['num_quarantined']} records that were "
                f"learned since are set aside{then}."
            )
        else:
            text = f"Serves again: {payload['from']} was rolled back ({payload['reason']})."
        lines.append((entry["at"], text))
    return lines


def _tried(payload: Mapping[str, Any]) -> str:
    """One step of a candidate on live traffic."""
    counts = payload["evidence"].get("episodes", {})
    after = f"after {counts.get('candidate', 0)} of its episodes beside {counts.get('incumbent', 0)}"
    return {
        "begun": f"Tried as {payload['kind']} on {payload['weight']:.0%} of the traffic.",
        "weight": f"Tried on {payload['weight']:.0%} of the traffic, {after}.",
        "promoted": f"The trial is over, {after}.",
        "back": f"Taken back to {payload['incumbent']} {after}: {payload['reason']}.",
    }[payload["outcome"]]
