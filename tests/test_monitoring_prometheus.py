"""One /metrics: what the gateway counts, and beside it how learning stands."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from cltrain.deploy.readiness import mark_failed, mark_proved, note_listed, note_out
from cltrain.experience.window import mark
from cltrain.monitoring.outbox import emit
from cltrain.monitoring.prometheus import LAST_VALUES, StoreCollector
from cltrain.monitoring.rows import update_event
from cltrain.records import BoundReport, Check, Code, Decision, Verdict
from cltrain.registry.aliases import freeze
from cltrain.registry.releases import ensure_base_release
from cltrain.store.database import Store, open_store
from cltrain.store.schema import agents, aliases, records, sink_marks, updates
from tests.gateway_parts import BASE, R1, R2, add_release, point_alias, running
from tests.registry_parts import BASE_DIGEST
from tests.test_tenants_registry import ACME, family, learned

BOUNDS = BoundReport(0.06, 0.1, 0.2, 0.5, 0.05, 0.1, 0.1, 0.5, 0.1, 0.25, 0.2, 0.25, 0.06, 1.0, 100, 200, 24, 100, 0.8)
DECISION = Decision(
    Verdict.PROMOTE, ("better",), (Check("gain", Code.GAIN, Verdict.PROMOTE, "better", 0.8, 0.6, 0.2, 0.1, 0.3, 240),)
)
README = Path(__file__).parent.parent / "README.md"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with closing(open_store(tmp_path / "state")) as store:
        yield store


def scrape(store: Store, clock: Callable[[], float] = lambda: 130.0, agent: str = "support") -> list[str]:
    registry = CollectorRegistry()
    registry.register(StoreCollector(store, agent, clock))
    return generate_latest(registry).decode().splitlines()


def add_records(store: Store, *names: str, agent: str = "support") -> None:
    row = {"agent": agent, "session": "s", "principal": "p", "split": "train", "status": "ended", "payload": {}}
    with store.write() as connection:
        for name in names:
            connection.execute(records.insert().values(row | {"id": name, "created_at": 1.0, "updated_at": 1.0}))


def add_update(store: Store, number: int, verdict: str | None) -> None:
    row = {"agent": "support", "parent": "p", "mode": "auto", "fence": 1, "manifest": {}, "started_at": 1.0}
    state = "done" if verdict else "training"
    with store.write() as connection:
        connection.execute(
            updates.insert().values(row | {"id": f"u{number}", "number": number, "state": state, "verdict": verdict})
        )


def test_a_scrape_shows_what_serves_what_waits_what_was_decided_and_how_far_it_went(store: Store) -> None:
    add_records(store, "a", "b", "c", "d")
    add_records(store, "foreign", agent="sales")
    for number, verdict in enumerate(("promote", "hold", "hold", None)):
        add_update(store, number, verdict)
    add_release(store, R1)
    with store.write() as connection:
        mark(connection, "support", "a", "quarantined", now=2.0)
        mark(connection, "support", "b", "waiting", now=2.0)
        emit(connection, "support", "update", update_event({"number": 7}, DECISION, BOUNDS), 100.0)
        emit(connection, "sales", "update", update_event({"number": 9}, DECISION, BOUNDS), 101.0)
        connection.execute(sink_marks.insert().values(sink="wandb:support", seq=0))
        connection.execute(
            aliases.insert().values(
                agent="support",
                release=R1,
                previous=None,
                anchor="a",
                high_water="a",
                version=3,
                fence=1,
                changed_at=1.0,
            )
        )
        connection.execute(agents.insert().values(agent="support", is_frozen=True, fence=1))
    lines = scrape(store)
    for line in (
        "cltrain_store_readable 1.0",
        'cltrain_records{agent="support",status="ended"} 4.0',
        'cltrain_records_waiting{agent="support"} 3.0',
        'cltrain_screened{agent="support",status="quarantined"} 1.0',
        'cltrain_updates{agent="support",verdict="promote"} 1.0',
        'cltrain_updates{agent="support",verdict="hold"} 2.0',
        'cltrain_updates{agent="support",verdict="none"} 1.0',
        'cltrain_releases{agent="support",status="released"} 1.0',
        'cltrain_alias_version{agent="support"} 3.0',
        f'cltrain_serving_info{{agent="support",previous="",release="{R1}"}} 1.0',
        'cltrain_frozen{agent="support"} 1.0',
        'cltrain_update_number{agent="support"} 7.0',
        'cltrain_update_age_seconds{agent="support"} 30.0',
        'cltrain_update_drift_kl_nats{agent="support"} 0.2',
        'cltrain_update_drift_kl_limit_nats{agent="support"} 0.25',
        'cltrain_update_step_frobenius_ratio{agent="support"} 0.06',
        'cltrain_update_step_frobenius_limit_ratio{agent="support"} 0.1',
        'cltrain_sink_lag_events{sink="wandb:support"} 2.0',
    ):
        assert line in lines, line
    assert not any("sales" in line for line in lines), "its own gateway shows it"
    assert {f"adapter/{name}" for name in BoundReport.__dataclass_fields__} <= LAST_VALUES.keys()


def test_metrics_of_gateway_and_learning_share_a_page_without_a_clash(tmp_path: Path) -> None:
    with running(tmp_path) as gateway:
        add_release(gateway.store, BASE)
        add_release(gateway.store, R2)
        point_alias(gateway.store, R2)
        record = gateway.chat("one").headers["x-cltrain-record"]
        gateway.http.post("/v1/feedback", json={"target": record, "score": 1})
        text = gateway.http.get("/metrics").text
        families = list(text_string_to_metric_families(text))
    names = [family.name for family in families]
    assert len(names) == len(set(names))
    for line in (
        'cltrain_requests_total{route="chat",status="200"} 1.0',
        'cltrain_feedback_total{outcome="new"} 1.0',
        'cltrain_feedback_stored{agent="support",source="user"} 1.0',
        f'cltrain_serving_info{{agent="support",previous="",release="{R2}"}} 1.0',
    ):
        assert line in text.splitlines(), line


def test_the_gateways_own_counters_are_there_when_the_store_is_not(tmp_path: Path) -> None:
    with running(tmp_path) as gateway:
        gateway.chat("one")
        with gateway.store.write() as connection:
            connection.exec_driver_sql("ALTER TABLE screenings RENAME TO lost")
        answer = gateway.http.get("/metrics")
    assert answer.status_code == 200
    assert "cltrain_store_readable 0.0" in answer.text.splitlines()
    assert 'cltrain_requests_total{route="chat",status="200"} 1.0' in answer.text.splitlines()


def test_scrapes_close_together_read_the_store_once(store: Store) -> None:
    now = [100.0]
    collector = StoreCollector(store, "support", lambda: now[0])

    def stored() -> float:
        family = next(family for family in collector.collect() if family.name == "cltrain_records")
        return sum(sample.value for sample in family.samples)

    assert stored() == 0
    add_records(store, "a")
    now[0] += 4.0
    assert stored() == 0
    now[0] += 2.0
    assert stored() == 1
    now[0] -= 1000.0  # a clock that was put back
    add_records(store, "b")
    assert stored() == 2


def test_a_scrape_of_twenty_thousand_records_takes_less_than_half_a_second(store: Store) -> None:
    row = {"agent": "support", "session": "s", "principal": "p", "split": "train", "status": "ended"}
    row |= {"payload": {"text": "x" * 2000}, "created_at": 1.0, "updated_at": 1.0}
    with store.write() as connection:
        connection.execute(records.insert(), [row | {"id": str(k)} for k in range(20_000)])
    seconds = []
    for _ in range(5):
        begun = time.perf_counter()
        scrape(store)
        seconds.append(time.perf_counter() - begun)
    assert min(seconds) < 0.5


def test_the_page_says_of_every_replica_whether_it_is_up_and_ready_for_what_serves(tmp_path: Path) -> None:
    with running(tmp_path) as gateway:
        url = gateway.app.state.door.upstream.places[0].upstream.url

        def shown() -> tuple[float | None, float | None]:
            value = gateway.app.state.door.metrics.registry.get_sample_value
            labels = {"agent": "support", "replica": url}
            return value("cltrain_replica_up", labels), value("cltrain_replica_ready", labels)

        add_release(gateway.store, R1)
        point_alias(gateway.store, R1)
        assert shown() == (0, 0), "nobody looked yet"
        note_listed(gateway.store, url, {}, 1.0)
        assert shown() == (1, 0)
        mark_proved(gateway.store, url, R1, "/r1", 2.0)
        assert shown() == (1, 1)
        mark_failed(gateway.store, url, R1, "/r1", 3.0)
        assert shown() == (1, 0)
        note_out(gateway.store, url, 4.0)
        assert shown() == (0, 0)


def test_every_metric_of_the_gateways_page_is_in_the_readme(tmp_path: Path) -> None:
    with running(tmp_path) as gateway:
        text = gateway.http.get("/metrics").text
    named = set(re.findall(r"`(cltrain_[a-z_]+)`", README.read_text()))
    shown = {re.sub(r"_(total|created|info)$", "", name) for name in re.findall(r"^# TYPE (\S+)", text, re.MULTILINE)}
    is_covered = [name for name in shown if name in named or name.startswith("cltrain_update_")]
    assert sorted(shown - set(is_covered)) == []


def test_tenants_are_counted_and_not_named(tmp_path: Path) -> None:
    with closing(family(tmp_path)) as store:
        ensure_base_release(store, "sales@acme", BASE_DIGEST, now=1.0)
        learned(store, tmp_path, ACME, "one")
        freeze(store, ACME, now=4.0, reason="asked")
        lines = scrape(store)
    for standing, number in (("own", 1), ("shared", 1), ("frozen", 1)):
        assert f'cltrain_tenants{{agent="support",standing="{standing}"}} {number}.0' in lines
    assert not [line for line in lines if "acme" in line]
