"""The promise about swaps: under constant load no request fails, and every answer is one adapter's, the stamped one."""

from contextlib import closing

import pytest

from cltrain.deploy.client import ServerClient
from cltrain.deploy.engine import Engine
from cltrain.deploy.serve import running_server
from cltrain.models.base import load_base
from scripts.bench_swaps import NUM_TOKENS, run_swaps, train_numbers
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
    assert {row.model for row in log.answers} == {row.name for row in log.swaps}
    assert {row.is_stream for row in log.answers} == {True, False}
    assert all(len(row.text.split()) >= NUM_TOKENS // 2 for row in log.answers)
    assert log.figures()["failed_requests"] == log.figures()["wrong_answers"] == 0


def test_a_wrong_adapter_under_a_right_name_is_seen(numbers):
    base, adapters = numbers
    three, five, *_ = sorted(adapters)
    crossed = {three: adapters[five], five: adapters[three]}
    with closing(Engine(base)) as engine, running_server(engine) as url, ServerClient(url, "base") as server:
        log = run_swaps(server, crossed, num_swaps=2, num_clients=2, answers_per_swap=2)
    assert log.figures()["wrong_answers"] == len(log.answers) > 0
