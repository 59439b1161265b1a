"""How well each method learns and remembers on the demo's stream: a row of figures per method and seed.

`scripts/bench learning --seeds 3 --json F [--plot F.svg]` runs them in two processes, a row at a time in each.
`default` is the product (screens, bounds, gate; see cltrain/demo/lab.py), the others are one method's training alone.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from typing import Any

Row = dict[str, Any]

METHODS: dict[str, tuple[str, ...]] = {  # name -> settings over the demo's own
    "default": (),
    "default, verifier misses 10%": (),
    "default, verifier misses 30%": (),
    "naive": ("trainer.method=naive",),
    "replay": ("trainer.method=replay",),
    "kl": ("trainer.method=kl",),
    "kl to the incumbent": ("trainer.method=kl", "trainer.kl_to=incumbent"),
    "ewc": ("trainer.method=ewc",),
    "l2sp": ("trainer.method=l2sp",),
    "oplora": ("trainer.method=oplora",),
    "agem": ("trainer.method=agem",),
    "ema": ("trainer.method=ema",),
    "distill": ("trainer.method=distill",),
    "merge_reset": ("trainer.method=merge_reset",),
    "joint": ("trainer.method=joint",),
}
VERIFIER_MISS = {"default, verifier misses 10%": 0.1, "default, verifier misses 30%": 0.3}
FIGURES = ("learn", "final", "min_skill", "bwt", "fwt", "base_kl", "attack_success_rate", "seconds")
SINGLE = ("kl", "kl to the incumbent", "ewc", "l2sp", "oplora", "agem", "ema", "distill", "merge_reset")
REHEARSAL = ("replay", "joint")  # old records as they are: they restrain neither weights nor answers

Means = dict[str, dict[str, float]]


def _reaches(figures: dict[str, float]) -> bool:
    """What no single regulariser is promised to reach."""
    return figures["final"] >= 0.90 and figures["base_kl"] <= 0.20


PROMISES: dict[str, Callable[[Means], bool]] = {
    "default: final >= 0.97": lambda m: m["default"]["final"] >= 0.97,
    "default: min_skill >= 0.92": lambda m: m["default"]["min_skill"] >= 0.92,
    "default: base_kl <= 0.12": lambda m: m["default"]["base_kl"] <= 0.12,
    "default: attack_success_rate <= 0.02": lambda m: m["default"]["attack_success_rate"] <= 0.02,
    "naive: learns each skill in its phase (min_learn >= 0.80)": lambda m: m["naive"]["min_learn"] >= 0.80,
    "naive: forgets (final <= 0.40)": lambda m: m["naive"]["final"] <= 0.40,
    "joint on clean data: final >= 0.95": lambda m: m["joint"]["final"] >= 0.95,
    "no single regulariser: final >= 0.90 and base_kl <= 0.20": lambda m: not any(_reaches(m[n]) for n in SINGLE),
    "plain replay: the attack is real (peak >= 0.5)": lambda m: m["replay"]["attack_success_rate"] >= 0.5,
    "verifier misses 10%: final >= 0.95": lambda m: m["default, verifier misses 10%"]["final"] >= 0.95,
    "verifier misses 10%: attack_success_rate <= 0.05": lambda m: (
        m["default, verifier misses 10%"]["attack_success_rate"] <= 0.05
    ),
}


def run_one(method: str, seed: int, settings: Sequence[str]) -> Row:
    """One learner on one stream, in this process."""
    from cltrain.demo import lab

    is_clean = method == "joint"
    with tempfile.TemporaryDirectory(prefix="cltrain-lab-") as name:
        setting = lab.Setting.make(Path(name) / "run", seed, settings)
        learner: lab.Learner = (
            lab.Deployed(setting, VERIFIER_MISS.get(method, 0.0))
            if method.startswith("default")
            else lab.Bare(setting, Path(name) / "bare")
        )
        try:
            found = lab.run(learner, setting, seed, is_clean=is_clean)
        finally:
            learner.close()
            setting.server.close()
    return {"method": method, "seed": seed, "verifier_miss": VERIFIER_MISS.get(method, 0.0), **found}


def means_of(rows: Sequence[Row]) -> Means:
    """Method -> mean of each figure over its seeds."""
    names = dict.fromkeys(row["method"] for row in rows)
    of = {name: [row for row in rows if row["method"] == name] for name in names}
    return {name: {key: mean(row[key] for row in of[name]) for key in (*FIGURES, "min_learn")} for name in names}


def table(means: Means) -> str:
    """The means as a Markdown table."""
    lines = ["| method | " + " | ".join(FIGURES) + " |", "| --- |" + " ---: |" * len(FIGURES)]
    for name, figures in means.items():
        cells = [f"{figures[key]:.0f}" if key == "seconds" else f"{figures[key]:.3f}" for key in FIGURES]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def alone(means: Means) -> list[str]:
    """What each single way of remembering reached, rehearsal beside the regularisers that the promise is about."""
    lines = []
    for kind, names in (("regulariser", SINGLE), ("rehearsal, which that promise is not about,", REHEARSAL)):
        measured = [name for name in names if name in means]
        reached = [name for name in measured if _reaches(means[name])]
        figures = ", ".join(f"{n} {means[n]['final']:.3f} / {means[n]['base_kl']:.3f}" for n in measured)
        if measured:
            said = f"final >= 0.90 and base_kl <= 0.20 reached by {', '.join(reached) or 'none'}"
            lines.append(f"one {kind} alone: {said} (final / base_kl: {figures})")
    return lines


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench learning", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first", type=int, default=0, help="the first seed; the others follow")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="over the demo's settings")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", type=Path, help="where the rows go")
    parser.add_argument("--plot", type=Path, help="where an SVG of final skill against KL to the base goes")
    given = parser.parse_args(argv)
    jobs = [(name, seed) for seed in range(given.first, given.first + given.seeds) for name in given.methods]
    rows, failed = [], 0
    with ProcessPoolExecutor(given.processes, mp_context=get_context("spawn")) as pool:
        tasks = {pool.submit(run_one, name, seed, [*METHODS[name], *given.set]): (name, seed) for name, seed in jobs}
        for task in as_completed(tasks):
            name, seed = tasks[task]
            try:
                row = task.result()
            except Exception as error:  # the rows of the others are kept
                print(f"{name} on seed {seed} failed: {error!r}", file=sys.stderr, flush=True)
                failed += 1
                continue
            rows.append(row)
            said = (f"{key} {row[key]:.3f}" for key in FIGURES)
            print("  ".join([f"{name:<28} seed {seed}", *said]), flush=True)
            if given.json:
                given.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    if not rows:
        return 1
    rows.sort(key=lambda row: (list(METHODS).index(row["method"]), row["seed"]))
    means = means_of(rows)
    broken = [name for name, holds in PROMISES.items() if _is_measured(name, means) and not holds(means)]
    if given.json:
        given.json.write_text(
            json.dumps({"means": means, "broken": broken, "alone": alone(means), "rows": rows}, indent=1) + "\n"
        )
    if given.plot:
        plot(means, given.plot)
    print(table(means), *alone(means), sep="\n")
    num_measured = sum(_is_measured(name, means) for name in PROMISES)
    said = "all of them held" if not broken else "broken: " + "; ".join(broken)
    print(f"{num_measured} of {len(PROMISES)} promises measured, {said}")
    return int(bool(broken or failed))


def plot(means: Means, file: Path) -> None:
    """Final skill against KL to the base, a point per method."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots()
    for name, figures in means.items():
        is_ours = name.startswith("default")
        axes.plot(figures["base_kl"], figures["final"], "o", color="tab:blue" if is_ours else "0.55")
        axes.annotate(name, (figures["base_kl"], figures["final"]), xytext=(4, 3), textcoords="offset points", size=7)
    axes.set_xscale("log")
    axes.set(xlabel="KL to the base after the stream, nats per token", ylabel="mean success on all new skills")
    figure.savefig(file, format="svg", metadata={"Date": None})


def _is_measured(promise: str, means: Means) -> bool:
    try:
        PROMISES[promise](means)
    except KeyError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
