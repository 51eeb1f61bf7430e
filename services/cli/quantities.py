"""Quantities as people type them: 8k tokens, 25g of network, 50us, 24gb."""

from __future__ import annotations

import re

from services.core.errors import ConfigurationError

_NUMBER = re.compile(r"^\s*(\d+(?:\.\d+)?|\.\d+)\s*([a-zA-Z/µ]*)\s*$")
_COUNT = {"": 1.0, "k": 1024.0, "m": 1024.0**2}
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6}
_BITS = {"g": 1e9, "gbit": 1e9, "gbit/s": 1e9, "gb/s": 8e9, "m": 1e6, "mbit": 1e6, "mbit/s": 1e6}
_BYTES = {"gb": 1e9, "g": 1e9, "gib": 2.0**30, "mb": 1e6, "tb": 1e12}


def parse_tokens(text: str, option: str) -> int:
    """ "8k" is 8192; plain digits are taken as they are."""
    return int(_parse(text, option, _COUNT, "8k or 8192"))


def parse_duration_s(text: str, option: str) -> float:
    return _parse(text, option, _SECONDS, "50us, 1ms or 0.1s")


def parse_network(text: str, option: str) -> float:
    """Bytes per second: "25g" is 25 Gbit/s, "3gb/s" three gigabytes."""
    return _parse(text, option, _BITS, "10g, 25g, 100g or 3gb/s") / 8


def parse_bytes(text: str, option: str) -> float:
    return _parse(text, option, _BYTES, "24gb or 22.5gib")


def _parse(text: str, option: str, units: dict[str, float], examples: str) -> float:
    match = _NUMBER.match(text)
    unit = match[2].lower() if match else None
    if match is None or unit not in units:
        raise ConfigurationError(
            f"{option} {text!r} cannot be read; write it like {examples}", setting=option
        )
    return float(match[1]) * units[unit]
