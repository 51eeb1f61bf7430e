"""Gateways and shards as a RayService: what Ray is told, and that our code understands it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from router_service import deployment
from router_service.ray_environment import ray_environment
from router_service.shard import AttentionShard
from services.cli.fleet import MALLOC_ENVIRONMENT
from services.cli.serve_ray import GATEWAY
from services.core.grpc_options import GRPC_ENVIRONMENT
from services.core.settings import Settings
from tests.support.chart import Rendered, environment, render, yaml

LAUNCHER_ONLY = {
    "RAY_TMPDIR",  # KubeRay's pods have one Ray each
    "RAY_AUTH_MODE",  # KubeRay sets these two, by `authOptions`
    "RAY_AUTH_TOKEN",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER",  # would bind Ray to the loopback address
}
SCALED: dict[str, Any] = {"shards": {"replicas": 2, "maxReplicas": 5, "gpus": 1}}


def serve_config(rendered: Rendered) -> dict[str, Any]:
    text = rendered.one("RayService")["spec"]["serveConfigV2"]
    config: dict[str, Any] = yaml.safe_load(text)
    return config


def worker_groups(rendered: Rendered) -> dict[str, dict[str, Any]]:
    cluster = rendered.one("RayService")["spec"]["rayClusterConfig"]
    return {group["groupName"]: group for group in cluster["workerGroupSpecs"]}


def applications(rendered: Rendered) -> dict[str, dict[str, Any]]:
    return {each["name"]: each for each in serve_config(rendered)["applications"]}


def test_ray_serve_takes_the_configuration() -> None:
    from ray.serve.schema import ServeDeploySchema

    schema = ServeDeploySchema(**serve_config(render(**SCALED)))
    assert schema.proxy_location == "Disabled"
    assert {each.name for each in schema.applications} == {"shards", "gateway"}


def test_the_shards_builder_takes_its_arguments() -> None:
    application = applications(render(**SCALED))["shards"]
    assert application["name"] == deployment.CLUSTER_SHARDS
    built = _build(application)
    options = built._bound_deployment
    assert options.name == deployment.SHARDS
    assert options.ray_actor_options["num_gpus"] == 1.0
    assert options.ray_actor_options["resources"] == {"shard": 1}
    scaling = options._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas) == (2, 5)
    assert built._bound_deployment.init_args == (None, False)


def test_shards_that_do_not_scale_have_a_fixed_number() -> None:
    options = _build(applications(render())["shards"])._bound_deployment
    assert options._deployment_config.autoscaling_config is None
    assert options.num_replicas == 1
    assert options.ray_actor_options["num_gpus"] == 0.0


def test_the_gateways_builder_takes_its_arguments() -> None:
    options = _build(applications(render(gateway={"replicas": 3}))["gateway"])._bound_deployment
    assert options.num_replicas == 3
    assert options.ray_actor_options["resources"] == {"gateway": 1}
    assert options.init_args == (None, GATEWAY, deployment.CLUSTER_SHARDS)


async def test_a_replica_reads_the_settings_of_its_own_pod(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[Settings] = []
    monkeypatch.setenv("EXPERTFLEET_SHARD_ADVERTISED_HOST", "10.0.0.7")
    monkeypatch.setattr(deployment, "_log_to_file", lambda *_: None)
    monkeypatch.setattr(AttentionShard, "start", lambda settings, **_: started.append(settings))
    replica: Any = SimpleNamespace()
    await deployment.ShardReplica.__init__(replica, None, False)
    assert started[0].shard_advertised_host == "10.0.0.7"


def test_each_pod_takes_one_replica_of_its_kind() -> None:
    rendered = render(**SCALED, gateway={"replicas": 3})
    groups = worker_groups(rendered)
    for group, resource in {"shards": "shard", "gateway": "gateway"}.items():
        # A JSON string within the quotes of a shell, as KubeRay passes it to `ray start`.
        quoted = groups[group]["rayStartParams"]["resources"]
        assert json.loads(json.loads(quoted)) == {resource: 1}
    shards, gateways = groups["shards"], groups["gateway"]
    assert [shards[key] for key in ("replicas", "minReplicas", "maxReplicas")] == [2, 2, 5]
    assert [gateways[key] for key in ("replicas", "minReplicas", "maxReplicas")] == [3, 3, 3]
    assert shards["rayStartParams"]["num-gpus"] == "1"
    limits = shards["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == 1
    assert "num-gpus" not in worker_groups(render())["shards"]["rayStartParams"]


def test_rays_autoscaler_runs_only_where_shards_scale() -> None:
    scaled, fixed = render(**SCALED), render()
    for rendered, is_on in ((scaled, True), (fixed, False)):
        cluster = rendered.one("RayService")["spec"]["rayClusterConfig"]
        assert cluster.get("enableInTreeAutoscaling", False) is is_on
        head = cluster["headGroupSpec"]["template"]["spec"]
        assert head["automountServiceAccountToken"] is is_on
        assert "serviceAccountName" not in head


def test_ray_finds_the_variables_that_the_launcher_gives_it() -> None:
    rendered = render()
    expected = {
        name: value
        for name, value in ray_environment(Path("/tmp"), token="").items()
        if name not in LAUNCHER_ONLY
    }
    expected |= GRPC_ENVIRONMENT | MALLOC_ENVIRONMENT
    cluster = rendered.one("RayService")["spec"]["rayClusterConfig"]
    for template in (
        cluster["headGroupSpec"]["template"],
        rendered.ray_pod("gateway"),
        rendered.ray_pod("shards"),
    ):
        variables = environment(template["spec"]["containers"][0])
        assert {name: variables.get(name) for name in expected} == expected
        assert not LAUNCHER_ONLY & set(variables)


def test_rays_processes_share_a_token_or_are_told_that_there_is_none() -> None:
    """Ray asks for a token by itself; a cluster whose pods each make one does not come up."""
    shared, open_to_all = render(), render(ray={"auth": "disabled"})
    assert shared.one("RayService")["spec"]["rayClusterConfig"]["authOptions"] == {"mode": "token"}
    cluster = open_to_all.one("RayService")["spec"]["rayClusterConfig"]
    assert "authOptions" not in cluster
    for template in (cluster["headGroupSpec"]["template"], open_to_all.ray_pod("shards")):
        container = template["spec"]["containers"][0]
        assert environment(container)["RAY_AUTH_MODE"] == "disabled"


def test_gateways_find_shards_at_their_pods() -> None:
    rendered = render()
    variables = environment(rendered.ray_pod("shards")["spec"]["containers"][0])
    assert variables["EXPERTFLEET_SHARD_ADVERTISED_HOST"] == "$(POD_IP)"
    assert variables["EXPERTFLEET_DEVICE"] == "cpu"
    assert rendered.settings()["EXPERTFLEET_SHARD_HOST"] == "0.0.0.0"
    on_gpus = render(**SCALED).ray_pod("shards")["spec"]["containers"][0]
    assert environment(on_gpus)["EXPERTFLEET_DEVICE"] == "cuda"
    assert on_gpus["image"].endswith("-cuda")


def test_a_gateway_is_ready_when_a_shard_is_and_leaves_after_its_streams() -> None:
    rendered = render(gateway={"drainSeconds": 45})
    template = rendered.ray_pod("gateway")
    container = template["spec"]["containers"][0]
    assert container["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": 8000}
    assert container["lifecycle"]["preStop"]["exec"]["command"] == ["sleep", "45"]
    assert template["spec"]["terminationGracePeriodSeconds"] > 45
    service = rendered.one("Service")
    assert service["spec"]["selector"].items() <= template["metadata"]["labels"].items()
    assert service["spec"]["ports"][0]["port"] == 8000


def test_every_ray_pod_brings_its_own_probes() -> None:
    """KubeRay would otherwise ask Ray's HTTP proxy for readiness, and that is off."""
    cluster = render().one("RayService")["spec"]["rayClusterConfig"]
    head = cluster["headGroupSpec"]["template"]
    for template in (head, render().ray_pod("gateway"), render().ray_pod("shards")):
        container = template["spec"]["containers"][0]
        assert "httpGet" in container["readinessProbe"]
        assert container["livenessProbe"]["httpGet"]["path"] == "/api/local_raylet_healthz"


def test_where_ray_pods_go_is_said_for_each_kind() -> None:
    rendered = render(
        gateway={"nodeSelector": {"pool": "web"}},
        shards={"nodeSelector": {"card": "big"}, "tolerations": [{"operator": "Exists"}]},
        ray={"nodeSelector": {"pool": "system"}},
    )
    head = rendered.one("RayService")["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]
    assert head["spec"]["nodeSelector"] == {"pool": "system"}
    assert rendered.ray_pod("gateway")["spec"]["nodeSelector"] == {"pool": "web"}
    assert rendered.ray_pod("shards")["spec"]["nodeSelector"] == {"card": "big"}
    assert rendered.ray_pod("shards")["spec"]["tolerations"] == [{"operator": "Exists"}]


def test_of_several_gateways_and_shards_all_but_one_stay_up() -> None:
    rendered = render(gateway={"replicas": 2}, shards={"replicas": 4, "maxReplicas": 4})
    budgets = rendered.all("PodDisruptionBudget")
    assert budgets["gateway"]["spec"]["minAvailable"] == 1
    assert budgets["shard"]["spec"]["minAvailable"] == 3
    assert set(render().all("PodDisruptionBudget")) == {"experts"}


def test_keys_come_from_secrets_to_gateways_alone() -> None:
    rendered = render(gateway={"apiKeysSecret": "keys", "adminKeySecret": "admin"})
    expected = {
        "EXPERTFLEET_API_KEYS": ("keys", "api-keys"),
        "EXPERTFLEET_ADMIN_KEY": ("admin", "admin-key"),
    }
    for name, template in rendered.pod_templates():
        found = {
            each["name"]: tuple(each["valueFrom"]["secretKeyRef"].values())
            for each in template["spec"]["containers"][0].get("env", ())
            if each["name"] in expected
        }
        assert found == (expected if name.endswith(" gateway") else {})


def _build(application: dict[str, Any]) -> Any:
    module, _, name = application["import_path"].partition(":")
    assert module == deployment.__name__
    return getattr(deployment, name)(application["args"])
