"""How every gRPC channel and server of the dispatch wire is set up, in one place."""

from __future__ import annotations

SERVICE_NAME = "expertfleet.v1.ExpertService"
DISPATCH_METHOD = f"/{SERVICE_NAME}/Dispatch"
DESCRIBE_METHOD = f"/{SERVICE_NAME}/Describe"
LOAD_SLOTS_METHOD = f"/{SERVICE_NAME}/LoadSlots"
UNLOAD_SLOTS_METHOD = f"/{SERVICE_NAME}/UnloadSlots"
DRAIN_METHOD = f"/{SERVICE_NAME}/Drain"

GRPC_ENVIRONMENT = {
    # gRPC's older poller. With its event engine every message passes through one more thread on
    # either side: twice the context switches (python -m benchmarks.dispatch). Read by gRPC when
    # it is imported, so it must be in the environment of a process before it starts.
    "GRPC_EXPERIMENTS": "-event_engine_client,-event_engine_listener",
}
"""For processes that send or serve frames."""

_INT32_MAX = 2**31 - 1
_CLIENT_PING_INTERVAL_MS = 1_000
_CLIENT_PING_TIMEOUT_MS = 2_000
_SERVER_PING_INTERVAL_MS = 5_000
_MIN_PING_INTERVAL_MS = 500
_SHARD_PING_INTERVAL_MS = 2_000
_MAX_SHARD_MESSAGE_BYTES = 64 << 20

GrpcOptions = list[tuple[str, int]]


def channel_options(max_frame_bytes: int) -> GrpcOptions:
    """Options of a client channel.

    Our own bound on frames is checked by the codec and answered with a status. The transport's
    bound is twice that: it only protects the process's memory, and breaks the stream. Pings find
    a half-open connection or a hung process within three seconds (with them gRPC also sets
    TCP_USER_TIMEOUT); the back-off is short so that a restarted worker is found at once.
    """
    return [
        *_shared_options(max_frame_bytes),
        ("grpc.keepalive_time_ms", _CLIENT_PING_INTERVAL_MS),
        ("grpc.keepalive_timeout_ms", _CLIENT_PING_TIMEOUT_MS),
        ("grpc.http2.ping_timeout_ms", _CLIENT_PING_TIMEOUT_MS),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 500),
        ("grpc.max_reconnect_backoff_ms", 1000),
        ("grpc.enable_http_proxy", 0),
    ]


def server_options(max_frame_bytes: int) -> GrpcOptions:
    """Options of a worker's server. A port in use is an error, never shared silently.

    A client that is gone without a word is found by pings, and the memory of its streams freed.
    Clients may themselves ping every `_MIN_PING_INTERVAL_MS`, also while they have no call; one
    that pings more often is not thrown out for it.
    """
    return [
        *_shared_options(max_frame_bytes),
        ("grpc.so_reuseport", 0),
        ("grpc.keepalive_time_ms", _SERVER_PING_INTERVAL_MS),
        ("grpc.keepalive_timeout_ms", _SERVER_PING_INTERVAL_MS),
        ("grpc.http2.ping_timeout_ms", _SERVER_PING_INTERVAL_MS),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", _MIN_PING_INTERVAL_MS),
        ("grpc.http2.max_ping_strikes", 0),
    ]


def shard_options() -> GrpcOptions:
    """Options of both ends between gateway and shard: a prompt may be long, a step's tokens few.

    A shard may be busy for seconds, so a ping has long to be answered.
    """
    return [
        ("grpc.max_send_message_length", -1),
        ("grpc.max_receive_message_length", _MAX_SHARD_MESSAGE_BYTES),
        ("grpc.keepalive_time_ms", _SHARD_PING_INTERVAL_MS),
        ("grpc.keepalive_timeout_ms", 4 * _SHARD_PING_INTERVAL_MS),
        ("grpc.http2.ping_timeout_ms", 4 * _SHARD_PING_INTERVAL_MS),
        ("grpc.http2.min_ping_interval_without_data_ms", _SHARD_PING_INTERVAL_MS // 2),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.max_ping_strikes", 0),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 500),
        ("grpc.max_reconnect_backoff_ms", 1000),
        ("grpc.enable_http_proxy", 0),
    ]


def _shared_options(max_frame_bytes: int) -> GrpcOptions:
    return [
        ("grpc.max_send_message_length", -1),
        ("grpc.max_receive_message_length", min(2 * max_frame_bytes, _INT32_MAX)),
    ]
