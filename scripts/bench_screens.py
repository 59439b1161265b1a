"""The trigger scan on synthetic windows: how many planted phrases it finds, how many clean windows it suspects."""

from __future__ import annotations

from cltrain.experience.bench import main

if __name__ == "__main__":
    main()
