"""Settings that must stand before anything imports torch or triton: one thread, no network, kernels interpreted."""

import os
import shutil

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
if shutil.which("nvidia-smi") is None:  # triton reads this once, when it is first imported, by whomever
    os.environ.setdefault("TRITON_INTERPRET", "1")
