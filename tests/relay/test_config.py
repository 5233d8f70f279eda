"""The relay's limits come from the settings, and cannot change while a generation runs."""

from __future__ import annotations

import dataclasses

import pytest

from broker.app import AFTER_DEADLINE, _generation_limits, _worker_config
from broker.settings import Settings

SETTINGS = Settings(
    first_data_timeout=1,
    idle_timeout=2,
    deadline=3,
    disconnect_grace=4,
    max_response=5000,
    max_retries=6,
    max_streams=7,
    session_ttl=60,
    resume_ttl=90,
    journal_interval_ms=100,
)


def test_the_limits_of_a_generation_are_those_of_the_settings() -> None:
    limits = _generation_limits(SETTINGS)
    assert dataclasses.astuple(limits) == (1, 2, 3, 4, 5000, 6)


def test_the_limits_of_a_generation_cannot_be_changed() -> None:
    limits = _generation_limits(SETTINGS)
    with pytest.raises(dataclasses.FrozenInstanceError):
        limits.deadline = 1000  # type: ignore[misc]


def test_the_grace_is_zero_without_resuming() -> None:
    assert _generation_limits(SETTINGS.model_copy(update={"resume_ttl": 0})).grace == 0


def test_the_limits_of_a_worker_are_those_of_the_settings() -> None:
    config = _worker_config(SETTINGS)
    assert tuple(config) == (7, 60, 3 + 90 + AFTER_DEADLINE, 90, 0.1)
