"""A real Prometheus that scrapes what it is told to, every second, with the chart's rules."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.support.product import free_port
from tests.support.waiting import wait_until

CHART = Path(__file__).parents[2] / "deploy/helm/expertfleet"
SECONDS_A_MINUTE = 2
"""What becomes of a minute in rules: their waits and windows are too long for a test."""


class Prometheus:
    """Asked over its HTTP API."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}"

    def is_ready(self) -> bool:
        try:
            return httpx.get(f"{self._url}/-/ready", timeout=5).is_success
        except httpx.HTTPError:
            return False

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The series of an instant query."""
        return list(self._get("query", query=expression)["result"])

    def exemplars(self, metric: str, begin: float, end: float) -> list[dict[str, Any]]:
        series = self._get("query_exemplars", query=metric, start=begin, end=end)
        return [exemplar for each in series for exemplar in each["exemplars"]]

    def firing(self, alert: str) -> list[dict[str, str]]:
        """Labels of the alerts of that name that fire."""
        return [
            each["labels"]
            for each in self._get("alerts")["alerts"]
            if each["labels"]["alertname"] == alert and each["state"] == "firing"
        ]

    def healthy_targets(self) -> set[str]:
        active = self._get("targets", state="active")["activeTargets"]
        return {each["labels"]["instance"] for each in active if each["health"] == "up"}

    def rule_errors(self) -> list[str]:
        groups = self._get("rules")["groups"]
        return [
            rule["lastError"]
            for group in groups
            for rule in group["rules"]
            if rule.get("lastError")
        ]

    def _get(self, path: str, **parameters: Any) -> Any:
        response = httpx.get(f"{self._url}/api/v1/{path}", params=parameters, timeout=30)
        answer = response.json()
        assert answer["status"] == "success", (parameters, answer)
        return answer["data"]


def find_prometheus() -> str | None:
    """Debian's package `prometheus` has it, as have the project's own archives."""
    return shutil.which("prometheus")


@contextmanager
def running_prometheus(folder: Path, targets: Sequence[str]) -> Iterator[Prometheus]:
    """Scrape `targets` (host:port) until the block ends; keeps its files in `folder`."""
    folder.mkdir()
    for path in CHART.glob("rules/*.yaml"):
        (folder / path.name).write_text(_hastened(path.read_text()))
    config = {
        "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
        "rule_files": ["alerts.yaml", "recording.yaml"],
        "scrape_configs": [{"job_name": "fleet", "static_configs": [{"targets": list(targets)}]}],
    }
    (folder / "prometheus.yml").write_text(json.dumps(config))
    port = free_port()
    with (folder / "prometheus.log").open("w") as log:
        process = subprocess.Popen(
            [
                find_prometheus() or "prometheus",
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
                "--enable-feature=exemplar-storage",
                "--log.level=warn",
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        prometheus = Prometheus(port)
        try:
            wait_until(
                lambda: prometheus.is_ready() or process.poll() is not None,
                timeout_s=60,
                what="Prometheus ready",
            )
            assert process.poll() is None, (folder / "prometheus.log").read_text()
            yield prometheus
        finally:
            process.kill()
            process.wait()


def _hastened(rules: str) -> str:
    """The rules with every minute made short."""

    def seconds(match: re.Match[str]) -> str:
        minutes = int(match[2]) * (60 if match[3] == "h" else 1)
        return f"{match[1]}{minutes * SECONDS_A_MINUTE}s"

    return re.sub(r"(\[|for: )(\d+)([mh])", seconds, rules)
