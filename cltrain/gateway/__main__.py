"""The gateway alone: `python -m cltrain.gateway [--config FILE ...] [--set section.key=value ...]`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from cltrain.config import load
from cltrain.errors import CltrainError
from cltrain.gateway.app import run_gateway


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m cltrain.gateway", description="Serve the gateway alone.")
    parser.add_argument("--config", type=Path, action="append", default=[], help="TOML file; may be repeated")
    parser.add_argument("--set", dest="overrides", action="append", default=[], help="section.key=value")
    given = parser.parse_args()
    try:
        run_gateway(load(given.config, given.overrides))
    except CltrainError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
