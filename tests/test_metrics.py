"""Metrics, as a Prometheus server would read them."""

from __future__ import annotations

from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from events.audit import AuditLog
from events.bus import EventBus
from events.envelope import (
    CallFinished,
    CallStarted,
    EngineStarted,
    Event,
    EventData,
    Transition,
    WorkerExited,
    WorkerStarted,
)
from events.log import EventLog
from events.metrics import Metrics
from events.projections import HealthProjection


def scraped(metrics: Metrics) -> dict[str, float]:
    """`name{label=value,…}`, labels in alphabetical order → value."""
    text, content_type = metrics.render()
    assert content_type.startswith("text/plain")
    found = {}
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            labels = ",".join(f"{key}={value}" for key, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def after(*published: tuple[str | None, EventData]) -> dict[str, float]:
    """What a scrape shows after these events."""
    metrics = Metrics()
    for sequence, (subject, data) in enumerate(published, 1):
        metrics.offer(Event(sequence, 0, subject, data))
    return scraped(metrics)


def test_exactly_one_state_of_a_plugin_is_1() -> None:
    found = after(
        ("ocr", Transition(None, "LOADED", None, 1)),
        ("ocr", Transition("LOADED", "INITIALIZED", "initialize", 1)),
        ("ocr", Transition("INITIALIZED", "FAILED", "fail", 1, "worker_signal", "SIGSEGV")),
    )
    states = {key: value for key, value in found.items() if key.startswith("holdfast_plugin_state")}
    assert len(states) == 5
    assert {key for key, value in states.items() if value} == {"holdfast_plugin_state{plugin=ocr,state=FAILED}"}
    assert found["holdfast_transitions_total{plugin=ocr,reason_code=worker_signal,to=FAILED}"] == 1
    assert found["holdfast_transitions_total{plugin=ocr,reason_code=,to=LOADED}"] == 1


def test_calls_are_counted_by_outcome_and_timed() -> None:
    found = after(
        *[("ocr", CallStarted("read", str(n))) for n in range(4)],
        ("ocr", CallFinished("read", "0", True, 3.0)),
        ("ocr", CallFinished("read", "1", False, 40.0, "ValueError", "rejected")),
        ("ocr", CallFinished("read", "2", False, 2_000_000.0, "SIGSEGV", "worker_signal", broke=True)),
    )
    calls = {
        name: found[f"holdfast_calls_total{{outcome={name},plugin=ocr,tool=read}}"]
        for name in ("completed", "rejected", "broke")
    }
    assert calls == {"completed": 1, "rejected": 1, "broke": 1}
    assert found["holdfast_calls_in_flight{plugin=ocr}"] == 1
    counts = {key: value for key, value in found.items() if key.startswith("holdfast_call_duration_seconds")}
    assert counts["holdfast_call_duration_seconds_count{plugin=ocr,tool=read}"] == 3
    assert counts["holdfast_call_duration_seconds_sum{plugin=ocr,tool=read}"] == 2000.043
    by_bound = {
        key.split("le=")[1].split(",")[0].rstrip("}"): value for key, value in counts.items() if "le=" in key
    }
    assert (by_bound["0.0025"], by_bound["0.005"], by_bound["0.05"], by_bound["900.0"], by_bound["+Inf"]) == (
        0,
        1,
        2,
        2,
        3,
    )


def test_workers_and_events_are_counted() -> None:
    found = after(
        ("ocr", WorkerStarted(17, 1)),
        ("ocr", WorkerExited(17, 1, "memory_limit")),
        ("ocr", WorkerStarted(18, 1)),
    )
    assert found["holdfast_worker_starts_total{plugin=ocr}"] == 2
    assert found["holdfast_worker_exits_total{plugin=ocr,verdict=memory_limit}"] == 1
    assert found["holdfast_events_total{type=worker.started}"] == 2


def test_calls_in_flight_end_with_the_incarnation_and_with_the_engine() -> None:
    started = ("ocr", CallStarted("read", "r"))
    assert (
        after(started, ("ocr", Transition(None, "LOADED", None, 2)))["holdfast_calls_in_flight{plugin=ocr}"] == 0
    )
    assert "holdfast_calls_in_flight{plugin=ocr}" not in after(started, (None, EngineStarted("1", 1)))


def test_the_log_the_bus_and_the_audit_are_shown(tmp_path: Path) -> None:
    metrics = Metrics()
    audit = AuditLog.open(tmp_path / "audit.jsonl")
    with EventLog.open(tmp_path / "events.db", source="test") as log:
        audit.attach(log)
        bus = EventBus(HealthProjection())
        bus.subscribe(log)
        bus.subscribe(metrics)
        metrics.watch(bus=bus, log=log, audit=audit, engine_faults=lambda: 0)
        bus.publish(CallStarted("read", "r"), "ocr")
        assert log.flush(10)
        found = scraped(metrics)
    audit.close()
    expected = {
        "holdfast_events_last": 1,
        "holdfast_log_ok": 1,
        "holdfast_log_durable": 1,
        "holdfast_log_backlog": 0,
        "holdfast_log_lag": 0,
        "holdfast_log_dropped_total": 0,
        "holdfast_audit_ok": 1,
        "holdfast_audit_last": 1,
        "holdfast_audit_faults_total": 0,
        "holdfast_engine_faults_total": 0,
    }
    assert {name: found[name] for name in expected} == expected


def test_a_faulty_subscriber_is_shown_by_name() -> None:
    class Broken:
        name = "broken"

        def offer(self, event: Event) -> None:
            raise RuntimeError

    bus, metrics = EventBus(HealthProjection()), Metrics()
    bus.subscribe(Broken())
    metrics.watch(bus=bus)
    bus.publish(CallStarted("read", "r"), "ocr")
    assert scraped(metrics)["holdfast_subscriber_faults_total{part=broken}"] == 1


def test_a_reading_that_raises_is_left_out_and_counted_and_the_rest_is_shown() -> None:
    metrics = Metrics()
    metrics.gauge("broken", "Raises.", lambda: 1 / 0)
    metrics.gauge("sound", "Does not.", lambda: 7)
    found = scraped(metrics)
    assert "broken" not in found
    assert found["sound"] == 7
    assert found["holdfast_scrape_faults_total"] == 1


def test_two_engines_in_one_process_do_not_share_numbers() -> None:
    first, second = Metrics(), Metrics()
    first.offer(Event(1, 0, "ocr", WorkerStarted(1, 1)))
    assert "holdfast_worker_starts_total{plugin=ocr}" not in scraped(second)
