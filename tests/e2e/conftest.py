"""One started product with Ray for all tests that do not need a special one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from services.core.kernels.library import native_library
from tests.support.otlp_collector import OtlpCollector, running_collector
from tests.support.product import Product


@pytest.fixture(scope="package")
def collector() -> Iterator[OtlpCollector]:
    with running_collector() as running:
        yield running


@pytest.fixture(scope="package")
def product(
    tmp_path_factory: pytest.TempPathFactory, collector: OtlpCollector
) -> Iterator[Product]:
    """Demo model, four expert workers, one shard, Ray; every second step is traced.

    Answers are reproducible, in bfloat16. Where that cannot be had, in float32: a row's last bits
    may then depend on the rows beside it, but hardly a token.
    """
    numerics = ["--reproducible"] if native_library() else ["--dtype", "float32"]
    started = Product(
        tmp_path_factory.mktemp("product") / "state",
        "--workers",
        "4",
        *numerics,
        environment={
            "EXPERTFLEET_OTLP_ENDPOINT": collector.endpoint,
            "EXPERTFLEET_STEP_SAMPLE_INTERVAL": "2",
        },
    ).start()
    try:
        yield started
        started.check_ctrl_c()
    finally:
        started.stop()


@pytest.fixture
def client(product: Product) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{product.url}/v1", api_key="none", max_retries=0, timeout=120
    ) as made:
        yield made


@pytest.fixture
def demo(client: openai.OpenAI) -> str:
    """Name under which the demo model is served."""
    return next(iter(client.models.list())).id


@pytest.fixture(scope="package")
def long_python() -> str:
    """Text of well over 1500 tokens of the demo model that it was not written for."""
    return Path(__file__).read_text() * 4
