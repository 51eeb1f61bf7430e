from __future__ import annotations

import socket

import pytest

from services.cli.up import _parse_shards, _refuse_busy_port
from services.core.errors import ConfigurationError
from services.core.settings import Settings


@pytest.mark.parametrize(("text", "expected"), [("1", (1, 1)), ("3", (3, 3)), ("1-4", (1, 4))])
def test_shards_are_a_count_or_a_range(text: str, expected: tuple[int, int]) -> None:
    assert _parse_shards(text) == expected


@pytest.mark.parametrize("text", ["", "0", "4-1", "two", "1-", "-1", "1-4-5"])
def test_other_shards_are_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match="1-4"):
        _parse_shards(text)


def test_a_busy_port_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigurationError, match=str(port)):
            _refuse_busy_port(Settings(host="127.0.0.1", port=port))
