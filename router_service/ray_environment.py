"""What Ray must find in its environment before it is imported. Measured in docs/performance.md."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from pathlib import Path


def ray_environment(ray_dir: Path, *, token: str) -> Mapping[str, str]:
    """Variables for the process that starts Ray; its files stay under `ray_dir`.

    `token` is the cluster's shared secret; without it Ray would write one into the user's home.
    """
    return {
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
        # The gateway's replica listens itself (docs/adr/0004).
        "RAY_SERVE_ENABLE_DIRECT_INGRESS": "0",
        # Ray starts workers at niceness 15 otherwise.
        "RAY_worker_niceness": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "2",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_TMPDIR": str(ray_dir),
        # Leave CUDA_VISIBLE_DEVICES alone for actors that ask for no GPU.
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        # Despite its name: without clusters, Ray's own ports are on the loopback address alone.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    }


def new_ray_token() -> str:
    return secrets.token_hex(32)
