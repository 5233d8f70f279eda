"""What `broker top` reads in the metrics of a broker."""

from __future__ import annotations

import math

import pytest

from broker.cli.scrape import MAX_LINE, MAX_TEXT, NotMetricsError, Scrape, parse
from broker.core.session import State
from broker.core.session_report import SessionReport
from broker.metrics import Metrics

TEXT = """\
# HELP broker_sessions_running Sessions that run here.
# TYPE broker_sessions_running gauge
broker_sessions_running 3.0
# TYPE broker_viewers gauge
broker_viewers 4.0
# TYPE broker_sessions_total counter
broker_sessions_total{code="",state="done"} 10.0
broker_sessions_total{code="upstream_timeout",state="failed"} 2.0
broker_sessions_total{code="abandoned",state="abandoned"} 3.0
# TYPE broker_refused_total counter
broker_refused_total{code="rate_limited"} 5.0
# TYPE broker_chunks_total counter
broker_chunks_total 700.0
# TYPE broker_time_to_first_chunk_seconds histogram
broker_time_to_first_chunk_seconds_bucket{le="0.5"} 4.0
broker_time_to_first_chunk_seconds_bucket{le="1.0"} 8.0
broker_time_to_first_chunk_seconds_bucket{le="+Inf"} 10.0
broker_time_to_first_chunk_seconds_count 10.0
broker_time_to_first_chunk_seconds_sum 9.0
"""


def test_the_metrics_of_a_broker_are_read() -> None:
    found = parse(TEXT)
    assert (found.running, found.viewers, found.total, found.chunks) == (3, 4, 15, 700)
    assert found.errors() == {"abandoned": 3, "upstream_timeout": 2}
    assert found.refused == {"rate_limited": 5}


def test_what_this_release_writes_is_read() -> None:
    metrics = Metrics()
    metrics.refused("rate_limited")
    text = metrics.text().decode() + "# TYPE broker_sessions_running gauge\nbroker_sessions_running 1.0\n"
    found = parse(text)
    assert found.refused["rate_limited"] == 1
    assert found.first_chunk.keys() >= {0.1, math.inf}
    assert found.viewers is None
    assert SessionReport.__annotations__["state"] == State.__name__


def test_half_of_the_first_chunks_came_within_the_median() -> None:
    found = parse(TEXT)
    assert found.quantile(0.5) == pytest.approx(0.625)
    assert found.quantile(0.2) == pytest.approx(0.25)
    assert found.quantile(0.95) == math.inf
    assert Scrape().quantile(0.5) is None


def test_only_what_was_added_counts() -> None:
    later = parse(
        TEXT.replace('state="done"} 10.0', 'state="done"} 14.0')
        .replace('le="1.0"} 8.0', 'le="1.0"} 12.0')
        .replace('le="+Inf"} 10.0', 'le="+Inf"} 14.0')
    )
    added = later.since(parse(TEXT))
    assert (added.total, added.errors(), added.running) == (4, {}, 3)
    assert added.quantile(0.5) == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('state="done"} 10.0', 'state="done"} 1.0'),
        ('broker_sessions_total{code="abandoned",state="abandoned"} 3.0\n', ""),
        ('code="rate_limited"} 5.0', 'code="rate_limited"} 4.0'),
        ("broker_chunks_total 700.0", "broker_chunks_total 699.0"),
        ('le="0.5"} 4.0', 'le="0.5"} 3.0'),
    ],
)
def test_a_broker_that_was_started_again_counts_from_zero(before: str, after: str) -> None:
    earlier = parse(TEXT)
    again = parse(TEXT.replace(before, after).replace('state="failed"} 2.0', 'state="failed"} 99.0'))
    assert again.began_after(earlier)
    assert again.since(earlier) == again
    assert not earlier.began_after(earlier)


@pytest.mark.parametrize(
    "text",
    [
        *("", "<html>", "up 1\n", "broker_sessions_running x\n", '{"error": {}}'),
        *(f"broker_sessions_running {value}\n" for value in ("NaN", "Inf", "-1")),
        *(f"{TEXT}broker_chunks_total{rest}\n" for rest in ("", "{", '{a="} 1', '{a="b" 1', "{} 1 x")),
        TEXT.replace('le="0.5"', 'le="NaN"'),
        TEXT.replace('le="0.5"', 'of="0.5"'),
        f'{TEXT}broker_chunks_total{{a="{"b" * MAX_LINE}"}} 1\n',
        TEXT + "broker_chunks_total 1\n" * (MAX_TEXT // 22 + 1),
    ],
    ids=lambda text: text[-20:],
)
def test_other_texts_are_no_metrics_of_a_broker(text: str) -> None:
    with pytest.raises(NotMetricsError):
        parse(text)


def test_metrics_that_are_not_shown_may_look_like_anything() -> None:
    assert parse(f"{TEXT}other{{ NaN\n{'x' * MAX_LINE}\n") == parse(TEXT)
