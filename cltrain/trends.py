"""How scores and distances move over the versions that served, and when a straight line through them meets a limit.

A version's number is its release's. The line is fitted to the newest versions that nobody rolled back; its uncertainty
is that of the mean line (90 %), so a limit may be met earlier by luck alone. A forecast decides nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import select

from cltrain.config import Config
from cltrain.registry.decisions import read_decisions
from cltrain.store.database import Store
from cltrain.store.schema import audits, releases, updates

MIN_VERSIONS = 4
NUM_FITTED = 10  # newest versions: what was learned long ago says little of the slope now
CONFIDENCE = 0.9
DISTANCES = ("drift_kl", "drift_frobenius", "drift_spectral")


@dataclass(frozen=True, slots=True)
class Point:
    """One version that served: when it began to, and what was measured of it."""

    release: str
    number: int
    at: float
    value: float


@dataclass(frozen=True, slots=True)
class Crossing:
    """Where the line meets the limit, and the first and last place where its uncertainty does; None: nowhere ahead."""

    expected: float | None
    earliest: float | None
    latest: float | None


@dataclass(frozen=True, slots=True)
class Trend:
    """One quantity over the versions; `version` and `at` (seconds since the epoch) are None for too few versions."""

    name: str
    limit: float
    is_ceiling: bool  # else a floor
    points: tuple[Point, ...]
    num_fitted: int  # of the points: the newest that were not rolled back
    version: Crossing | None
    at: Crossing | None


def read_trends(store: Store, config: Config) -> list[Trend]:
    """Every drift against the bound that updates are shrunk to; suites and strata against their best less the margin.

    Scores are those of audits, for a stratum also of the gate's own comparison where no audit asked about the version.
    """
    agent = config.agent.name
    served = _served(store, agent)
    kept = {name for name, _, _, _, status in served if status == "released"}
    trends = []
    for name in DISTANCES:
        points = [Point(its, number, at, float(b[name])) for its, number, at, b, _ in served if name in b]
        if points:
            trends.append(_trend(name, getattr(config.tightest_bounds, name), True, points, kept))
    scores = _scores(store, agent)
    for name in sorted({name for of_release in scores.values() for name in of_release}):
        points = [
            Point(release, number, at, scores[release][name])
            for release, number, at, _, _ in served
            if name in scores.get(release, ())
        ]
        if points:
            margin = config.gate.stratum_margin if name.startswith("stratum ") else config.gate.margin
            best = max(point.value for point in points)
            trends.append(_trend(name, best - margin, False, points, kept))
    return trends


def as_json(trend: Trend) -> dict[str, Any]:
    return {**asdict(trend), "says": sentence(trend)}


def sentence(trend: Trend) -> str:
    """The trend for a reader."""
    last = trend.points[-1]
    kind = "limit" if trend.is_ceiling else "best less the margin"
    now = f"{last.value:.3g} at v{last.number:06d}, {kind} {trend.limit:.3g}"
    if trend.version is None:
        return f"{now}; not enough versions for a forecast: {trend.num_fitted} of {MIN_VERSIONS}"
    if trend.version.expected is None:
        soonest = trend.version.earliest
        return now + ("; not heading there" if soonest is None else f"; not before about v{math.floor(soonest):06d}")
    return f"{now}; the line meets it {_range(trend.version, _version)}{_days(trend.at)}"


def forecast(xs: Sequence[float], ys: Sequence[float], limit: float, *, is_ceiling: bool) -> Crossing | None:
    """Where the least-squares line through (xs, ys) meets `limit` at or after the last x; None below four places.

    The edges are those of the line's pointwise 90 % confidence band (Student's t, n - 2 degrees of freedom).
    """
    num = len(xs)
    middle = math.fsum(xs) / num if num else 0.0
    spread = math.fsum((x - middle) ** 2 for x in xs)
    if len(set(xs)) < MIN_VERSIONS or not spread > 0:
        return None
    from scipy.stats import t as student

    level = math.fsum(ys) / num
    slope = math.fsum((x - middle) * (y - level) for x, y in zip(xs, ys, strict=True)) / spread
    rest = math.fsum((y - level - slope * (x - middle)) ** 2 for x, y in zip(xs, ys, strict=True))
    width = float(student.ppf((1 + CONFIDENCE) / 2, num - 2)) * math.sqrt(rest / (num - 2))
    sign = 1.0 if is_ceiling else -1.0
    last = max(xs) - middle

    def first_beyond(edge: int) -> float | None:
        """The first x from the last one on at which the line, or an edge of its band, is not inside the limit."""

        def outside(u: float) -> float:
            return sign * (level - limit + slope * u) + edge * width * math.sqrt(1 / num + u * u / spread)

        if outside(last) >= 0:
            return last + middle
        # (level - limit + slope u)^2 = (edge width)^2 (1 / n + u^2 / spread), and on the right side of the limit
        a = slope**2 - (edge * width) ** 2 / spread
        b, c = 2 * slope * (level - limit), (level - limit) ** 2 - (edge * width) ** 2 / num
        ahead = [u for u in _roots(a, b, c) if u > last and -edge * sign * (level - limit + slope * u) >= 0]
        return min(ahead) + middle if ahead else None

    return Crossing(first_beyond(0), first_beyond(1), first_beyond(-1))


def _roots(a: float, b: float, c: float) -> list[float]:
    """Of a u^2 + b u + c."""
    if a == 0:
        return [-c / b] if b else []
    inside = b * b - 4 * a * c
    if inside < -1e-9 * b * b:
        return []
    half = (-b - math.copysign(math.sqrt(max(0.0, inside)), b)) / 2  # never the difference of two near numbers
    return [half / a, c / half] if half else [0.0]


def _trend(name: str, limit: float, is_ceiling: bool, points: Sequence[Point], kept: set[str]) -> Trend:
    fitted = [point for point in points if point.release in kept][-NUM_FITTED:]
    ys = [point.value for point in fitted]
    numbers, times = [float(point.number) for point in fitted], [point.at for point in fitted]
    return Trend(
        name, limit, is_ceiling, tuple(points), len(fitted), forecast(numbers, ys, limit, is_ceiling=is_ceiling),
        forecast(times, ys, limit, is_ceiling=is_ceiling),
    )  # fmt: skip


def _served(store: Store, agent: str) -> list[tuple[str, int, float, dict[str, Any], str]]:
    """(release, number, when it last began to serve, its bounds, its status), in order of number."""
    began = {str(entry.payload["to"]): entry.at for entry in read_decisions(store, agent, kind="promote")}
    with store.read() as connection:
        rows = connection.execute(select(releases).where(releases.c.agent == agent).order_by(releases.c.number))
        return [
            (row.name, row.number, began[row.name], row.manifest.get("bounds") or {}, row.status)
            for row in rows
            if row.name in began
        ]


def _scores(store: Store, agent: str) -> dict[str, dict[str, float]]:
    """Release -> group -> its mean score: as the newest audit found it, else as the gate did."""
    found: dict[str, dict[str, float]] = {}
    with store.read() as connection:
        made = select(updates.c.candidate, updates.c.summary).where(
            updates.c.agent == agent, updates.c.candidate.is_not(None), updates.c.summary.is_not(None)
        )
        for row in connection.execute(made):
            found.setdefault(row.candidate, {}).update(_of_decision(row.summary))
        for row in connection.execute(select(audits).where(audits.c.agent == agent).order_by(audits.c.id)):
            scores = row.summary.get("scores") or {}
            found.setdefault(row.release, {}).update({name: values["serving"] for name, values in scores.items()})
    return found


def _of_decision(summary: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for check in (summary.get("decision") or {}).get("checks", ()):
        if check["name"].startswith("stratum ") and check.get("candidate") is not None:
            yield check["name"], float(check["candidate"])


def _range(crossing: Crossing, shown: Any) -> str:
    assert crossing.expected is not None
    first = shown(crossing.earliest if crossing.earliest is not None else crossing.expected)
    last = f"{shown(crossing.latest)}" if crossing.latest is not None else "never"
    return f"at about {shown(crossing.expected)} (between {first} and {last})"


def _days(crossing: Crossing | None) -> str:
    if crossing is None or crossing.expected is None:
        return ""
    return f", {_range(crossing, _day).removeprefix('at ')}"


def _version(number: float) -> str:
    return f"v{math.ceil(number):06d}" if number < 1e6 else "beyond v999999"


def _day(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d") if at < 32503680000 else "beyond the year 3000"
