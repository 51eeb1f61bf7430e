"""The sizes in the values files are those of `expertfleet plan`."""

from __future__ import annotations

import json
import math
import re
import shlex
from typing import Any

import pytest
from typer.testing import CliRunner

from services.cli.main import app
from services.core.planning.gpus import GPUS
from services.core.planning.model_sizes import PUBLISHED_MODELS, ModelSizes
from services.core.planning.pods import RESERVED_BYTES, fit_expert_pods
from services.core.planning.weight_formats import weight_format
from services.core.registry_json import parse_ranges
from tests.support.chart import CHART, environment, helm, render

assert helm
SIZED = ("values-mixtral-8x22b.yaml", "values-mixtral-8x7b.yaml", "values-24gb-cards.yaml")


def planned(file: str) -> dict[str, Any]:
    """What the command prints that the file's head names."""
    head = (CHART / file).read_text().partition("\nmodel:")[0]
    command = re.search(r"expertfleet (plan .*)", head)
    assert command is not None
    result = CliRunner().invoke(app, [*shlex.split(command[1]), "--json"])
    assert result.exit_code == 0, result.output
    plan: dict[str, Any] = json.loads(result.output)
    return plan


def gibibytes(num_bytes: float) -> str:
    return f"{math.ceil(num_bytes / 2**30)}Gi"


@pytest.mark.parametrize("file", SIZED)
def test_shards_have_the_planned_number_and_memory(file: str) -> None:
    plan = planned(file)["plans"][0]
    rendered = render(file)
    service = rendered.one("RayService")
    group = service["spec"]["rayClusterConfig"]["workerGroupSpecs"][1]
    assert group["groupName"] == "shards"
    assert group["replicas"] == plan["num_shards"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == 1
    assert limits["memory"] == gibibytes(plan["shard"]["weight_bytes"] + RESERVED_BYTES)
    settings = rendered.settings()
    assert settings["EXPERTFLEET_KV_CACHE_BYTES"] == str(int(plan["shard"]["kv_pool_bytes"]))
    assert settings["EXPERTFLEET_MAX_NUM_SEQS"] == str(plan["shard"]["max_streams"])


@pytest.mark.parametrize("file", SIZED[:2])
def test_expert_pods_have_the_planned_number_gpus_and_memory(file: str) -> None:
    plan = planned(file)
    pods = plan["plans"][0]["pods"]
    deployments = render(file).all("Deployment")
    experts = {name: each for name, each in deployments.items() if name.startswith("experts-")}
    assert len(experts) == pods["num_groups"] * pods["pods_per_group"]
    num_cards = 0
    for deployment in experts.values():
        container = deployment["spec"]["template"]["spec"]["containers"][0]
        resources = container["resources"]
        assert deployment["spec"]["replicas"] == plan["plans"][0]["replicas"]
        assert resources["limits"]["nvidia.com/gpu"] == 1
        memory = gibibytes(pods["pod_bytes"] + RESERVED_BYTES)
        assert resources["requests"]["memory"] == resources["limits"]["memory"] == memory
        limit = int(plan["gpu"]["memory_bytes"] - RESERVED_BYTES)
        assert environment(container)["EXPERTFLEET_WORKER_MEMORY_BYTES"] == str(limit)
        num_cards += deployment["spec"]["replicas"]
    assert num_cards + plan["plans"][0]["num_shards"] == plan["plans"][0]["num_cards"]


def test_mixed_24_gb_cards_hold_what_is_put_on_them() -> None:
    deployments = render("values-24gb-cards.yaml").all("Deployment")
    experts = {name: each for name, each in deployments.items() if name.startswith("experts-")}
    assert len(experts) == 7
    kinds = set()
    for deployment in experts.values():
        pod = deployment["spec"]["template"]["spec"]
        arguments = dict(argument[2:].split("=") for argument in pod["containers"][0]["args"])
        weights = arguments["expert-weights"].replace("auto", "bf16")
        config = PUBLISHED_MODELS["mixtral-8x7b"]
        sizes = ModelSizes(config=config, weights=weight_format(weights))
        card = GPUS["l4" if "L4" in str(pod["nodeSelector"]) else "rtx-3090"]
        count = len(parse_ranges(arguments["experts"]))
        pods = fit_expert_pods(sizes, card.memory_bytes, experts_per_group=count)
        assert pods.pods_per_group == 1
        memory = pod["containers"][0]["resources"]["limits"]["memory"]
        assert memory == gibibytes(pods.pod_bytes + RESERVED_BYTES)
        kinds.add((weights, card.name))
    assert kinds == {("bf16", "l4"), ("int4", "rtx-3090")}
