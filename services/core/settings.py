"""The only reader of the environment. Command-line flags override what is read here.

Every variable is `EXPERTFLEET_` + the field's name, save the few standard ones named in an alias.
A bad value fails at start with a `ConfigurationError` that names the variable.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, AliasChoices, Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from services.core.errors import ConfigurationError
from services.core.quantization.formats import WeightsSetting

DTypeName = Literal["auto", "bfloat16", "float16", "float32"]
WireDTypeName = Literal["auto", "bfloat16", "int8"]
DispatchTransportName = Literal["auto", "grpc", "lane"]

CheckpointKV = Literal["off", "sessions", "all"]
AbsolutePath = Annotated[Path, AfterValidator(Path.absolute)]
"""Means the same file to a child process with another working directory."""


class Settings(BaseSettings):
    """Settings shared by every process; each reads the ones it needs."""

    model_config = SettingsConfigDict(
        env_prefix="EXPERTFLEET_", extra="ignore", populate_by_name=True, frozen=True
    )

    # What is served
    model: str = Field("models/demo", description="folder of a checkpoint, or a hub id")
    served_model_name: str | None = Field(None, description="name in the API; default: from model")
    dtype: DTypeName = Field("auto", description="activation dtype; auto: as the checkpoint says")
    device: str = Field("auto", description="cpu, cuda, cuda:N or auto")
    expert_weights: WeightsSetting = Field(
        "auto", description="experts' weights in memory; auto: as they are stored"
    )
    shard_weights: WeightsSetting = Field(
        "auto", description="weights of attention and head in memory; auto: as they are stored"
    )
    max_model_len: int | None = Field(None, ge=1, description="longest prompt + completion, tokens")

    # Where things are
    fleet: str = Field("default", pattern=r"^[a-z0-9-]+$", description="namespace in the store")
    redis_url: str | None = Field(
        None, validation_alias=AliasChoices("EXPERTFLEET_REDIS_URL", "REDIS_URL")
    )
    workers: str = Field("", description="static list host:port,host:port; empty: the registry")
    state_dir: Path | None = Field(None, description="logs, local traces, sockets")
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    # Gateway
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    listen_socket: Path | None = Field(
        None, description="unix socket where the launcher hands out the gateway's listening socket"
    )
    api_keys: str = Field("", description="comma-separated bearer keys; empty: no authentication")
    admin_key: str | None = Field(
        None, description="bearer key of the administration under /admin; unset: it is off"
    )
    trace_url_template: str | None = Field(
        None,
        pattern=r"^https?://\S*\{trace_id\}\S*$",
        description="where the console links traces to, such as https://jaeger/trace/{trace_id}; "
        "unset: the gateway's own view of local traces",
    )
    max_body_bytes: int = Field(4 << 20, ge=1024)
    max_waiting_requests: int = Field(
        4096, ge=1, description="past so many requests without a first token a gateway answers 429"
    )
    max_waiting_bytes: int = Field(
        256 << 20, ge=1024, description="past so many bytes of these requests' bodies, likewise"
    )
    request_timeout_s: float = Field(3600.0, gt=0)
    shard_wait_s: float = Field(
        60.0,
        ge=0,
        description="how long a request waits for another shard when its own is lost; "
        "0: there is no other, fail at once",
    )

    # Attention and gating shard
    block_size: int = Field(16, ge=1, description="tokens in a KV block")
    kv_cache_bytes: int = Field(1 << 30, ge=1 << 16)
    max_num_seqs: int = Field(64, ge=1)
    max_num_batched_tokens: int = Field(512, ge=1, description="token budget of one step")
    max_waiting_tokens: int = Field(1 << 20, ge=1, description="past this, requests get 429")
    max_waiting_seqs: int = Field(4096, ge=1, description="past this, requests get 429")
    max_ttft_s: float = Field(
        60.0,
        ge=0,
        description="a request gets 429 when it is predicted to wait longer than this until its "
        "prompt's turn; 0: never for that",
    )
    num_micro_batches: Literal["auto"] | Annotated[int, Field(ge=1, le=8)] = Field(
        "auto", description="parts of a step in flight at once; auto: what measures fastest"
    )
    num_threads: int | None = Field(None, ge=1, description="torch threads of this process")
    shard_host: str = Field("127.0.0.1", description="address shards listen on for gateways")
    shard_advertised_host: str | None = Field(
        None, description="where gateways reach a shard; default: shard_host, or this host's name"
    )
    reproducible: bool | None = Field(
        None, description="answers that no other request can change; unset: where possible"
    )

    # Dispatch and experts
    expert_wait_s: float = Field(60.0, gt=0, description="how long a request waits for a replica")
    call_timeout_s: float = Field(30.0, gt=0, description="deadline of one dispatch frame")
    max_frame_bytes: int = Field(256 << 20, ge=1 << 16)
    wire_dtype: WireDTypeName = Field(
        "auto", description="dtype of rows sent to experts; auto: the activation dtype"
    )
    dispatch_transport: DispatchTransportName = Field(
        "auto", description="what a shard's frames travel over; auto: lanes where workers have them"
    )
    dispatch_lane: bool = Field(
        True, description="frames over bare TCP where both ends have the native library"
    )
    lane_port: int = Field(
        0, ge=0, le=65535, description="port of a worker's lanes; 0 takes a free one"
    )
    worker_memory_bytes: int | None = Field(
        None, ge=1, description="experts' weights per worker; unset: those at start + 90 % of free"
    )
    heartbeat_s: float = Field(1.0, gt=0)
    lease_s: float = Field(5.0, gt=0)
    drain_timeout_s: float = Field(10.0, gt=0)
    restart_drain_s: float = Field(
        300.0, gt=0, description="how long a rolling restart lets running requests finish"
    )
    hang_timeout_s: float = Field(
        15.0, gt=0, description="a worker that gives no sign of life for so long is started anew"
    )

    # Certificates: all three, and our gRPC connections are mTLS; none, and they are plain
    tls_cert_file: AbsolutePath | None = Field(None, description="PEM: certificate of a process")
    tls_key_file: AbsolutePath | None = Field(None, description="PEM: its key")
    tls_ca_file: AbsolutePath | None = Field(
        None, description="PEM: authority that certificates of the fleet are of"
    )

    # Sessions
    session_ttl_s: float = Field(7 * 86400.0, gt=0)
    checkpoint_kv: CheckpointKV = Field(
        "all",
        description="whose KV goes to the store as it is computed: off (nobody's), sessions, or "
        "all: of every running request, for another shard to go on with",
    )
    checkpoint_ttl_s: float = Field(
        3600.0, gt=0, description="how long a lost shard's checkpoints are kept"
    )
    session_queue_bytes: int = Field(256 << 20, ge=1 << 16, description="write-behind buffer")

    # Telemetry
    otlp_endpoint: str | None = Field(
        None,
        validation_alias=AliasChoices(
            "EXPERTFLEET_OTLP_ENDPOINT",
            "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
            "OTEL_EXPORTER_OTLP_ENDPOINT",
        ),
    )
    trace_sample_ratio: float = Field(1.0, ge=0, le=1, description="requests that are traced")
    step_sample_interval: int = Field(64, ge=1, description="one step in so many is traced whole")
    trace_file_max_bytes: int = Field(64 << 20, ge=1 << 16)
    metrics_host: str = Field("127.0.0.1", description="address of a shard's metrics")
    metrics_port: int = Field(
        0, ge=0, le=65535, description="port of a shard's metrics; 0 takes a free one"
    )

    def as_environment(self) -> dict[str, str]:
        """The variables that make a child process load these same settings."""
        values = self.model_dump(mode="json", exclude_none=True)
        return {f"EXPERTFLEET_{name.upper()}": str(value) for name, value in values.items()}

    def override(self, **values: Any) -> Settings:
        """A validated copy with the given fields replaced; None values are left as they are."""
        changed = {key: value for key, value in values.items() if value is not None}
        return _build(self.model_dump() | changed)


def load_settings(**overrides: Any) -> Settings:
    """Read the environment once. Raises `ConfigurationError` naming the variable at fault."""
    return _build({key: value for key, value in overrides.items() if value is not None})


def _build(values: dict[str, Any]) -> Settings:
    try:
        settings = Settings(**values)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else "settings"
        variable = name if name.isupper() else f"EXPERTFLEET_{name.upper()}"
        raise ConfigurationError(
            f"{variable}={first['input']!r} cannot be used: {first['msg']}", setting=name
        ) from error
    _check_tls(settings)
    return settings


def _check_tls(settings: Settings) -> None:
    names = ("tls_cert_file", "tls_key_file", "tls_ca_file")
    missing = [name for name in names if getattr(settings, name) is None]
    if missing and len(missing) < len(names):
        variable = f"EXPERTFLEET_{missing[0].upper()}"
        raise ConfigurationError(
            f"{variable} is missing: certificate, key and authority are given together",
            setting=missing[0],
        )
