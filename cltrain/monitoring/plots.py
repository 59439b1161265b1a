"""The reports' plots, as inline SVG: responsive, no scripts, the page's own font."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from cltrain.records import Check, Verdict

COLOURS = {
    Verdict.PROMOTE.value: "#1a7f4b",
    Verdict.HOLD.value: "#b7791f",
    Verdict.REJECT.value: "#c0392b",
    Verdict.ERROR.value: "#6b7280",
    "waits": "#2563eb",
    "rolled_back": "#7c3aed",
}
LINES = ("#2563eb", "#d97706", "#059669", "#9333ea", "#dc2626", "#0891b2", "#65a30d", "#db2777")
INK, GRID, PALE = "#374151", "#e5e7eb", "#9ca3af"
WIDTH_IN = 5.0  # narrow on purpose: scaled to a phone's width the text stays readable

Points = Sequence[tuple[float, float]]


def intervals(checks: Sequence[Check]) -> str | None:
    """One row per check that has a difference: candidate minus reference with its interval, against zero."""
    shown = [check for check in checks if check.difference is not None]
    if not shown:
        return None
    figure, axes = _figure(0.75 + 0.34 * len(shown))
    for row, check in enumerate(reversed(shown)):
        colour = COLOURS[check.verdict.value]
        assert check.difference is not None
        if check.low is not None and check.high is not None:
            axes.plot([check.low, check.high], [row, row], color=colour, lw=5, alpha=0.35, solid_capstyle="round")
        axes.plot([check.difference], [row], "o", color=colour, ms=6)
    axes.axvline(0, color=PALE, lw=1)
    axes.set_yticks(range(len(shown)), [check.name for check in reversed(shown)])
    axes.set_ylim(-0.6, len(shown) - 0.4)
    axes.set_xlabel("worse than the reference  \N{LEFTWARDS ARROW}  0  \N{RIGHTWARDS ARROW}  better")
    axes.grid(axis="x", color=GRID)
    return _svg(figure)


def lines(
    series: Mapping[str, Points],
    *,
    x: str,
    y: str,
    limit: tuple[str, float] | None = None,
    is_share: bool = False,
    marks: Mapping[float, str] | None = None,
) -> str | None:
    """Lines over x; `limit` draws a labelled ceiling, `marks` colours the x axis by verdict, shares fill 0 to 1."""
    drawn = {name: sorted(points) for name, points in series.items() if len(points) > 0}
    if not drawn:
        return None
    rows = (len(drawn) + 2) // 3 if len(drawn) > 1 else 0
    figure, axes = _figure(2.75 + 0.2 * rows)
    for colour, (name, points) in zip(LINES * (1 + len(drawn) // len(LINES)), drawn.items(), strict=False):
        xs, ys = [p[0] for p in points], [p[1] for p in points]
        axes.plot(xs, ys, color=colour, lw=1.8, marker="o" if len(xs) < 40 else None, ms=3.5, label=name)
    if limit is not None:
        axes.axhline(limit[1], color=COLOURS["reject"], lw=1.2, ls=(0, (4, 3)))
        axes.annotate(
            limit[0],
            (1, limit[1]),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="bottom",
            color=COLOURS["reject"],
        )
        axes.set_ylim(bottom=0, top=max(limit[1] * 1.18, axes.get_ylim()[1]))
    if is_share:
        axes.set_ylim(-0.03, 1.03)
    for at, verdict in (marks or {}).items():
        axes.axvline(at, ymax=0.025, color=COLOURS.get(verdict, PALE), lw=4)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(color=GRID)
    if len(drawn) > 1:
        axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=3, frameon=False, handlelength=1.2)
    return _svg(figure)


def _figure(height_in: float) -> tuple[Any, Any]:
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context(_style()):
        figure = Figure(figsize=(WIDTH_IN, height_in), layout="constrained")
        FigureCanvasAgg(figure)
        return figure, figure.add_subplot()


def _svg(figure: Any) -> str:
    """The figure as an <svg> element, the same bytes for the same data; text in it is escaped by matplotlib."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context(_style()):
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _style() -> dict[str, Any]:
    return {
        "svg.fonttype": "none", "svg.hashsalt": "cltrain", "text.parse_math": False, "font.size": 10.5,
        "font.family": "DejaVu Sans", "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": PALE,
        "axes.labelcolor": INK, "axes.labelsize": 10, "text.color": INK, "xtick.color": INK, "ytick.color": INK,
        "xtick.labelsize": 10, "ytick.labelsize": 10, "axes.axisbelow": True, "grid.linewidth": 0.8,
        "legend.fontsize": 10,
    }  # fmt: skip
