"""What every route works with."""

from __future__ import annotations

from dataclasses import dataclass

from services.core.generation import ShardClient
from services.core.registry import Registry
from services.core.settings import Settings
from services.gateway.auth import Authenticator
from services.gateway.console.feed import ConsoleFeed
from services.gateway.expert_load import LoadHistory
from services.gateway.intake import Intake
from services.gateway.metrics import GatewayMetrics
from services.gateway.resubmission import ResubmittingShards
from services.gateway.served_model import ServedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Gateway:
    """The parts of one gateway, put together by `create_app`.

    Requests go through `shards`, which is `shard` with a second chance; all else asks `shard`.
    """

    settings: Settings
    shard: ShardClient
    shards: ResubmittingShards
    registry: Registry | None
    model: ServedModel
    metrics: GatewayMetrics
    authenticate: Authenticator
    load_history: LoadHistory
    intake: Intake
    feed: ConsoleFeed
