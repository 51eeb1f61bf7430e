"""The exception tree, and how each error is told to an HTTP or a gRPC caller.

Every error carries a message that says what failed, the value seen and what to do. The conversion
to a status happens once, at the boundary, from the class attributes below. Instances survive
pickling (they cross Ray) with their message and details.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

EXIT_BAD_INPUT = 2
"""Exit status of a process whose settings, arguments or checkpoint cannot be used; starting it
again would not help."""

LossReason = Literal["died", "hung", "drained", "unreachable"]
"""A shard died with the request in its hands; handed it back in good order; never took it."""


class ExpertfleetError(Exception):
    """Base of all errors that expertfleet raises on purpose."""

    http_status: ClassVar[int] = 500
    grpc_status: ClassVar[str] = "INTERNAL"
    error_type: ClassVar[str] = "server_error"
    code: ClassVar[str] = "internal_error"

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.details = details

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.message, self.details)


def _rebuild(cls: type[ExpertfleetError], message: str, details: dict[str, Any]) -> Exception:
    return cls(message, **details)


class ConfigurationError(ExpertfleetError):
    """A setting or command-line value cannot be used. Details: `setting`."""

    code = "configuration_error"


class CheckpointError(ExpertfleetError):
    """A checkpoint cannot be served. Details: `file`, `tensor` where they are known."""

    grpc_status = "DATA_LOSS"
    code = "checkpoint_error"


class UnsupportedModelError(CheckpointError):
    """The checkpoint's architecture is none that the decoder serves."""

    code = "unsupported_model"


class InvalidRequestError(ExpertfleetError):
    """The caller's request is wrong. Details: `param`, the field at fault."""

    http_status = 400
    grpc_status = "INVALID_ARGUMENT"
    error_type = "invalid_request_error"
    code = "invalid_value"


class ContextLengthError(InvalidRequestError):
    """Prompt and completion together do not fit the model's context or the KV cache."""

    code = "context_length_exceeded"


class AuthenticationError(ExpertfleetError):
    """The API key is missing or wrong."""

    http_status = 401
    grpc_status = "UNAUTHENTICATED"
    error_type = "invalid_request_error"
    code = "invalid_api_key"


class NotFoundError(ExpertfleetError):
    """The model, session or route named does not exist."""

    http_status = 404
    grpc_status = "NOT_FOUND"
    error_type = "invalid_request_error"
    code = "not_found"


class RequestTooLargeError(ExpertfleetError):
    """The body is larger than the gateway accepts."""

    http_status = 413
    grpc_status = "RESOURCE_EXHAUSTED"
    error_type = "invalid_request_error"
    code = "request_too_large"


class OverloadedError(ExpertfleetError):
    """More work waits than is admitted. Details: `retry_after_s`."""

    http_status = 429
    grpc_status = "RESOURCE_EXHAUSTED"
    error_type = "rate_limit_error"
    code = "overloaded"


class UnavailableError(ExpertfleetError):
    """A part the request needs cannot be reached now; trying again later is right."""

    http_status = 503
    grpc_status = "UNAVAILABLE"
    code = "unavailable"


class PeerTlsError(UnavailableError):
    """A process of the fleet and this one do not come together for want of certificates, or for
    wrong ones."""

    code = "peer_tls"


class ExpertUnavailableError(UnavailableError):
    """No replica of an expert appeared within `expert_wait_s`. Details: `layer`, `expert`."""

    code = "expert_unavailable"


class MalformedFrameError(ExpertfleetError):
    """A dispatch frame breaks the wire contract. The stream that carried it lives on."""

    http_status = 502
    grpc_status = "INVALID_ARGUMENT"
    code = "malformed_frame"


class UnknownExpertError(MalformedFrameError):
    """A frame asks for a (layer, expert) slot the worker does not hold."""

    grpc_status = "NOT_FOUND"
    code = "unknown_expert"


class FrameTooLargeError(MalformedFrameError):
    """A frame is larger than the stated bound."""

    grpc_status = "RESOURCE_EXHAUSTED"
    code = "frame_too_large"


class DrainingError(UnavailableError):
    """The worker or shard is draining and takes no new work."""

    code = "draining"


class ShardLostError(UnavailableError):
    """The shard that had the request is gone or goes away; another one can take the request up.

    Details: `reason`, a `LossReason`, why the request has to go elsewhere.
    """

    code = "shard_lost"

    def __init__(self, message: str, *, reason: LossReason = "died", **details: Any) -> None:
        super().__init__(message, reason=reason, **details)
        self.reason: LossReason = reason


class WorkerMemoryError(ExpertfleetError):
    """A worker has no memory for the slots it was told to load."""

    http_status = 507
    grpc_status = "RESOURCE_EXHAUSTED"
    code = "worker_memory"


class WorkerRefusedError(ExpertfleetError):
    """A worker cannot load or unload slots as things are: it is loading or draining, or nothing
    would be left of what it holds."""

    http_status = 409
    grpc_status = "FAILED_PRECONDITION"
    code = "worker_refused"


class NonFiniteError(ExpertfleetError):
    """A computation gave NaN or infinity; the result was not used. Details: `layer`, `where`."""

    code = "non_finite"
