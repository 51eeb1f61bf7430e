"""Which transport a shard dispatches over, by its setting."""

from __future__ import annotations

from router_service.dispatch.lane_transport import LaneTransport
from router_service.dispatch.transport import ExpertTransport
from router_service.dispatch.worker_link import GrpcTransport
from services.core.errors import ConfigurationError
from services.core.kernels.library import native_library
from services.core.settings import DispatchTransportName
from services.core.tls import PeerTls


def chosen_transport(
    name: DispatchTransportName, *, max_frame_bytes: int, tls: PeerTls | None = None
) -> ExpertTransport:
    """auto: lanes to workers that offer them, if the native library was built here. With `tls`
    never, for lanes are plain TCP.

    Raises `ConfigurationError` where lanes are asked for and cannot be.
    """
    grpc = GrpcTransport(max_frame_bytes=max_frame_bytes, tls=tls)
    if tls is not None:
        if name == "lane":
            raise ConfigurationError(
                "EXPERTFLEET_DISPATCH_TRANSPORT=lane is plain TCP and cannot be had together with "
                "certificates (EXPERTFLEET_TLS_*); use auto",
                setting="dispatch_transport",
            )
        return grpc
    library = native_library()
    if name == "grpc" or (name == "auto" and library is None):
        return grpc
    if library is None:
        raise ConfigurationError(
            "EXPERTFLEET_DISPATCH_TRANSPORT=lane needs the native library; build it with "
            "`python -m services.core.kernels.build`, or use auto",
            setting="dispatch_transport",
        )
    return LaneTransport(grpc, library, max_frame_bytes=max_frame_bytes, is_required=name == "lane")
