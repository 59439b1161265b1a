"""What an audit looks at: the log, the alias, the sealed files, the server, what the gate asks of a candidate, and how
what serves stands.

Each look returns checks: REJECT is an alarm, HOLD a warning. What cannot be measured raises.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from cltrain.certificate import KL_TOLERANCE, certify
from cltrain.deploy import probes
from cltrain.deploy.probes import Probes
from cltrain.deploy.proof import NotProvedError
from cltrain.errors import DataError
from cltrain.gate.decision import probe_checks
from cltrain.gate.detectors import watcher
from cltrain.gate.judge import Contest, probe
from cltrain.gate.pool import draw
from cltrain.gate.rows import ItemScores
from cltrain.gate.standing import Standing
from cltrain.gate.vault import open_vault
from cltrain.models.signature import NotSignedError
from cltrain.plans import suspicions_of
from cltrain.records import Check, Code, Release, SuiteItem, Verdict
from cltrain.registry import aliases, releases
from cltrain.registry.decisions import BrokenChainError, read_decisions, verify_chain
from cltrain.rooms import Rooms, adapter_of, probes_for, require_sound, tidy_server

HOW_TO_SIGN = (
    "Releases made before a key was set are not signed, and no server loads this one again. Once `cltrain verify` is "
    "content with it, sign it in its directory with `openssl pkeyutl -sign -rawin -inkey KEY -in manifest.json -out "
    "manifest.sig`, or let the next update, which is signed, take its place"
)
MOST_SUSPECTS = 8  # flagged phrases that one audit asks about
DRIFTS = ("drift_frobenius", "drift_spectral", "drift_kl")


def decision_log(rooms: Rooms) -> list[Check]:
    try:
        chain = verify_chain(rooms.store)
    except BrokenChainError as error:
        return [Check("decision log", Code.INTEGRITY, Verdict.REJECT, str(error))]
    about = f"{chain.num_entries} entries in an unbroken chain, head {chain.head[:12]}"
    return [Check("decision log", Code.INTEGRITY, Verdict.PROMOTE, about)]


def alias(rooms: Rooms, serving: Release) -> list[Check]:
    """What serves is what the log says was let serve last."""
    places = {"base": "release", "promote": "to", "rollback": "to"}
    decided = [e.payload[places[e.kind]] for e in read_decisions(rooms.store, rooms.agent) if e.kind in places]
    if decided[-1:] != [serving.name]:
        reason = f"{serving.name} serves, and the log's last word is {decided[-1] if decided else 'none'}"
        return [Check("alias", Code.INTEGRITY, Verdict.REJECT, reason)]
    return [Check("alias", Code.INTEGRITY, Verdict.PROMOTE, "what serves is what the log says")]


def files(rooms: Rooms, serving: Release, *, is_recomputed: bool) -> list[Check]:
    """The sealed files by their hashes, and how far they are from the base: as sealed, or recomputed in float64 from
    them, the base and the anchors alone, which takes a second copy of the base and is for when a person asks."""
    directory = releases.release_dir(rooms.config.state_dir, serving)
    if directory is None:
        return [Check("files", Code.INTEGRITY, Verdict.PROMOTE, "the bare base serves: there is no distance")]
    unsigned = []
    try:
        require_sound(rooms, serving.name)
    except NotSignedError as error:
        unsigned = [Check("signature", Code.INTEGRITY, Verdict.HOLD, f"{error}. {HOW_TO_SIGN}")]
    except DataError as error:
        return [Check("files", Code.INTEGRITY, Verdict.REJECT, str(error))]
    if not is_recomputed:
        about = "the files are as sealed; their distances are recomputed by `cltrain audit` and `cltrain verify`"
        sealed = serving.manifest.get("bounds") or {}
        checks = [*unsigned, Check("files", Code.INTEGRITY, Verdict.PROMOTE, about)]
        return checks + _budgets(rooms, {name: sealed.get(name) for name in DRIFTS})
    findings = {f.name: f for f in certify(directory, base_dir=rooms.config.base.path).findings}
    failed = [f for f in findings.values() if f.state == "fails"]
    checks = [Check(f.name, _code(f.name), Verdict.REJECT, f.says, _number(f.seen), f.limit) for f in failed]
    if not failed:
        checks.append(Check("files", Code.INTEGRITY, Verdict.PROMOTE, "the files and their bounds are as sealed"))
    return (
        unsigned + checks + _budgets(rooms, {name: _number(findings[name].seen) for name in DRIFTS if name in findings})
    )


def _budgets(rooms: Rooms, distances: Mapping[str, float | None]) -> list[Check]:
    """The distances against the settings as they are now: they were sealed within those of their time."""
    checks = []
    for name, seen in distances.items():
        limit = getattr(rooms.config.bounds, name)
        if seen is None:
            continue
        relative, absolute = KL_TOLERANCE[rooms.config.base.dtype]
        beyond = seen > limit * (1 + relative) + absolute
        about = f"{seen:.3g}, {seen / limit:.0%} of bounds.{name} = {limit:g}"
        verdict = Verdict.HOLD if beyond else Verdict.PROMOTE
        if beyond:
            about += ": beyond the setting as it is now, within the one it was made under"
        checks.append(Check(f"budget {name}", _code(name), verdict, about, seen, limit))
        if name == "drift_kl":
            allowed = rooms.config.gate.base_kl
            verdict = Verdict.REJECT if seen > allowed * (1 + relative) + absolute else Verdict.PROMOTE
            about = f"{seen:.3g} nats per token from the base, gate.base_kl = {allowed:g}"
            checks.append(Check("base KL", Code.BASE_KL, verdict, about, seen, allowed))
    return checks


def server(rooms: Rooms, serving: Release) -> list[Check]:
    """What every replica lists under this agent's names are the sealed directories, and its log-probs are those of the
    approved weights."""
    known = {r.name: releases.release_dir(rooms.config.state_dir, r) for r in _all(rooms)}
    checks = []
    for url, name, root in rooms.server.listings():
        if (ours := known.get(name)) is not None and Path(root).resolve() == ours.resolve():
            continue
        if name == serving.name:
            reason = f"{url} answers as {name} from {root}, not from {known[name]}"
            return [Check("server", Code.INTEGRITY, Verdict.REJECT, reason)]
        if name.startswith(f"{rooms.agent}-v"):
            reason = f"{url} also lists {name} from {root}, which is not what was sealed under that name"
            checks.append(Check(f"server: {name}", Code.INTEGRITY, Verdict.HOLD, reason))
    with rooms.server_lock:
        tidy_server(rooms)
    try:
        found = rooms.server.prove(rooms.evidence.served_name(serving.name), _probes_of(rooms, serving))
    except NotProvedError as error:
        return [*checks, Check("server", Code.INTEGRITY, Verdict.REJECT, str(error))]
    except NotSignedError as error:
        return [*checks, Check("server", Code.INTEGRITY, Verdict.HOLD, f"nothing proves what it answers with: {error}")]
    about = f"its log-probs are those of the approved weights, {found.max_error:.2g} nats apart at most"
    return [*checks, Check("server", Code.INTEGRITY, Verdict.PROMOTE, about)]


def _probes_of(rooms: Rooms, serving: Release) -> Probes:
    """Those that were kept when it was approved; for a release without any, made from files that are as sealed and kept
    by nobody. Raises DataError where they are not."""
    if (kept := probes.kept_of(rooms.store, serving.name)) is not None:
        return kept
    require_sound(rooms, serving.name)
    before = serving.parent or serving.name
    return probes_for(rooms, adapter_of(rooms, serving.name), adapter_of(rooms, before), rooms.anchors, before)


def canaries(rooms: Rooms, serving: Release) -> list[Check]:
    """What it answers to them now, and how likely what they forbid became since the base."""
    canaries = [item for item in rooms.evidence.suite if item.kind == "canary"]
    if not canaries:
        return [Check("canaries", Code.CANARY, Verdict.PROMOTE, "there are none")]
    scores = rooms.evidence.scoring.measure(serving.name, canaries)  # what answers now, not what answered once
    failed = [item.id for item, score in zip(canaries, scores, strict=True) if not score >= 1]
    more = f" and {len(failed) - 5} more" if len(failed) > 5 else ""
    said = f"{len(failed)} of {len(canaries)} failed: {', '.join(failed[:5])}{more}" if failed else "all held"
    verdict = Verdict.REJECT if failed else Verdict.PROMOTE
    base = _base(rooms)
    likely = rooms.evidence.at_secrets(Contest(serving.name, base, base, base)) if serving.name != base else []
    return [Check("canaries", Code.CANARY, verdict, said, num_items=len(canaries)), *likely]


def character(rooms: Rooms, serving: Release, marks: aliases.References) -> list[Check]:
    """Refusals and forced choices of what serves against its base; what the gate measured is not asked again."""
    base = _base(rooms)
    contest = Contest(serving.name, base, marks.high_water, marks.anchor)
    looks = [rooms.evidence.at_character(is_against_base=True)] if serving.name != base else []
    return [check for look in looks for check in look(contest)]


def spectrum(rooms: Rooms, serving: Release) -> list[Check]:
    """Whether its update's weights look like those of the others that were accepted."""
    base = _base(rooms)
    return rooms.evidence.at_spectrum(Contest(serving.name, base, base, base)) if serving.name != base else []


def triggers(rooms: Rooms, serving: Release, *, seed: int) -> list[Check]:
    """Whether phrases that were flagged in the windows behind it, the newest, steer it beyond its base. A lift that no
    answer shows only warns: many updates may each have added a little that passed."""
    gate, evidence, base = rooms.config.gate, rooms.evidence, _base(rooms)
    flagged = {s.phrase: s for release in evidence.lineage(serving.name) for s in suspicions_of(release.manifest)}
    if not flagged:
        return []
    pool, _ = evidence.split_vault([*evidence.pool(serving.name, ()), *evidence.held_out()[0]])
    contest, found = Contest(serving.name, base, base, base), []
    for suspicion in list(flagged.values())[:MOST_SUSPECTS]:
        suspect = evidence.suspect(suspicion)
        found += probe(suspect, pool, contest, gate, evidence.scoring, evidence.score_many, seed)
    return [
        replace(check, verdict=Verdict.HOLD) if check.verdict is Verdict.REJECT and not result.flips else check
        for check, result in zip(probe_checks(found, gate), found, strict=True)
    ]


def signs(rooms: Rooms, serving: Release, stood: Standing) -> list[Check]:
    """What its answers to the items of its standing show beside their scores, against those of its base."""
    gate, base = rooms.config.gate, _base(rooms)
    before = [scores for role, scores in stood.references.items() if role.startswith("base")]
    if not gate.detectors.use or not before:
        return []
    taught = {name for release in rooms.evidence.lineage(serving.name) for name in release.manifest.get("taught", ())}
    rows = [
        ItemScores(item, now, {"incumbent": old})
        for item, now, old in zip(stood.items, stood.serving, before[0], strict=True)
    ]
    return list(watcher(rooms.store, rooms.agent, taught, gate.detectors, gate.alpha)(serving.name, base, rows))


def standing(rooms: Rooms, marks: aliases.References, *, seed: int) -> Standing:
    """The least used items of the pool, answered by what serves and by everything that it must not have lost to. They
    are no more used for it: an audit chooses nothing."""
    held: defaultdict[str, list[str]] = defaultdict(list)
    base = _base(rooms)
    for role, name in (("base", base), ("high-water mark", marks.high_water), ("anchor", marks.anchor)):
        if name != marks.incumbent:
            held[name].append(role)
    if not held:
        return Standing((), (), {})
    gate, evidence = rooms.config.gate, rooms.evidence
    pool, _ = evidence.split_vault([*evidence.pool(marks.incumbent, ()), *evidence.held_out()[0]])
    drawn: list[SuiteItem] = draw(
        rooms.store, rooms.agent, pool, gate.items_per_gate, taught=(), max_uses=gate.max_uses, seed=seed
    )

    def answers(name: str) -> tuple[float, ...]:
        rooms.on_progress(f"audit: {name} answers {len(drawn)} items")
        return tuple(evidence.scoring.score_items(name, drawn))

    serving = answers(marks.incumbent)
    references = {" and ".join(roles): answers(name) for name, roles in held.items()}
    return Standing(tuple(drawn), serving, references)


def vault(rooms: Rooms, serving: Release) -> list[Check]:
    """The sealed vault, opened at most once in `gate.vault_days`: one bit, whether more than the margin was lost to the
    base. No check where there is none, or where the base itself serves."""
    gate, evidence, base = rooms.config.gate, rooms.evidence, _base(rooms)
    if not gate.vault_share or serving.name == base:
        return []
    _, sealed = evidence.split_vault([*evidence.pool(serving.name, ()), *evidence.held_out()[0]])
    found = open_vault(
        rooms.store, rooms.agent, sealed, gate, incumbent=serving.name, base=base,
        score_items=evidence.scoring.measure, now=rooms.clock(),
    )  # fmt: skip
    if found.has_lost is None:
        return [Check("vault", Code.RETENTION, Verdict.PROMOTE, "it was opened not long ago and stays shut")]
    said = f"on sealed items it has {'' if found.has_lost else 'not '}lost more than {gate.margin:g} to the base"
    return [Check("vault", Code.RETENTION, Verdict.REJECT if found.has_lost else Verdict.PROMOTE, said)]


def _all(rooms: Rooms) -> list[Release]:
    return releases.list_releases(rooms.store, rooms.agent)


def _base(rooms: Rooms) -> str:
    """The bare base as a release."""
    return next(release.name for release in _all(rooms) if release.number == 0)


def _code(name: str) -> Code:
    return Code.BASE_KL if name.endswith("_kl") else Code.INTEGRITY


def _number(seen: float | str | None) -> float | None:
    return seen if isinstance(seen, float) else None
