"""A real Prometheus over a real fleet: its rules fire on a hot expert and on a lost worker."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import httpx
import psutil
import pytest

from benchmarks.hot_checkpoint import write_hot_checkpoint
from benchmarks.random_checkpoint import RandomShape
from services.core.span_file import read_spans
from tests.support.product import Product
from tests.support.prometheus import CHART, Prometheus, find_prometheus, running_prometheus
from tests.support.waiting import wait_until

pytestmark = [
    pytest.mark.skipif(
        find_prometheus() is None, reason="needs Prometheus, such as Debian's package of that name"
    ),
    pytest.mark.timeout(600),
]

SHAPE = RandomShape(
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=512,
    num_experts_per_tok=1,
)
HOT_EXPERT = SHAPE.num_local_experts - 1
ORDINARY, HOT = range(3, 256), range(256, 512)
TIMEOUT_S = 120.0
"""For alerts, of which the slowest takes 15 s where nothing else runs."""
WITHOUT_SERIES = {
    # Nothing of the kind happens here, or it is the autoscaler's, which does not run.
    "Frames sent again",
    "Session blocks",
    "Actions",
    "Slots to see to",
    "Saturation, workers' imbalance, leader",
    "Replicas as the autoscaler sees them",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    product: Product
    prometheus: Prometheus
    started_at: float


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    folder = tmp_path_factory.mktemp("prometheus")
    model = write_hot_checkpoint(folder / "model", SHAPE)
    product = Product(folder / "state", "--no-ray", "--workers", "2", model=model).start()
    try:
        fleet = product.experts()
        processes = [*fleet["workers"], *fleet["shards"]]
        targets = [f"127.0.0.1:{product.port}", *(each["metrics_endpoint"] for each in processes)]
        assert len(targets) == 4
        with running_prometheus(folder / "prometheus", targets) as prometheus:
            wait_until(
                lambda: prometheus.healthy_targets() == set(targets),
                timeout_s=TIMEOUT_S,
                what="all targets are scraped",
            )
            yield Scene(product=product, prometheus=prometheus, started_at=time.time())
    finally:
        product.stop()


def test_a_hot_expert_raises_its_alert_in_every_layer_and_an_even_load_does_not(
    scene: Scene,
) -> None:
    prometheus = scene.prometheus
    with load(scene.product, ORDINARY):
        wait_until(
            lambda: all(busy > 50 for busy in layer_rates(prometheus)),
            timeout_s=TIMEOUT_S,
            what="tokens of both layers are seen",
        )
        rates = "expertfleet:layer_imbalance:ratio < 1.5"
        wait_until(
            lambda: len(prometheus.query(rates)) == 2, timeout_s=TIMEOUT_S, what="an even load"
        )
        assert prometheus.firing("ExpertfleetHotExpert") == []
    with load(scene.product, HOT):
        wait_until(
            lambda: len(prometheus.firing("ExpertfleetHotExpert")) == 2,
            timeout_s=TIMEOUT_S,
            what="the hot expert's alert",
        )
        fired = prometheus.firing("ExpertfleetHotExpert")
    assert {(each["layer"], each["expert"]) for each in fired} == {
        ("0", str(HOT_EXPERT)),
        ("1", str(HOT_EXPERT)),
    }
    assert prometheus.rule_errors() == []
    assert prometheus.firing("ExpertfleetWorkerLost") == []


def test_every_panel_of_the_dashboards_shows_something(scene: Scene) -> None:
    def silent() -> set[str]:
        return {
            panel["title"]
            for path in CHART.glob("dashboards/*.json")
            for panel in json.loads(path.read_text())["panels"]
            if panel.get("targets")
            and not any(
                scene.prometheus.query(
                    target["expr"].replace("$__rate_interval", "30s").replace("$namespace", ".*")
                )
                for target in panel["targets"]
            )
        }

    unexpected: set[str] = set()

    def is_filled() -> bool:
        nonlocal unexpected
        unexpected = silent() - WITHOUT_SERIES
        return not unexpected

    with load(scene.product, ORDINARY):
        try:
            wait_until(is_filled, timeout_s=TIMEOUT_S)
        except AssertionError:
            pytest.fail(f"panels without series: {unexpected}")


def test_exemplars_of_latencies_lead_to_traces_that_are_there(scene: Scene) -> None:
    with load(scene.product, ORDINARY):
        for metric in (
            "expertfleet_time_to_first_token_seconds_bucket",
            "expertfleet_request_phase_seconds_bucket",
            "expertfleet_worker_compute_seconds_bucket",
        ):

            def found(name: str = metric) -> bool:
                kept = scene.prometheus.exemplars(name, scene.started_at - 60, time.time() + 60)
                told = {each["labels"]["trace_id"] for each in kept}
                folder = scene.product.state_dir / "traces"
                return bool(told & {span.trace_id for span in read_spans(folder)})

            wait_until(found, timeout_s=TIMEOUT_S, what=f"a trace of {metric}")


def test_a_killed_worker_raises_the_alert_of_a_lost_worker(scene: Scene) -> None:
    prometheus, killed = scene.prometheus, scene.product.experts()["workers"][0]
    lost = "ExpertfleetWorkerLost"
    assert prometheus.firing(lost) == []
    psutil.Process(killed["pid"]).kill()
    wait_until(
        lambda: bool(prometheus.firing(lost)), timeout_s=TIMEOUT_S, what="the lost worker's alert"
    )
    # The launcher starts another one on another port; the old one cannot be scraped any more.
    wait_until(
        lambda: any(
            each["instance"] == killed["metrics_endpoint"]
            for each in prometheus.firing("ExpertfleetTargetDown")
        ),
        timeout_s=TIMEOUT_S,
        what="the alert of what cannot be scraped",
    )
    wait_until(
        lambda: prometheus.firing(lost) == [], timeout_s=TIMEOUT_S, what="that alert to be over"
    )


@contextmanager
def load(product: Product, tokens: range) -> Iterator[None]:
    """Completions of prompts of `tokens`, four at a time, until the block ends."""
    over = threading.Event()

    def ask(seed: int) -> None:
        generator = random.Random(seed)
        with httpx.Client(timeout=60) as client:
            while not over.is_set():
                body = {
                    "prompt": generator.sample(tokens, 48),
                    "max_tokens": 8,
                    "temperature": 0,
                    "ignore_eos": True,
                }
                client.post(f"{product.url}/v1/completions", json=body).raise_for_status()
                over.wait(0.05)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join(60)


def layer_rates(prometheus: Prometheus) -> list[float]:
    """Tokens per second by layer; of both or of none."""
    series = prometheus.query("sum by (layer) (expertfleet:expert_tokens:rate5m)")
    return [float(each["value"][1]) for each in series] if len(series) == 2 else [0.0]
