from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from fastapi import FastAPI
from starlette.types import Message

from services.core.errors import CheckpointError
from services.core.settings import load_settings
from services.gateway.app import create_app
from tests.support.fake_shard import FakeShard, repeats

HEAVY = ("torch", "ray", "grpc", "transformers", "numpy", "redis")


def test_the_gateway_imports_nothing_heavy() -> None:
    code = (
        f"import sys, json, services.gateway.app\nprint([m for m in {HEAVY} if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(found.stdout.replace("'", '"')) == []


async def test_the_callers_lifespan_is_run(model_folder: Path) -> None:
    steps: list[str] = []

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        steps.append("start")
        yield
        steps.append("stop")

    shard = FakeShard(repeats([9]))
    settings = load_settings(model="tiny")
    app = create_app(settings, shard, None, model_folder=model_folder, lifespan=lifespan)
    incoming: list[Message] = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]
    sent: list[str] = []

    async def receive() -> Message:
        return incoming.pop(0)

    async def send(message: Message) -> None:
        sent.append(message["type"])

    await app({"type": "lifespan", "asgi": {"version": "3.0"}}, receive, send)
    assert steps == ["start", "stop"]
    assert sent == ["lifespan.startup.complete", "lifespan.shutdown.complete"]


def test_a_folder_without_a_model_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        create_app(load_settings(model="x"), FakeShard(repeats([9])), None, model_folder=tmp_path)
