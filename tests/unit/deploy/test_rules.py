from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.support.chart import CHART, yaml
from tests.support.exposed_metrics import exposed_metrics
from tests.support.promql import unknown_names

RULES = sorted(CHART.glob("rules/*.yaml"))
TESTS = Path(__file__).with_name("alert_rules_test.yaml")
OPERATIONS = Path(__file__).parents[3] / "docs/operations.md"
OF_PROMETHEUS = {"up": frozenset[str]()}

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool comes with Debian's package prometheus"
)


def rules(kind: str) -> list[dict[str, Any]]:
    return [
        rule
        for path in RULES
        for group in yaml.safe_load(path.read_text())["groups"]
        for rule in group["rules"]
        if kind in rule
    ]


def _groupings(expression: str) -> list[str]:
    return re.findall(r"\bby \(([^)]*)\)", expression)


def promtool(*arguments: str) -> None:
    ended = subprocess.run(
        ["promtool", *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr


@needs_promtool
def test_prometheus_takes_the_rules() -> None:
    promtool("check", "rules", *map(str, RULES))


@needs_promtool
def test_alerts_fire_when_they_should_and_not_when_they_should_not() -> None:
    promtool("test", "rules", str(TESTS))


def test_each_alert_is_tested_for_firing_and_for_keeping_quiet() -> None:
    tests = yaml.safe_load(TESTS.read_text())["tests"]
    fires, quiet = set(), set()
    for test in tests:
        name, what = re.fullmatch(r"(\w+) (fires|is quiet, .+)", test["name"]).groups()  # type: ignore[union-attr]
        asked = test["promql_expr_test"]
        assert all(f'alertname="{name}",alertstate="firing"' in each["expr"] for each in asked)
        samples = [each["exp_samples"] for each in asked]
        if what == "fires":
            assert any(samples)
            assert not samples[0], "and not before its time"
            fires.add(name)
        else:
            assert not any(samples)
            quiet.add(name)
    assert fires == quiet == {rule["alert"] for rule in rules("alert")}


def test_rules_are_of_metrics_and_labels_that_the_product_exposes() -> None:
    recorded: dict[str, frozenset[str]] = {}
    for rule in rules("record"):
        labels = set(re.findall(r"\w+", " ".join(_groupings(rule["expr"]))))
        for name, of_other in recorded.items():
            if name in rule["expr"] and not labels:
                labels |= of_other
        recorded[rule["record"]] = frozenset(labels - {"le"})
    known = exposed_metrics() | OF_PROMETHEUS | recorded
    found = [name for each in rules("expr") for name in unknown_names(each["expr"], known)]
    assert found == []


def test_recorded_series_are_used_or_for_dashboards_and_named_by_level_and_metric() -> None:
    names = [rule["record"] for rule in rules("record")]
    assert len(set(names)) == len(names)
    for name in names:
        assert re.fullmatch(
            r"expertfleet:[a-z_]+:(rate5m|ratio5m|ratio|max|avg|sum|p50|p95|p99)", name
        )


def test_each_alert_says_how_bad_what_and_where_to_read_on() -> None:
    headings = re.findall(r"^#+ (.+)$", OPERATIONS.read_text(), re.MULTILINE)
    anchors = {
        re.sub(r"[^a-z0-9 _-]", "", heading.lower()).replace(" ", "-") for heading in headings
    }
    alerts = rules("alert")
    assert len({rule["alert"] for rule in alerts}) == len(alerts)
    for rule in alerts:
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        notes = rule["annotations"]
        assert set(notes) == {"summary", "description", "runbook"}
        page, anchor = notes["runbook"].split("#")
        assert page == "docs/operations.md"
        assert anchor == rule["alert"].lower()
        assert anchor in anchors, "operations.md has a section for it"


def test_every_alert_that_operations_tells_of_exists() -> None:
    told = set(re.findall(r"\bExpertfleet[A-Z]\w+", OPERATIONS.read_text()))
    assert told == {rule["alert"] for rule in rules("alert")}
