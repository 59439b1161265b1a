"""The gateway's bench: its figures are those of its rows, and a small run answers everything."""

from __future__ import annotations

from typing import Any

import pytest

from scripts.bench_gateway import Found, RequestRow, StreamRow, measure


def stream(through: str, first_ms: float, num_in_window: int, **fields: Any) -> StreamRow:
    return StreamRow(0, through, 0.0, first_ms, 90, num_in_window, **fields)


def test_the_figures_are_those_of_the_rows() -> None:
    found = Found(64, 10.0)
    found.streams = [stream("direct", ms, 90) for ms in (1.0, 2.0, 30.0)]
    found.streams += [stream("gateway", ms, n) for ms, n in ((5.0, 90), (6.0, 81), (70.0, 90))]
    found.requests = [RequestRow("gateway", i / 100, 20.0) for i in range(99)] + [RequestRow("direct", 0.0, 10.0)]
    found.requests.append(RequestRow("gateway", 5.0, 1.0, "HTTP/1.1 429"))
    figures = found.figures()
    assert figures["added_ttft_ms"] == pytest.approx(4.0)
    assert figures["throughput_ratio"] == pytest.approx(261 / 270)
    assert figures["max_requests_per_s"] == pytest.approx(99.0)
    assert (figures["failed"], figures["num_streams_measured"]) == (1, 6)


def test_a_small_run_answers_everything_and_records_it() -> None:
    found = measure(3, 1.0, 1, 10)
    assert [row.error for row in (*found.streams, *found.requests) if row.error] == []
    assert {row.num_tokens for row in found.streams} == {10}
    assert {row.through for row in found.streams} == {row.through for row in found.requests} == {"direct", "gateway"}
