from __future__ import annotations

from pathlib import Path

import pytest

from services.core.errors import ConfigurationError
from services.core.settings import Settings, load_settings


def test_variables_and_overrides_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPERTFLEET_BLOCK_SIZE", "32")
    monkeypatch.setenv("EXPERTFLEET_PORT", "9000")
    settings = load_settings(port=9001, model=None)
    assert settings.block_size == 32
    assert settings.port == 9001
    assert settings.model == "models/demo"


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("EXPERTFLEET_BLOCK_SIZE", "zero"),
        ("EXPERTFLEET_DTYPE", "int3"),
        ("EXPERTFLEET_TRACE_SAMPLE_RATIO", "7"),
        ("EXPERTFLEET_FLEET", "no spaces please"),
        ("EXPERTFLEET_NUM_MICRO_BATCHES", "0"),
        ("EXPERTFLEET_NUM_MICRO_BATCHES", "some"),
    ],
)
def test_a_bad_variable_is_named_with_its_value(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigurationError, match=f"{variable}.*{value}"):
        load_settings()


def test_the_number_of_micro_batches_is_a_number_or_chosen_from_measurements(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert load_settings().num_micro_batches == "auto"
    for value, expected in (("2", 2), ("auto", "auto")):
        monkeypatch.setenv("EXPERTFLEET_NUM_MICRO_BATCHES", value)
        assert load_settings().num_micro_batches == expected


def test_standard_names_are_read_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_URL", "redis://elsewhere:6379/1")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:4317")
    settings = load_settings()
    assert settings.redis_url == "redis://elsewhere:6379/1"
    assert settings.otlp_endpoint == "http://collector:4317"


def test_a_child_process_loads_the_same_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(
        model="m", redis_url="unix:///run/s.sock", state_dir=Path("/tmp/state"), num_threads=3
    )
    for name, value in settings.as_environment().items():
        monkeypatch.setenv(name, value)
    assert load_settings() == settings
