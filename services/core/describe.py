"""The Describe call, for those who ask a worker what it holds."""

from __future__ import annotations

import grpc.aio

from protos import experts_pb2
from services.core.grpc_options import DESCRIBE_METHOD


async def describe_worker(
    channel: grpc.aio.Channel, *, timeout_s: float, wait_for_ready: bool = False
) -> experts_pb2.DescribeResponse:
    """Raises `grpc.aio.AioRpcError`; with `wait_for_ready` it waits for a connection first."""
    call = channel.unary_unary(
        DESCRIBE_METHOD,
        request_serializer=experts_pb2.DescribeRequest.SerializeToString,
        response_deserializer=experts_pb2.DescribeResponse.FromString,
    )
    response: experts_pb2.DescribeResponse = await call(
        experts_pb2.DescribeRequest(), timeout=timeout_s, wait_for_ready=wait_for_ready
    )
    return response
