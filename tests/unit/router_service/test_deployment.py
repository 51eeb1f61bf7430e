"""What Ray Serve is told of gateway and shards, without starting Ray."""

from __future__ import annotations

from typing import Any

from router_service.deployment import Deployment, DeploymentPlan
from services.core.settings import Settings

PLAN = DeploymentPlan(
    gateway="module:factory", min_shards=2, max_shards=2, in_process_experts=False, num_gpus=2
)


def test_on_one_machine_replicas_get_the_launchers_settings_and_take_no_resource() -> None:
    settings = Settings(fleet="mine")
    deployment = Deployment(settings, PLAN)
    shards = _deployment(deployment._shards(surge=False))
    gateway = _deployment(deployment._gateway())
    assert shards.init_args == (settings, False)
    assert shards.num_replicas == 2
    assert shards.ray_actor_options["num_gpus"] == 1.0
    assert gateway.init_args == (settings, "module:factory", "shards-1")
    assert gateway.num_replicas == 1
    for each in (shards, gateway):
        assert not each.ray_actor_options.get("resources")


def test_a_shard_is_replaced_one_by_one_only_where_there_is_room_for_another() -> None:
    assert _surge(PLAN) == 0  # both cards are taken
    roomy = DeploymentPlan(
        gateway="", min_shards=2, max_shards=2, in_process_experts=False, num_gpus=3
    )
    assert _surge(roomy) == 1


def _surge(plan: DeploymentPlan) -> int:
    shards = _deployment(Deployment(Settings(), plan)._shards(surge=True))
    surge: int = shards._deployment_config.max_surge_percent
    return surge


def _deployment(target: Any) -> Any:
    return target.target._bound_deployment
