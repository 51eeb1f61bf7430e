"""Who scales a group, and that nobody may do more than it does."""

from __future__ import annotations

import re
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from services.autoscaler.groups import ExpertGroup, parse_group
from services.autoscaler.kubernetes import ClusterAccess, KubernetesScaler
from services.cli.main import app
from services.core.telemetry import METRIC_FULL_STEPS, METRIC_WORKER_BUSY
from tests.support.chart import NAME, NAMESPACE, Rendered, render
from tests.support.promql import unknown_names

MIXED = [
    {"name": "a", "experts": "0-3", "layers": "0-1", "maxReplicas": 3},
    {"name": "b", "experts": "0-3", "layers": "2,3", "autoscaling": "keda"},
    {"name": "c", "experts": "4-7", "autoscaling": "hpa"},
    {"name": "d", "experts": "4", "autoscaling": "none", "replicas": 2},
    {"name": "e", "experts": "5", "replicas": 2},
]
POD = re.compile(r"deployments/([^/]+)/scale$")


def arguments(rendered: Rendered) -> list[str]:
    container = rendered.one("Deployment", "autoscaler")["spec"]["template"]["spec"]["containers"]
    given: list[str] = container[0]["args"]
    return given


def groups(rendered: Rendered) -> list[ExpertGroup]:
    texts = [a.partition("=")[2] for a in arguments(rendered) if a.startswith("--group=")]
    return [parse_group(text) for text in texts]


def test_the_builtin_autoscaler_is_told_of_its_groups_alone_and_their_bounds() -> None:
    rendered = render(experts={"groups": MIXED})
    first, last = groups(rendered)
    assert first == ExpertGroup(
        deployment=f"{NAME}-experts-a",
        experts=frozenset(range(4)),
        layers=frozenset({0, 1}),
        min_replicas=1,
        max_replicas=3,
    )
    assert (last.deployment, last.min_replicas, last.max_replicas) == (f"{NAME}-experts-e", 2, 4)
    assert f"--namespace={NAMESPACE}" in arguments(rendered)
    for group in (first, last):
        assert group.has_worker(f"{group.deployment}-7d9c5b6f4c-x2k8p")
        assert group.deployment in {
            each["metadata"]["name"] for each in rendered.all("Deployment").values()
        }


@pytest.mark.parametrize("mode", ["builtin", "none"])
def test_the_command_knows_every_option_it_is_given(mode: str) -> None:
    given = arguments(render(autoscaling={"mode": mode}))
    known = CliRunner().invoke(app, ["autoscale", "--help"], env={"COLUMNS": "200"}).output
    for option in (argument.partition("=")[0] for argument in given):
        assert option in known
    assert ("--mode=kubernetes" in given) is (mode == "builtin")


def test_without_a_builtin_group_replicas_are_made_in_memory_and_no_permission_is_given() -> None:
    rendered = render(autoscaling={"mode": "none"})
    assert "--mode=local" in arguments(rendered)
    spec = rendered.one("Deployment", "autoscaler")["spec"]["template"]["spec"]
    assert spec["automountServiceAccountToken"] is False
    assert "serviceAccountName" not in spec
    assert not {"Role", "RoleBinding", "ServiceAccount", "ClusterRole"} & rendered.kinds()


def test_without_the_autoscaler_nothing_of_it_is_there() -> None:
    rendered = render(autoscaler={"enabled": False}, autoscaling={"mode": "none"})
    assert not any("autoscaler" in each["metadata"]["name"] for each in rendered.manifests)


async def test_the_permissions_are_exactly_the_calls_that_are_made() -> None:
    rendered = render(experts={"groups": MIXED})
    calls: set[tuple[str, str, str, str]] = set()

    def answer(request: httpx.Request) -> httpx.Response:
        api, namespace, resource, name, sub = re.fullmatch(
            r"/apis/([^/]+)/v1/namespaces/([^/]+)/([^/]+)/([^/]+)/([^/]+)", request.url.path
        ).groups()  # type: ignore[union-attr]
        assert namespace == NAMESPACE
        calls.add((api, f"{resource}/{sub}", request.method.lower(), name))
        scale = {"metadata": {"resourceVersion": "1"}, "spec": {"replicas": 2}}
        return httpx.Response(200, json=scale)

    access = ClusterAccess(url="http://api", namespace=NAMESPACE)
    transport = httpx.MockTransport(answer)
    for group in groups(rendered):
        scaler = KubernetesScaler(access, [group], transport=transport)
        layer = min(group.layers or {0})
        await scaler.add_worker([(layer, min(group.experts))])
        if group.min_replicas < 2:
            await scaler.remove_worker(f"{group.deployment}-7d9c5b6f4c-x2k8p")
        await scaler.close()
    granted = {
        (api, resource, verb, name)
        for rule in rendered.one("Role", "autoscaler")["rules"]
        for api in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
        for name in rule["resourceNames"]
    }
    assert granted == calls


def test_the_role_is_bound_to_the_autoscalers_account_alone() -> None:
    rendered = render()
    binding = rendered.one("RoleBinding", "autoscaler")
    assert binding["subjects"] == [
        {"kind": "ServiceAccount", "name": f"{NAME}-autoscaler", "namespace": NAMESPACE}
    ]
    assert binding["roleRef"]["name"] == rendered.one("Role", "autoscaler")["metadata"]["name"]
    for name, template in rendered.pod_templates():
        is_autoscaler = name == f"{NAME}-autoscaler"
        assert template["spec"]["automountServiceAccountToken"] is is_autoscaler, name
        assert ("serviceAccountName" in template["spec"]) is is_autoscaler
    assert not {"ClusterRole", "ClusterRoleBinding"} & rendered.kinds()


def test_scalers_that_keep_a_number_themselves_are_not_overruled_by_an_upgrade() -> None:
    deployments = render(experts={"groups": MIXED}).all("Deployment")
    replicas = {name: each["spec"].get("replicas") for name, each in deployments.items()}
    assert {name: replicas[f"experts-{name}"] for name in "abcde"} == {
        "a": 1,
        "b": None,
        "c": None,
        "d": 2,
        "e": 2,
    }


def test_keda_scales_by_saturation_the_groups_part_in_it_and_its_hottest_expert() -> None:
    rendered = render(experts={"groups": MIXED}, autoscaling={"busy": 0.6, "tokensPerExpert": 2000})
    (scaled,) = rendered.all("ScaledObject").values()
    spec = scaled["spec"]
    assert spec["scaleTargetRef"] == {"name": f"{NAME}-experts-b"}
    assert (spec["minReplicaCount"], spec["maxReplicaCount"]) == (1, 4)
    busy, tokens = (trigger["metadata"] for trigger in spec["triggers"])
    assert busy["threshold"] == "0.6"
    names = (METRIC_FULL_STEPS, METRIC_WORKER_BUSY)
    exposed = {name: frozenset[str]() for name in names}
    assert unknown_names(busy["query"], exposed) == []
    assert all(name in busy["query"] for name in names)
    (pods,) = re.findall(r'pod=~"([^"]+)"', busy["query"])
    assert re.fullmatch(pods, f"{NAME}-experts-b-7d9c5b6f4c-x2k8p")
    assert not re.fullmatch(pods, f"{NAME}-experts-bb-7d9c5b6f4c-x2k8p")
    assert tokens["threshold"] == "2000"
    assert 'expert=~"0|1|2|3",layer=~"2|3"' in tokens["query"]


def test_keda_looks_at_tokens_only_if_told_how_many() -> None:
    (scaled,) = render(experts={"groups": MIXED}).all("ScaledObject").values()
    assert len(scaled["spec"]["triggers"]) == 1


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        (
            "expertfleet_worker_busy_ratio",
            {
                "type": "Pods",
                "pods": {
                    "metric": {"name": "expertfleet_worker_busy_ratio"},
                    "target": {"type": "AverageValue", "averageValue": "700m"},
                },
            },
        ),
        (
            "cpu",
            {
                "type": "Resource",
                "resource": {
                    "name": "cpu",
                    "target": {"type": "Utilization", "averageUtilization": 70},
                },
            },
        ),
    ],
)
def test_the_hpa_scales_by_busy_time_or_cpu(metric: str, expected: dict[str, Any]) -> None:
    rendered = render(experts={"groups": MIXED}, autoscaling={"hpaMetric": metric})
    (scaler,) = rendered.all("HorizontalPodAutoscaler").values()
    assert scaler["spec"]["scaleTargetRef"]["name"] == f"{NAME}-experts-c"
    assert scaler["spec"]["metrics"] == [expected]


def test_one_autoscaler_leads_and_others_stand_by_over_the_store() -> None:
    rendered = render(autoscaler={"replicas": 2})
    deployment = rendered.one("Deployment", "autoscaler")
    assert deployment["spec"]["replicas"] == 2
    variables = deployment["spec"]["template"]["spec"]["containers"][0]["env"]
    assert any(each["name"] == "EXPERTFLEET_REDIS_URL" for each in variables)
