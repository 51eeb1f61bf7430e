"""Tokenisers and model folders that the gateway's tests share."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer

from tests.unit.gateway.tiny_models import (
    train_byte_level,
    train_sentencepiece_like,
    write_model_folder,
)


@pytest.fixture(scope="session")
def byte_level() -> Tokenizer:
    return train_byte_level()


@pytest.fixture(scope="session")
def sentencepiece_like() -> Tokenizer:
    return train_sentencepiece_like()


@pytest.fixture(scope="session")
def model_folder(byte_level: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_folder(tmp_path_factory.mktemp("models") / "tiny", byte_level)


@pytest.fixture(scope="session")
def bare_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint without a tokeniser."""
    return write_model_folder(tmp_path_factory.mktemp("models") / "bare", None)
