from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.chart import CHART
from tests.support.exposed_metrics import exposed_metrics
from tests.support.promql import unknown_names

FILES = sorted(CHART.glob("dashboards/*.json"))
OF_PROMETHEUS = {"ALERTS": frozenset({"alertname", "alertstate"})}
WITH_EXEMPLARS = (
    "expertfleet_time_to_first_token_seconds",
    "expertfleet_time_per_output_token_seconds",
    "expertfleet_request_duration_seconds",
    "expertfleet_request_phase_seconds",
    "expertfleet_step_duration_seconds",
    "expertfleet_worker_queue_seconds",
    "expertfleet_worker_compute_seconds",
)
Board = dict[str, Any]

every_board = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def read(path: Any) -> Board:
    board: Board = json.loads(path.read_text())
    return board


def targets(board: Board) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """(panel, target) of every query."""
    for panel in board["panels"]:
        for target in panel.get("targets", ()):
            yield panel, target


def in_prometheus(expression: str) -> str:
    """The expression as Grafana sends it."""
    return expression.replace("$__rate_interval", "1m").replace("$namespace", ".*")


def test_there_is_an_overview_and_one_for_experts_and_one_for_requests() -> None:
    boards = {path.stem: read(path) for path in FILES}
    assert {name: board["uid"] for name, board in boards.items()} == {
        "overview": "expertfleet-overview",
        "experts": "expertfleet-experts",
        "request": "expertfleet-request",
    }
    for board in boards.values():
        assert board["tags"] == ["expertfleet"]
        assert "id" not in board, "an id would clash with another dashboard's"


@every_board
def test_every_query_is_of_metrics_and_labels_that_the_product_exposes(path: Any) -> None:
    known = exposed_metrics() | OF_PROMETHEUS
    board = read(path)
    queries = [target["expr"] for _, target in targets(board)]
    queries += [note["expr"] for note in board["annotations"]["list"]]
    assert queries
    unknown = [name for query in queries for name in unknown_names(in_prometheus(query), known)]
    assert unknown == []


@every_board
def test_legends_name_labels_that_their_query_keeps(path: Any) -> None:
    for panel, target in targets(read(path)):
        for label in re.findall(r"{{(\w+)}}", target["legendFormat"]):
            grouped = re.findall(r"by \(([^)]*)\)", target["expr"])
            kept = {name.strip() for group in grouped for name in group.split(",")}
            assert label in kept or (label == "instance" and not grouped), panel["title"]


@every_board
def test_the_data_source_and_the_namespace_are_variables(path: Any) -> None:
    board = read(path)
    variables = {each["name"]: each for each in board["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert variables["namespace"]["allValue"] == ".*", "a fleet outside Kubernetes has none"
    (asked,) = re.findall(r"label_values\((\w+), namespace\)", variables["namespace"]["definition"])
    assert asked in exposed_metrics()
    for panel, target in targets(board):
        assert target["datasource"]["uid"] == panel["datasource"]["uid"] == "${datasource}"
        assert 'namespace=~"$namespace"' in target["expr"], panel["title"]


@every_board
def test_panels_are_numbered_described_and_do_not_overlap(path: Any) -> None:
    panels = read(path)["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells
        if panel["type"] not in ("row", "text"):
            assert panel["title"]
            assert panel["description"]


def test_latencies_ask_for_exemplars_and_nothing_else_does() -> None:
    asked = [
        target["expr"]
        for path in FILES
        for _, target in targets(read(path))
        if target.get("exemplar")
    ]
    assert asked
    for expression in asked:
        assert any(name in expression for name in WITH_EXEMPLARS), expression
    for name in WITH_EXEMPLARS:
        assert any(name in expression for expression in asked), name


def test_experts_are_shown_as_layers_by_experts() -> None:
    board = read(CHART / "dashboards/experts.json")
    matrices = [panel for panel in board["panels"] if panel["type"] == "table"]
    assert len(matrices) == 3
    for panel in matrices:
        matrix = panel["transformations"][-1]
        assert matrix["id"] == "groupingToMatrix"
        assert (matrix["options"]["rowField"], matrix["options"]["columnField"]) == (
            "layer",
            "expert",
        )
        assert "by (layer, expert)" in panel["targets"][0]["expr"]


def test_a_wrong_metric_or_label_would_be_found() -> None:
    known = exposed_metrics()
    assert unknown_names("sum(rate(expertfleet_requests_total[5m]))", known) == []
    assert unknown_names("sum(rate(expertfleet_requests[5m]))", known) != []
    assert unknown_names('sum by (state) (expertfleet_fleet_workers{kind="x"})', known) != []
    assert unknown_names("sum by (expert) (expertfleet_fleet_workers)", known) != []
    with pytest.raises(AssertionError, match="sum"):
        unknown_names("sum(", known)
