"""Wrong values are refused, by name."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.chart import CHART, helm, refusal

GROUPS = [{"name": "all", "experts": "0-7"}]
PART = [{"name": "some", "experts": "0-6"}]

WRONG: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"gatway": {}}, ("gatway",)),
    ({"gateway": {"replica": 2}}, ("/gateway", "replica")),
    ({"gateway": {"replicas": 0}}, ("/gateway/replicas", "minimum")),
    ({"gateway": {"serviceType": "External"}}, ("/gateway/serviceType", "LoadBalancer")),
    ({"image": {"pullPolicy": "Sometimes"}}, ("/image/pullPolicy", "IfNotPresent")),
    ({"fleet": "No Spaces"}, ("/fleet", "pattern")),
    ({"logLevel": "loud"}, ("/logLevel", "warning")),
    ({"settings": {"max_model_len": 8192}}, ("/settings/max_model_len", "string")),
    ({"settings": {"redis_url": "redis://x"}}, ("settings.redis_url", "the chart sets")),
    # Experts
    ({"experts": {"groups": []}}, ("/experts/groups", "minItems")),
    ({"experts": {"groups": [{"experts": "0-7"}]}}, ("/experts/groups/0", "name")),
    ({"experts": {"groups": [{"name": "a"}]}}, ("/experts/groups/0", "experts")),
    (
        {"experts": {"groups": [{"name": "a", "experts": "0,x"}]}},
        ("/experts/groups/0/experts", "pattern"),
    ),
    ({"experts": {"groups": [GROUPS[0] | {"name": "Big_One"}]}}, ("/experts/groups/0/name",)),
    ({"experts": {"groups": [GROUPS[0] | {"gpu": 1}]}}, ("/experts/groups/0", "'gpu'")),
    ({"experts": {"groups": [GROUPS[0] | {"weights": "fp8"}]}}, ("weights", "int4")),
    ({"experts": {"groups": [GROUPS[0] | {"autoscaling": "vpa"}]}}, ("autoscaling", "keda")),
    ({"experts": {"memory": "12GB"}}, ("/experts/memory", "12GB")),
    ({"experts": {"memory": 12}}, ("/experts/memory", "string")),
    ({"experts": {"cpu": "two"}}, ("/experts/cpu", "two")),
    ({"experts": {"gpus": -1}}, ("/experts/gpus", "minimum")),
    ({"experts": {"spread": "Never"}}, ("/experts/spread", "DoNotSchedule")),
    (
        {"experts": {"tolerations": [{"key": "gpu", "effect": "Sometimes"}]}},
        ("/experts/tolerations/0/effect", "NoSchedule"),
    ),
    ({"experts": {"groups": GROUPS + GROUPS}}, ("two groups are called all",)),
    ({"experts": {"groups": PART}}, ("no group holds expert 7 in layer 0",)),
    (
        {"experts": {"groups": [GROUPS[0] | {"layers": "0-2"}]}},
        ("no group holds expert 0 in layer 3",),
    ),
    (
        {"experts": {"groups": [{"name": "all", "experts": "0-8"}]}},
        ("all names expert 8 of a model that has 8",),
    ),
    (
        {"experts": {"groups": [GROUPS[0] | {"layers": "0-4"}]}},
        ("all names layer 4 of a model that has 4",),
    ),
    (
        {"experts": {"groups": [GROUPS[0] | {"replicas": 3, "maxReplicas": 2}]}},
        ("all has maxReplicas 2 below replicas 3",),
    ),
    (
        {"experts": {"groups": [{"name": "a" * 30, "experts": "0-7"}]}},
        ("more than 46 letters", "fullnameOverride"),
    ),
    # Weights
    ({"weights": {"source": "nfs"}}, ("/weights/source", "download")),
    ({"weights": {"source": "pvc"}, "model": "/models"}, ("weights.pvcClaim",)),
    ({"weights": {"source": "image"}, "model": "/models"}, ("weights.image",)),
    ({"weights": {"source": "download"}, "model": "/models/x"}, ("hub id", "/models/x")),
    (
        {"weights": {"source": "pvc", "pvcClaim": "w"}, "model": "/elsewhere/m"},
        ("/elsewhere/m", "weights.mountPath /models"),
    ),
    ({"weights": {"downloadSize": "lots"}}, ("/weights/downloadSize", "lots")),
    # Shards
    ({"shards": {"gpus": 2}}, ("/shards/gpus", "maximum")),
    ({"ray": {"auth": "password"}}, ("/ray/auth", "token")),
    ({"shards": {"replicas": 3}}, ("shards.maxReplicas 1 is below shards.replicas 3",)),
    ({"shards": {"kvCacheBytes": "1Gi"}}, ("/shards/kvCacheBytes", "integer")),
    # Scaling
    ({"autoscaling": {"mode": "magic"}}, ("/autoscaling/mode", "builtin")),
    ({"autoscaling": {"busy": 70}}, ("/autoscaling/busy", "maximum")),
    ({"autoscaling": {"prometheus": "prometheus:9090"}}, ("/autoscaling/prometheus",)),
    ({"autoscaler": {"enabled": False}}, ("autoscaler.enabled is false", "autoscaling.mode")),
    # The store
    ({"redis": {"bundled": False}}, ("redis.host",)),
    ({"redis": {"password": "sl/ash"}}, ("/redis/password", "sl/ash")),
    ({"redis": {"port": 70000}}, ("/redis/port", "maximum")),
    ({"redis": {"bundled": False, "host": "h", "password": "p"}}, ("redis.passwordSecret",)),
    ({"redis": {"bundled": False, "host": "h", "caSecret": "c"}}, ("redis.tls",)),
    ({"redis": {"bundled": False, "host": "h", "clientCertSecret": "c"}}, ("redis.tls",)),
    # Telemetry, certificates, network, security
    ({"otel": {"endpoint": "collector:4317"}}, ("/otel/endpoint", "collector:4317")),
    ({"otel": {"sampleRatio": 2}}, ("/otel/sampleRatio", "maximum")),
    ({"tls": {"enabled": True, "source": "secret"}}, ("tls.secret", "ca.crt")),
    ({"tls": {"source": "vault"}}, ("/tls/source", "certManager")),
    ({"networkPolicy": {"redisCidr": "10.0.0.1"}}, ("/networkPolicy/redisCidr",)),
    ({"networkPolicy": {"gatewayFrom": [{"pods": {}}]}}, ("/networkPolicy/gatewayFrom/0", "pods")),
    ({"monitoring": {"mode": "podMonitor"}}, ("/monitoring/mode", "serviceMonitor")),
    ({"podSecurity": {"runAsUser": 0}}, ("/podSecurity/runAsUser", "minimum")),
    ({"podDisruptionBudget": {"expertsMaxUnavailable": 0}}, ("expertsMaxUnavailable", "minimum")),
]


@pytest.mark.parametrize(("values", "told"), WRONG, ids=[str(values) for values, _ in WRONG])
def test_a_wrong_value_is_refused_by_name(values: dict[str, Any], told: tuple[str, ...]) -> None:
    message = refusal(**values)
    for part in told:
        assert part in message


def test_image_volumes_are_refused_where_kubernetes_has_none(
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The linter, alone to be told a version, says what would be refused without refusing it."""
    values = {"model": "/models", "weights": {"source": "image", "image": "registry/w:1"}}
    helm.lint(CHART, values, strict=True, kube_version="v1.30.0")
    assert "weights.source image needs Kubernetes 1.31 or newer" in capfd.readouterr().err
    helm.lint(CHART, values, strict=True, kube_version="v1.31.0")
    assert "needs Kubernetes" not in capfd.readouterr().err
