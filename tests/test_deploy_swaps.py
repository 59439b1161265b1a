"""The promise about swaps: under constant load no request fails, and every answer is one adapter's, the stamped one."""

from contextlib import closing

import numpy as np
import pytest

from cltrain.deploy.client import ServerClient
from cltrain.deploy.engine import Engine
from cltrain.deploy.serve import running_server
from cltrain.models.base import load_base
from scripts.bench_swap import (
    NUM_TOKENS,
    AnswerRow,
    SwapLog,
    WindowRow,
    p99_ratio_bound,
    run_swaps,
    train_numbers,
)
from tests.tiny import make_tiny_base


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    base = load_base(make_tiny_base(tmp_path_factory.mktemp("base")))
    return base, train_numbers(base, tmp_path_factory.mktemp("numbers"))


def test_fifty_swaps_under_eight_clients_fail_nothing_and_mix_nothing(numbers):
    base, adapters = numbers
    with closing(Engine(base)) as engine, running_server(engine) as url, ServerClient(url, "base") as server:
        log = run_swaps(server, adapters, num_swaps=50, num_clients=8, answers_per_swap=2)
    assert [row.error for row in log.answers if row.error] == []
    assert [row for row in log.answers if not row.is_right] == []
    assert len(log.swaps) == 50
    assert len({row.name for row in log.swaps}) == 50
    assert {row.model for row in log.answers} >= {row.name for row in log.swaps}
    assert {row.is_stream for row in log.answers} == {True, False}
    assert all(len(row.text.split()) >= NUM_TOKENS // 2 for row in log.answers)
    assert log.row("embedded")["failed_requests"] == log.row("embedded")["wrong_adapter_answers"] == 0


def test_a_wrong_adapter_under_a_right_name_is_seen(numbers):
    base, adapters = numbers
    three, five, *_ = sorted(adapters)
    crossed = {three: adapters[five], five: adapters[three]}
    with closing(Engine(base)) as engine, running_server(engine) as url, ServerClient(url, "base") as server:
        log = run_swaps(server, crossed, num_swaps=2, num_clients=2, answers_per_swap=2)
    assert log.row("embedded")["wrong_adapter_answers"] == len(log.answers) > 0


def test_the_bound_of_the_p99_ratio_lies_below_the_ratio_and_finds_a_real_one():
    quiet = list(np.random.default_rng(0).lognormal(size=2000))
    other = list(np.random.default_rng(1).lognormal(size=2000))
    assert 0.6 < p99_ratio_bound(other, quiet) < np.quantile(other, 0.99) / np.quantile(quiet, 0.99)
    assert 1.2 < p99_ratio_bound([2 * value for value in other], quiet) < 2.2


def test_only_answers_that_lie_whole_in_a_window_count_for_it():
    def answer(started_s, ended_s):
        return AnswerRow(0, "a", "a", "", "", False, started_s, ended_s)

    log = SwapLog(
        answers=[answer(0.0, 1.0), answer(1.5, 2.5), answer(2.5, 2.75), answer(4.0, 9.0)],
        windows=[WindowRow("quiet", 0.0, 2.0), WindowRow("swapping", 2.0, 3.0), WindowRow("quiet", 3.0, 8.0)],
    )
    assert (log.latencies_s("quiet"), log.latencies_s("swapping")) == ([1.0], [0.25])
