"""Every values file renders, lints, and is valid wherever the chart may be installed."""

from __future__ import annotations

from typing import Any

import pytest

from services.core.settings import Settings, load_settings
from tests.support.chart import CHART, VALUES_FILES, helm, merged_values, read_values, render
from tests.support.manifest_schemas import CUSTOM, custom_errors, errors, versions

ALL_SWITCHES: dict[str, Any] = {
    "weights": {"source": "pvc", "pvcClaim": "weights"},
    "model": "/models/m",
    "image": {"registry": "registry.example.com/team", "pullSecrets": ["pull"]},
    "gateway": {"replicas": 3, "apiKeysSecret": "keys", "adminKeySecret": "admin"},
    "shards": {"replicas": 2, "maxReplicas": 5, "gpus": 1},
    "experts": {
        "autoscaling": "keda",
        "maxReplicas": 6,
        "updateSurge": 1,
        "gpus": 1,
        "gpuMemoryBytes": 10**10,
        "groups": [
            {"name": "a", "experts": "0-3", "layers": "0-1"},
            {"name": "b", "experts": "0-3", "layers": "2,3", "autoscaling": "hpa"},
            {"name": "c", "experts": "4-7", "autoscaling": "builtin"},
            {"name": "d", "experts": "4", "autoscaling": "none", "replicas": 2},
        ],
    },
    "autoscaling": {"tokensPerExpert": 1000},
    "redis": {
        "bundled": False,
        "host": "store.example.com",
        "tls": True,
        "username": "fleet",
        "passwordSecret": "store",
        "caSecret": "store-ca",
        "clientCertSecret": "store-client",
    },
    "otel": {"endpoint": "http://collector.monitoring:4317", "sampleRatio": 0.1},
    "tls": {"enabled": True},
    "networkPolicy": {
        "gatewayFrom": [{"namespaceSelector": {"matchLabels": {"team": "web"}}}],
        "kuberayNamespace": "kuberay",
    },
    "monitoring": {"mode": "serviceMonitor", "dashboards": True, "rules": True},
    "settings": {"max_model_len": "8192"},
}
CASES: dict[str, tuple[str | None, dict[str, Any]]] = {
    "defaults": (None, {}),
    **{file: (file, {}) for file in VALUES_FILES},
    "all switches": (None, ALL_SWITCHES),
    "download, given certificates": (
        None,
        {
            "model": "owner/name",
            "weights": {"source": "download", "hubTokenSecret": "hub"},
            "tls": {"enabled": True, "source": "secret", "secret": "certs"},
            "autoscaling": {"mode": "hpa", "hpaMetric": "cpu"},
        },
    ),
}


def test_there_is_a_values_file_for_each_purpose() -> None:
    assert VALUES_FILES == (
        "values-24gb-cards.yaml",
        "values-minikube-cpu.yaml",
        "values-mixtral-8x22b.yaml",
        "values-mixtral-8x7b.yaml",
    )


@pytest.mark.parametrize("file", [None, *VALUES_FILES])
def test_strict_lint_finds_nothing(file: str | None) -> None:
    report = helm.lint(CHART, read_values(file) if file else None, strict=True)
    found = [each for each in report["messages"] if each["severity"] > 1]
    assert (found, report["errors"]) == ([], [])
    assert report["total_charts_linted"] == 1


@pytest.mark.parametrize("version", versions())
def test_every_built_in_kind_is_valid_in_kubernetes(version: str) -> None:
    wrong = [
        f"{case}: {manifest['kind']}/{manifest['metadata']['name']}: {error}"
        for case, (file, values) in CASES.items()
        for manifest in _once(render(file, **values).manifests)
        if "." not in manifest["apiVersion"].split("/")[0] or "k8s.io" in manifest["apiVersion"]
        for error in errors(manifest, version)
    ]
    assert wrong == []


@pytest.mark.parametrize("case", CASES)
def test_every_custom_resource_is_what_its_operator_takes(case: str) -> None:
    file, values = CASES[case]
    wrong = [
        f"{manifest['kind']}/{manifest['metadata']['name']}: {error}"
        for manifest in render(file, **values).manifests
        if (manifest["apiVersion"], manifest["kind"]) in CUSTOM
        for error in custom_errors(manifest)
    ]
    assert wrong == []


def test_the_schemas_know_what_is_wrong() -> None:
    deployment = render().one("Deployment", "experts-e01")
    broken = deployment | {"spec": deployment["spec"] | {"replicaCount": 2}}
    assert any("replicaCount" in error for error in errors(broken, versions()[-1]))
    service = render().one("RayService")
    broken = service | {"spec": service["spec"] | {"serveConfig": ""}}
    assert any("serveConfig" in error for error in custom_errors(broken))


def test_image_volumes_are_valid_since_they_exist() -> None:
    rendered = render(
        model="/models", weights={"source": "image", "image": "registry.example.com/weights:1"}
    )
    deployment = rendered.one("Deployment", "experts-e01")
    for version in versions():
        is_known = tuple(map(int, version.split(".")[:2])) >= (1, 31)
        assert (errors(deployment, version) == []) is is_known
    assert custom_errors(rendered.one("RayService")) == []


def test_all_kinds_have_a_known_schema() -> None:
    custom = {kind for _, kind in CUSTOM}
    rendered = set().union(*(render(file, **values).kinds() for file, values in CASES.values()))
    assert custom - {"PrometheusRule"} <= rendered


def test_no_two_manifests_are_the_same_object() -> None:
    for file, values in CASES.values():
        keys = [(m["kind"], m["metadata"]["name"]) for m in render(file, **values).manifests]
        assert len(keys) == len(set(keys))


@pytest.mark.parametrize("case", CASES)
def test_every_variable_is_a_setting_and_every_setting_can_be_read(case: str) -> None:
    file, values = CASES[case]
    rendered = render(file, **values)
    known = {f"EXPERTFLEET_{name.upper()}" for name in Settings.model_fields}
    fields = Settings.model_fields
    variables = dict(rendered.settings())
    for _, template in rendered.pod_templates():
        for container in template["spec"]["containers"]:
            variables |= {
                each["name"]: each.get("value", "from-a-secret")
                for each in container.get("env", ())
                if each["name"].startswith("EXPERTFLEET_")
            }
    assert set(variables) - known == set()
    given = {name.removeprefix("EXPERTFLEET_").lower(): value for name, value in variables.items()}
    load_settings(**{name: value for name, value in given.items() if name in fields})


def test_every_default_is_in_the_schema_and_the_other_way_round() -> None:
    schema = helm.Chart.load(CHART).schema
    values = merged_values()
    assert set(schema["properties"]) - {"global"} == set(values) - {"global"}
    for block, of_block in schema["properties"].items():
        if "properties" in of_block:
            assert set(of_block["properties"]) == set(values[block]), block


def _once(manifests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One expert Deployment stands for those that differ in names alone."""
    seen: dict[str, dict[str, Any]] = {}
    for manifest in manifests:
        name = manifest["metadata"]["name"]
        key = name
        if manifest["kind"] == "Deployment" and "-experts-" in name:
            spec = manifest["spec"]["template"]["spec"]
            key = f"expert {sorted(spec)} {sorted(spec['containers'][0])}"
        seen.setdefault(f"{manifest['kind']} {key}", manifest)
    return list(seen.values())
