"""How spans and metrics are sent: by the standard variables, or not at all where these cannot be used."""

from __future__ import annotations

import threading

import pytest
from structlog.testing import capture_logs

from broker.app import _telemetry
from broker.core.upstream_kind import UpstreamKind
from broker.telemetry.interface import NO_TELEMETRY, Telemetry

URL = "https://models.example/v1"


def telemetry() -> Telemetry:
    return _telemetry(URL, UpstreamKind("openai", URL))


@pytest.fixture(autouse=True)
def collector(monkeypatch: pytest.MonkeyPatch) -> None:
    """Name a collector that does not answer."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "soon"),
        ("OTEL_EXPORTER_OTLP_COMPRESSION", "tar"),
        ("OTEL_METRIC_EXPORT_INTERVAL", "0"),
        ("OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT", "many"),
    ],
)
def test_a_variable_that_cannot_be_used_turns_it_off(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    threads = set(threading.enumerate())
    with capture_logs() as lines:
        assert telemetry() is NO_TELEMETRY
    assert [(line["log_level"], "OTEL_*" in line["event"]) for line in lines] == [("warning", True)]
    assert set(threading.enumerate()) <= threads


async def test_a_collector_turns_it_on_and_closing_ends_its_threads() -> None:
    threads = set(threading.enumerate())
    made = telemetry()
    assert made is not NO_TELEMETRY
    assert any(thread.name.startswith("Otel") for thread in threading.enumerate())
    await made.close()
    assert not [each for each in set(threading.enumerate()) - threads if each.name.startswith("Otel")]
