"""The console's parts, put together for one gateway."""

from __future__ import annotations

import os
import socket

from services.core.registry import Registry
from services.core.settings import Settings
from services.gateway.console.activity import LONG_WINDOW_S, Activity
from services.gateway.console.feed import ConsoleFeed, CountSessions
from services.gateway.console.fleet_state import FleetState
from services.gateway.console.view import ViewBuilder
from services.gateway.intake import Intake
from services.gateway.served_model import ServedModel

_MISSED_HEARTBEATS = 3
"""A lease that missed so many is overdue."""


def console_feed(
    settings: Settings,
    registry: Registry | None,
    model: ServedModel,
    activity: Activity,
    intake: Intake,
    count_sessions: CountSessions,
) -> ConsoleFeed:
    fleet = FleetState(
        overdue_s=min(_MISSED_HEARTBEATS * settings.heartbeat_s, settings.lease_s),
        long_s=LONG_WINDOW_S,
        has_store=registry is not None,
    )
    builder = ViewBuilder(
        model_name=model.name,
        config=model.config,
        gateway=f"{socket.gethostname()}/{os.getpid()}",
        has_admin=bool(settings.admin_key),
        trace_url=settings.trace_url_template,
    )
    return ConsoleFeed(registry, fleet, activity, intake, builder, count_sessions=count_sessions)
