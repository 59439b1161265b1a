"""Episodes with feedback, a store and a recorder for them: what tests of window and replay buffer share."""

from __future__ import annotations

import pytest

from cltrain.config import ExperienceConfig
from cltrain.experience import bench, window
from cltrain.experience.recording import Recorder
from cltrain.records import Feedback, Generation, Trajectory
from cltrain.store.database import open_store

RULES = {"learn_from": ("agent", "operator"), "tools_allowed": None}
CONFIG = ExperienceConfig(min_window=4, max_window=8, mature_after_s=100, rare_stratum=1, eval_share=0)
KEY = b"k" * 32
TOOLS = tuple(
    {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}
    for name in ("mend", "pay", "wire")
)


@pytest.fixture
def store(tmp_path):
    store = open_store(tmp_path)
    yield store
    store.close()


@pytest.fixture
def recorder(store):
    with Recorder(store, KEY, 0.0) as recorder:
        yield recorder


def episode(name, *feedback, principal=None, tool="mend", at=0.0, item="lamp", text=None, **changes):
    answer = bench.call(tool, item=item)
    fields = {
        "id": name,
        "agent": "support",
        "session": f"s-{name}",
        "principal": principal or f"p-{name}",
        "messages": ({"role": "user", "content": text or f"please see to my {item} number {name}"}, answer),
        "producers": ("user", "agent"),
        "tools": TOOLS,
        "generations": (Generation(f"g-{name}", name, 1, "r"),),
        "feedback": feedback,
        "created_at": at,
    }
    return Trajectory(**{**fields, **changes})


def thumb(name, value=1.0, at=1.0):
    return Feedback(f"f-{name}-{at}", name, score=value, created_at=at)


def good(name, **options):
    return episode(name, thumb(name), **options)


def file_as(store, records, status, now=10.0, **options):
    with store.write() as connection:
        for record in records:
            window.mark(connection, "support", record, status, now=now, **options)
