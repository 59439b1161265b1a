"""Kill -9 of gateway, server and worker while updates run, unsynced writes dropped: what is lost, doubled, half done.

The core is tests/chaos.py, which tests/test_chaos.py runs too. `--json F` gets one raw row per kill and per update.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from tests.chaos import Chaos, KillRow


def show(row: KillRow) -> None:
    state = f"{row.update} {row.update_state}" if row.update else "no update yet"
    print(
        f"{row.number:>3}  {row.at_s:6.1f} s  {row.victims:<8} {row.aim:<9} {state:<28} "
        f"dropped {row.num_writes_dropped:>3} writes, {row.num_acknowledged:>5} acknowledged, "
        f"answered after {row.answered_s:4.1f} s  {'; '.join(row.problems)}",
        flush=True,
    )


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="bench chaos", description=__doc__)
    parser.add_argument("--json", type=Path, help="write figures and raw rows here")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="leave state, logs and what was found here")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        log = Chaos(options.keep or Path(scratch), options.seed).run(options.kills, show)
    figures = log.figures()
    print(json.dumps(figures, indent=1))
    if options.json:
        rows = {"figures": figures, "kills": [asdict(row) for row in log.kills], "updates": log.updates}
        options.json.write_text(json.dumps(rows, indent=1))
    return 0 if not log.all_problems else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
