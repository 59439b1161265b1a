"""Events wait in the store until a sink has really kept them; a broken sink costs nothing but lateness."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from cltrain.errors import DataError
from cltrain.monitoring.outbox import Event, Pump, emit, events_after, lags, watermark
from cltrain.monitoring.rows import update_event
from cltrain.store.database import Store, open_store


class ListSink:
    """A sink in memory that can be down, and that keeps nothing until `keep` when told so."""

    name = "list"

    def __init__(self, *, keeps_at_once: bool = True) -> None:
        self.seen: list[int] = []
        self.is_down = False
        self.keeps_at_once = keeps_at_once

    def write(self, events: Sequence[Event]) -> int | None:
        for event in events:
            if self.is_down:
                raise OSError("network unreachable")
            self.seen.append(event.seq)
        return self.seen[-1] if self.keeps_at_once else None

    def close(self) -> int | None:
        return self.seen[-1] if self.seen else None


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = open_store(tmp_path / "state")
    yield store
    store.close()


def say(store: Store, number: int, verdict: str = "promote", agent: str = "support") -> int:
    event = update_event({"number": number, "verdict": verdict, "metrics": {"loss": 1 / number}}, None, None)
    with store.write() as connection:
        return emit(connection, agent, "update", event, 100.0 + number)


def test_every_event_reaches_the_sink_once_and_in_order(store: Store) -> None:
    sink = ListSink()
    pump = Pump(store, [sink])
    expected = [say(store, n) for n in (1, 2, 3)]
    assert pump.drain() == 3
    assert pump.drain() == 0
    expected.append(say(store, 4))
    pump.close()
    assert sink.seen == expected
    assert watermark(store, "list") == expected[-1]


def test_an_offline_day_loses_nothing_and_is_logged_once(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    sink = ListSink()
    sink.is_down = True
    pump = Pump(store, [sink])
    expected = []
    with caplog.at_level(logging.WARNING):
        for number in range(1, 6):
            expected.append(say(store, number))
            assert pump.drain() == 0  # and does not raise
        assert pump.problems() == {"list": "network unreachable"}
        assert [r.levelname for r in caplog.records] == ["WARNING"]
        sink.is_down = False
        assert pump.drain() == 5
    assert sink.seen == expected
    assert pump.problems() == {}
    assert "works again" in caplog.text


def test_one_broken_sink_does_not_hold_up_the_others(store: Store) -> None:
    broken, good = ListSink(), ListSink()
    broken.is_down = True
    broken.name = "broken"
    expected = say(store, 1)
    Pump(store, [broken, good]).drain()
    assert good.seen == [expected]
    with store.read() as connection:
        assert lags(connection) == {"broken": 1, "list": 0}


def test_what_a_sink_had_not_kept_is_sent_again_after_a_crash(store: Store) -> None:
    expected = [say(store, n) for n in (1, 2)]
    dying = ListSink(keeps_at_once=False)
    Pump(store, [dying]).drain()
    assert dying.seen == expected
    assert watermark(store, "list") == 0  # the process dies here: no close
    reborn = ListSink()
    Pump(store, [reborn]).drain()
    assert reborn.seen == expected


def test_what_a_sink_had_not_kept_is_sent_again_after_a_failure(store: Store) -> None:
    sink = ListSink(keeps_at_once=False)
    pump = Pump(store, [sink])
    first = say(store, 1)
    pump.drain()
    sink.is_down = True  # whatever it held in memory is gone
    second = say(store, 2)
    pump.drain()
    sink.is_down = False
    pump.drain()
    assert sink.seen == [first, first, second]


def test_an_update_said_twice_is_one_event_but_a_new_verdict_is_another(store: Store) -> None:
    assert say(store, 1, "hold") == say(store, 1, "hold")
    assert say(store, 1, "promote") > say(store, 1, "hold")
    assert say(store, 1, "hold", agent="sales") > say(store, 1, "promote")
    assert [event.payload["verdict"] for event in events_after(store, 0)] == ["hold", "promote", "hold"]


def test_events_of_a_transaction_that_failed_never_happened(store: Store) -> None:
    def fail() -> None:
        with store.write() as connection:
            emit(connection, "support", "update", {"number": 1}, 1.0)
            raise RuntimeError("the update failed after all")

    with pytest.raises(RuntimeError):
        fail()
    assert events_after(store, 0) == []


def test_unknown_kinds_and_updates_without_number_are_refused(store: Store) -> None:
    with store.write() as connection:
        with pytest.raises(DataError, match="'udpate'"):
            emit(connection, "support", "udpate", {}, 1.0)
        with pytest.raises(DataError, match="number"):
            emit(connection, "support", "update", {}, 1.0)


def test_background_pump_delivers_when_woken_and_finishes_on_close(store: Store) -> None:
    sink = ListSink()
    pump = Pump(store, [sink], period_s=60)
    pump.start()
    expected = [say(store, 1)]
    pump.wake()
    expected.append(say(store, 2))
    pump.close()
    assert sink.seen == expected
