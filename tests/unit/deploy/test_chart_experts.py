"""Expert groups: what their pods hold, where they land, how they start and leave."""

from __future__ import annotations

from typing import Any

import pytest

from expert_service import __main__ as worker
from expert_service import probe
from services.cli.fleet import MALLOC_ENVIRONMENT
from services.core.checkpoints import fetch
from services.core.grpc_options import GRPC_ENVIRONMENT
from tests.support.chart import NAME, environment, render

TWO = [{"name": "low", "experts": "0-3"}, {"name": "high", "experts": "4-7"}]


def pod_spec(deployment: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = deployment["spec"]["template"]["spec"]
    return spec


def test_each_group_is_a_deployment_that_holds_its_experts_and_layers() -> None:
    groups = [
        {"name": "a", "experts": "0,2-3", "layers": "0-1"},
        {"name": "b", "experts": "0-7", "replicas": 2},
    ]
    rendered = render(experts={"groups": groups})
    assert rendered.expert("a")["args"][:2] == ["--experts=0,2-3", "--layers=0-1"]
    assert rendered.expert("b")["args"][0] == "--experts=0-7"
    assert not any(argument.startswith("--layers") for argument in rendered.expert("b")["args"])
    assert rendered.one("Deployment", "experts-b")["spec"]["replicas"] == 2


def test_the_worker_understands_its_arguments_and_is_reached_at_its_pod() -> None:
    container = render().expert("e01")
    assert container["command"] == ["python", "-m", "expert_service"]
    options = worker._parser().parse_args(container["args"])
    assert (options.experts, options.host, options.port) == ("0,1", "0.0.0.0", 50051)
    assert options.metrics_port == 9100
    assert options.advertised_host == "$(POD_IP)"
    assert options.worker_id == "$(POD_NAME)"
    sources = {each["name"]: each.get("valueFrom", {}) for each in container["env"]}
    assert sources["POD_IP"] == {"fieldRef": {"fieldPath": "status.podIP"}}
    assert sources["POD_NAME"] == {"fieldRef": {"fieldPath": "metadata.name"}}
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"grpc": 50051, "lane": 50052, "metrics": 9100}
    assert render().settings()["EXPERTFLEET_LANE_PORT"] == "50052"


def test_what_the_c_libraries_read_is_what_the_launcher_sets() -> None:
    variables = environment(render().expert("e01"))
    expected = GRPC_ENVIRONMENT | MALLOC_ENVIRONMENT
    assert {name: variables.get(name) for name in expected} == expected


def test_pods_with_gpus_ask_for_them_use_the_cuda_image_and_device() -> None:
    rendered = render(experts={"gpus": 2, "gpuMemoryBytes": 46 * 10**9, "groups": TWO})
    container = rendered.expert("low")
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 2
    assert container["image"].endswith("-cuda")
    assert "--device=cuda" in container["args"]
    assert environment(container)["EXPERTFLEET_WORKER_MEMORY_BYTES"] == "46000000000"
    without = render(experts={"groups": TWO}).expert("low")
    assert "nvidia.com/gpu" not in without["resources"]["limits"]
    assert not without["image"].endswith("-cuda")
    assert "--device=cpu" in without["args"]


def test_a_group_may_be_of_another_card_precision_and_size() -> None:
    other = {
        "name": "high",
        "experts": "4-7",
        "weights": "int4",
        "memory": "3Gi",
        "gpus": 0,
        "nodeSelector": {"card": "old"},
        "tolerations": [],
    }
    rendered = render(
        experts={
            "gpus": 1,
            "nodeSelector": {"card": "new"},
            "tolerations": [{"key": "gpu", "operator": "Exists"}],
            "groups": [TWO[0], other],
        }
    )
    low, high = (pod_spec(rendered.one("Deployment", f"experts-{n}")) for n in ("low", "high"))
    assert (low["nodeSelector"], high["nodeSelector"]) == ({"card": "new"}, {"card": "old"})
    assert low["tolerations"] == [{"key": "gpu", "operator": "Exists"}]
    assert "tolerations" not in high
    assert "--expert-weights=auto" in low["containers"][0]["args"]
    assert "--expert-weights=int4" in high["containers"][0]["args"]
    assert low["containers"][0]["resources"]["limits"] == {"memory": "2Gi", "nvidia.com/gpu": 1}
    assert high["containers"][0]["resources"]["limits"] == {"memory": "3Gi"}


@pytest.mark.parametrize("when", ["ScheduleAnyway", "DoNotSchedule"])
def test_replicas_of_a_group_and_then_all_experts_are_spread_over_nodes(when: str) -> None:
    deployment = render(experts={"spread": when, "groups": TWO}).one("Deployment", "experts-low")
    own, every = pod_spec(deployment)["topologySpreadConstraints"]
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    for constraint in (own, every):
        assert constraint["topologyKey"] == "kubernetes.io/hostname"
        assert constraint["labelSelector"]["matchLabels"].items() <= labels.items()
    assert own["whenUnsatisfiable"] == when
    assert own["labelSelector"]["matchLabels"]["expertfleet/group"] == "low"
    assert "expertfleet/group" not in every["labelSelector"]["matchLabels"]


def test_probes_ask_grpc_health_and_leave_time_to_load() -> None:
    container = render(experts={"loadSeconds": 600}).expert("e01")
    for probed in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probed]["grpc"] == {"port": 50051}
    start = container["startupProbe"]
    assert start["periodSeconds"] * start["failureThreshold"] == 600
    deployment = render(experts={"loadSeconds": 600}).one("Deployment", "experts-e01")
    assert deployment["spec"]["progressDeadlineSeconds"] > 600


def test_a_pod_that_leaves_drains_and_has_the_time_for_it() -> None:
    rendered = render(experts={"drainSeconds": 25})
    container = rendered.expert("e01")
    hook = container["lifecycle"]["preStop"]["exec"]["command"]
    assert hook == ["python", "-m", probe.__name__, "drain"]
    assert environment(container)["EXPERTFLEET_DRAIN_TIMEOUT_S"] == "25"
    grace = pod_spec(rendered.one("Deployment", "experts-e01"))["terminationGracePeriodSeconds"]
    assert grace >= 25 + 15


def test_an_update_takes_no_further_card_unless_told_to() -> None:
    strategy = render().one("Deployment", "experts-e01")["spec"]["strategy"]["rollingUpdate"]
    assert strategy == {"maxSurge": 0, "maxUnavailable": 1}
    surging = render(experts={"updateSurge": 1}).one("Deployment", "experts-e01")
    assert surging["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}


def test_changed_settings_start_pods_anew() -> None:
    def checksum(**values: Any) -> str:
        template = render(**values).one("Deployment", "experts-e01")["spec"]["template"]
        found: str = template["metadata"]["annotations"]["checksum/settings"]
        return found

    assert checksum() == checksum(gateway={"replicas": 2})
    assert checksum() != checksum(settings={"call_timeout_s": "5"})


def test_weights_on_a_claim_are_mounted_read_only() -> None:
    rendered = render(model="/models/m", weights={"source": "pvc", "pvcClaim": "w"})
    for spec in (
        pod_spec(rendered.one("Deployment", "experts-e01")),
        rendered.ray_pod("shards")["spec"],
        rendered.ray_pod("gateway")["spec"],
    ):
        volume = {"claimName": "w", "readOnly": True}
        assert {"name": "weights", "persistentVolumeClaim": volume} in spec["volumes"]
        mount = {"name": "weights", "mountPath": "/models", "readOnly": True}
        assert mount in spec["containers"][0]["volumeMounts"]
        assert "initContainers" not in spec
    assert rendered.settings()["EXPERTFLEET_MODEL"] == "/models/m"


def test_weights_in_an_image_are_mounted_as_a_volume() -> None:
    rendered = render(model="/models", weights={"source": "image", "image": "registry/w:1"})
    spec = pod_spec(rendered.one("Deployment", "experts-e01"))
    (volume,) = (each for each in spec["volumes"] if each["name"] == "weights")
    assert volume["image"] == {"reference": "registry/w:1", "pullPolicy": "IfNotPresent"}


def test_weights_of_a_hub_are_fetched_first_and_only_what_the_pod_needs() -> None:
    rendered = render(
        model="owner/name",
        weights={"source": "download", "downloadSize": "50Gi", "hubTokenSecret": "hub"},
        experts={"groups": [{"name": "a", "experts": "0-7", "layers": "0-1"}, *TWO]},
    )
    pods = {
        ("--experts=0-7", "--layers=0-1"): pod_spec(rendered.one("Deployment", "experts-a")),
        ("--experts=4-7",): pod_spec(rendered.one("Deployment", "experts-high")),
        ("--shared",): rendered.ray_pod("shards")["spec"],
        ("--metadata",): rendered.ray_pod("gateway")["spec"],
    }
    for arguments, spec in pods.items():
        (fetching,) = spec["initContainers"]
        assert fetching["command"] == ["python", "-m", fetch.__name__]
        assert tuple(fetching["args"]) == arguments
        assert fetching["image"] == spec["containers"][0]["image"]
        for container in (fetching, spec["containers"][0]):
            assert environment(container)["HF_HOME"] == "/models"
            mount = {"name": "weights", "mountPath": "/models", "readOnly": False}
            assert mount in container["volumeMounts"]
            token = {"secretKeyRef": {"name": "hub", "key": "token"}}
            assert {"name": "HF_TOKEN", "valueFrom": token} in container["env"]
        assert {"name": "weights", "emptyDir": {"sizeLimit": "50Gi"}} in spec["volumes"]


def test_weights_in_the_container_image_need_no_volume() -> None:
    for _, template in render().pod_templates():
        assert all(volume["name"] != "weights" for volume in template["spec"]["volumes"])


def test_one_budget_covers_all_experts_so_that_nodes_are_drained_one_by_one() -> None:
    rendered = render(podDisruptionBudget={"expertsMaxUnavailable": 2})
    budgets = rendered.all("PodDisruptionBudget")
    assert set(budgets) == {"experts"}
    spec = budgets["experts"]["spec"]
    assert spec["maxUnavailable"] == 2
    for name, deployment in rendered.all("Deployment").items():
        labels = deployment["spec"]["template"]["metadata"]["labels"]
        is_covered = spec["selector"]["matchLabels"].items() <= labels.items()
        assert is_covered is name.startswith("experts-")
    assert render(podDisruptionBudget={"enabled": False}).all("PodDisruptionBudget") == {}


def test_images_come_from_the_named_registry_with_the_named_tag_and_secrets() -> None:
    rendered = render(
        image={"registry": "registry.example.com/team", "tag": "1.2", "pullSecrets": ["pull"]}
    )
    for name, template in rendered.pod_templates():
        image = template["spec"]["containers"][0]["image"]
        if name != f"{NAME}-redis":
            assert image.startswith("registry.example.com/team/expertfleet/")
            assert image.endswith(":1.2")
        assert template["spec"]["imagePullSecrets"] == [{"name": "pull"}]
