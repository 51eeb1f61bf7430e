"""The worker's gRPC server: Dispatch, Describe, control, standard health and reflection."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from expert_service.control_calls import WorkerControl
from expert_service.dispatch import DispatchService
from protos import experts_pb2
from services.core.errors import ConfigurationError
from services.core.grpc_options import SERVICE_NAME, server_options
from services.core.tls import PeerTls, bind_port

Describe = Callable[
    [experts_pb2.DescribeRequest, grpc.aio.ServicerContext[object, object]],
    Awaitable[experts_pb2.DescribeResponse],
]


class WorkerServer:
    """Answers health from `start` on: NOT_SERVING until `set_serving(True)`.

    Without `control`, what the worker holds cannot be changed.
    """

    def __init__(
        self,
        *,
        dispatch: DispatchService,
        describe: Describe,
        control: WorkerControl | None = None,
        max_frame_bytes: int,
        tls: PeerTls | None = None,
    ) -> None:
        self._tls = tls
        self._server = grpc.aio.server(options=server_options(max_frame_bytes))
        self._server.add_generic_rpc_handlers((_handlers(dispatch, describe, control),))
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)

    async def start(self, host: str, port: int) -> int:
        """Listen; 0 takes a free port. Returns the port; raises `ConfigurationError` if in use."""
        await self.set_serving(False)
        try:
            bound_port = bind_port(self._server, join_host_port(host, port), self._tls)
        except RuntimeError as error:
            raise ConfigurationError(
                f"the worker cannot listen on {host}:{port} ({error}); choose another port",
                setting="port",
            ) from error
        await self._server.start()
        return bound_port

    async def set_serving(self, is_serving: bool) -> None:
        status = health_pb2.HealthCheckResponse
        for name in ("", SERVICE_NAME):
            await self._health.set(name, status.SERVING if is_serving else status.NOT_SERVING)

    async def stop(self, grace_s: float) -> None:
        """Take no new calls; those that have not ended after `grace_s` are cancelled."""
        await self._server.stop(grace_s)


def join_host_port(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _handlers(
    dispatch: DispatchService, describe: Describe, control: WorkerControl | None
) -> grpc.GenericRpcHandler[Any, Any]:
    """Dispatch carries raw bytes: frames are coded by hand (services/core/wire.py)."""
    return grpc.method_handlers_generic_handler(
        SERVICE_NAME,
        {
            "Dispatch": grpc.stream_stream_rpc_method_handler(dispatch.dispatch),
            "Describe": grpc.unary_unary_rpc_method_handler(
                describe,
                request_deserializer=experts_pb2.DescribeRequest.FromString,
                response_serializer=experts_pb2.DescribeResponse.SerializeToString,
            ),
            **(control.handlers() if control else {}),
        },
    )
