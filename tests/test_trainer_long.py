"""Real episodes have ten thousand tokens: memory grows with the tokens that are learned, not with all logits."""

import subprocess
import sys

PROGRAM = """
import sys
from pathlib import Path
from cltrain.config import AdapterConfig, BoundsConfig, TrainerConfig
from cltrain.models.anchors import load_anchors
from cltrain.models.base import load_base
from cltrain.records import TokenRow
from cltrain.trainer.update import train_update
from tests.tiny import make_tiny_base

directory = Path(sys.argv[1])
base = load_base(make_tiny_base(directory / "base", "qwen2", 16384, num_layers=1, num_vocabulary=4096))
anchors, _ = load_anchors(base, file=None, count=2, max_tokens=16, seed=1, directory=directory)
ids = tuple(i * 31 % 400 for i in range(10_000))
rows = [TokenRow("r", "s", "p", ids, (0.0,) * 9000 + (1.0,) * 1000)]

def peak_kib():  # not ru_maxrss: exec keeps that of the process that called it
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(row.split()[1]) for row in status if row.startswith("VmHWM"))

before = peak_kib()
candidate = train_update(base, incumbent=None, adapter=AdapterConfig(), fresh=rows, replay=[], anchors=anchors,
    trainer=TrainerConfig(num_steps=1, batch_size=1, micro_batch=1), bounds=BoundsConfig(), seed=1,
    work_dir=directory / "work")
print((peak_kib() - before) // 1024)
"""


def test_ten_thousand_tokens_fit_in_memory(tmp_path):
    """All logits of one row would be 10,000 x 4,096 floats, and training holds several copies: over 600 MiB."""
    out = subprocess.run(
        [sys.executable, "-c", PROGRAM, tmp_path], capture_output=True, text=True, check=True, timeout=250
    )
    assert 0 < int(out.stdout.split()[-1]) < 450, f"{out.stdout} MiB more than before"
