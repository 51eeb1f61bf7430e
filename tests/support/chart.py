"""The Helm chart, rendered in this process and only once for the same values."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

helm: Any = pytest.importorskip("helm_python", reason="rendering the chart needs helm-python-sdk")
yaml: Any = pytest.importorskip("yaml", reason="reading manifests needs PyYAML")

CHART = Path(__file__).parents[2] / "deploy/helm/expertfleet"
RELEASE, NAMESPACE = "prod", "ml"
NAME = f"{RELEASE}-expertfleet"
VALUES_FILES = tuple(sorted(path.name for path in CHART.glob("values-*.yaml")))

Manifest = dict[str, Any]


class Rendered:
    """The manifests of one set of values."""

    def __init__(self, files: dict[str, str]) -> None:
        self.notes = next(text for path, text in files.items() if path.endswith("NOTES.txt"))
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        self.manifests: list[Manifest] = [
            manifest
            for path, text in sorted(files.items())
            if path.endswith(".yaml")
            for manifest in yaml.load_all(text, Loader=loader)
            if manifest
        ]

    def all(self, kind: str) -> dict[str, Manifest]:
        """Those of a kind by name, without the release's prefix."""
        return {
            each["metadata"]["name"].removeprefix(NAME).removeprefix("-"): each
            for each in self.manifests
            if each["kind"] == kind
        }

    def one(self, kind: str, name: str = "") -> Manifest:
        return self.all(kind)[name]

    def kinds(self) -> set[str]:
        return {each["kind"] for each in self.manifests}

    def pod_templates(self) -> Iterator[tuple[str, Manifest]]:
        """(name, pod template) of everything that becomes a pod."""
        for each in self.manifests:
            name = each["metadata"]["name"]
            if each["kind"] == "Deployment":
                yield name, each["spec"]["template"]
            elif each["kind"] == "Pod":
                yield name, each
            elif each["kind"] == "RayService":
                cluster = each["spec"]["rayClusterConfig"]
                yield f"{name} head", cluster["headGroupSpec"]["template"]
                for group in cluster["workerGroupSpecs"]:
                    yield f"{name} {group['groupName']}", group["template"]

    def expert(self, group: str) -> Manifest:
        """The container of an expert group."""
        container: Manifest = self.one("Deployment", f"experts-{group}")["spec"]["template"][
            "spec"
        ]["containers"][0]
        return container

    def ray_pod(self, group: str) -> Manifest:
        """The pod template of a group of Ray's workers."""
        groups = self.one("RayService")["spec"]["rayClusterConfig"]["workerGroupSpecs"]
        template: Manifest = next(each for each in groups if each["groupName"] == group)["template"]
        return template

    def settings(self) -> dict[str, str]:
        data: dict[str, str] = self.one("ConfigMap", "settings")["data"]
        return data


def render(file: str | None = None, **values: Any) -> Rendered:
    """With a values file of the chart, and `values` laid over it (blocks key by key)."""
    return _render(file, json.dumps(values, sort_keys=True))


def merged_values(file: str | None = None, **values: Any) -> dict[str, Any]:
    """What such a release would use, the chart's defaults included."""
    merged: dict[str, Any] = _chart().merge_values(_values(file, values))
    return merged


def refusal(**values: Any) -> str:
    """What the chart says against the values. Fails the test if it takes them."""
    try:
        _chart().validate_schema(values)
        _chart().render(values, name=RELEASE, namespace=NAMESPACE)
    except helm.HelmError as error:
        return str(error)
    raise AssertionError(f"taken: {values}")


def environment(container: Manifest) -> dict[str, str]:
    """The variables that a container sets to a plain value."""
    return {each["name"]: each["value"] for each in container["env"] if "value" in each}


def read_values(file: str) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load((CHART / file).read_text())
    return values


@functools.cache
def _chart() -> Any:
    return helm.Chart.load(CHART)


@functools.lru_cache(maxsize=64)
def _render(file: str | None, values: str) -> Rendered:
    _chart().validate_schema(_values(file, json.loads(values)))
    return Rendered(
        _chart().render(_values(file, json.loads(values)), name=RELEASE, namespace=NAMESPACE)
    )


def _values(file: str | None, over: dict[str, Any]) -> dict[str, Any]:
    return _merge(read_values(file) if file else {}, over)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both_maps = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both_maps else value
    return merged
