from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DTYPE_UNSPECIFIED: _ClassVar[DType]
    DTYPE_FLOAT32: _ClassVar[DType]
    DTYPE_FLOAT16: _ClassVar[DType]
    DTYPE_BFLOAT16: _ClassVar[DType]
    DTYPE_INT8: _ClassVar[DType]

class DispatchStatus(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DISPATCH_STATUS_OK: _ClassVar[DispatchStatus]
    DISPATCH_STATUS_INVALID_FRAME: _ClassVar[DispatchStatus]
    DISPATCH_STATUS_UNKNOWN_EXPERT: _ClassVar[DispatchStatus]
    DISPATCH_STATUS_TOO_LARGE: _ClassVar[DispatchStatus]
    DISPATCH_STATUS_DRAINING: _ClassVar[DispatchStatus]
    DISPATCH_STATUS_INTERNAL: _ClassVar[DispatchStatus]

class WorkerState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WORKER_STATE_UNSPECIFIED: _ClassVar[WorkerState]
    WORKER_STATE_LOADING: _ClassVar[WorkerState]
    WORKER_STATE_READY: _ClassVar[WorkerState]
    WORKER_STATE_DRAINING: _ClassVar[WorkerState]
DTYPE_UNSPECIFIED: DType
DTYPE_FLOAT32: DType
DTYPE_FLOAT16: DType
DTYPE_BFLOAT16: DType
DTYPE_INT8: DType
DISPATCH_STATUS_OK: DispatchStatus
DISPATCH_STATUS_INVALID_FRAME: DispatchStatus
DISPATCH_STATUS_UNKNOWN_EXPERT: DispatchStatus
DISPATCH_STATUS_TOO_LARGE: DispatchStatus
DISPATCH_STATUS_DRAINING: DispatchStatus
DISPATCH_STATUS_INTERNAL: DispatchStatus
WORKER_STATE_UNSPECIFIED: WorkerState
WORKER_STATE_LOADING: WorkerState
WORKER_STATE_READY: WorkerState
WORKER_STATE_DRAINING: WorkerState

class DispatchRequest(_message.Message):
    __slots__ = ("hidden_states", "call_id", "layer", "dtype", "num_tokens", "hidden_size", "expert_ids", "rows_per_expert", "token_rows", "topk_weights", "combine", "traceparent", "scales", "answer_dtype")
    HIDDEN_STATES_FIELD_NUMBER: _ClassVar[int]
    CALL_ID_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    EXPERT_IDS_FIELD_NUMBER: _ClassVar[int]
    ROWS_PER_EXPERT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_ROWS_FIELD_NUMBER: _ClassVar[int]
    TOPK_WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    COMBINE_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    SCALES_FIELD_NUMBER: _ClassVar[int]
    ANSWER_DTYPE_FIELD_NUMBER: _ClassVar[int]
    hidden_states: bytes
    call_id: int
    layer: int
    dtype: DType
    num_tokens: int
    hidden_size: int
    expert_ids: _containers.RepeatedScalarFieldContainer[int]
    rows_per_expert: _containers.RepeatedScalarFieldContainer[int]
    token_rows: bytes
    topk_weights: bytes
    combine: bool
    traceparent: str
    scales: bytes
    answer_dtype: DType
    def __init__(self, hidden_states: _Optional[bytes] = ..., call_id: _Optional[int] = ..., layer: _Optional[int] = ..., dtype: _Optional[_Union[DType, str]] = ..., num_tokens: _Optional[int] = ..., hidden_size: _Optional[int] = ..., expert_ids: _Optional[_Iterable[int]] = ..., rows_per_expert: _Optional[_Iterable[int]] = ..., token_rows: _Optional[bytes] = ..., topk_weights: _Optional[bytes] = ..., combine: _Optional[bool] = ..., traceparent: _Optional[str] = ..., scales: _Optional[bytes] = ..., answer_dtype: _Optional[_Union[DType, str]] = ...) -> None: ...

class DispatchResponse(_message.Message):
    __slots__ = ("hidden_states", "call_id", "status", "error", "dtype", "num_rows", "queue_us", "compute_us")
    HIDDEN_STATES_FIELD_NUMBER: _ClassVar[int]
    CALL_ID_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    NUM_ROWS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_US_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_US_FIELD_NUMBER: _ClassVar[int]
    hidden_states: bytes
    call_id: int
    status: DispatchStatus
    error: str
    dtype: DType
    num_rows: int
    queue_us: int
    compute_us: int
    def __init__(self, hidden_states: _Optional[bytes] = ..., call_id: _Optional[int] = ..., status: _Optional[_Union[DispatchStatus, str]] = ..., error: _Optional[str] = ..., dtype: _Optional[_Union[DType, str]] = ..., num_rows: _Optional[int] = ..., queue_us: _Optional[int] = ..., compute_us: _Optional[int] = ...) -> None: ...

class DescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Slot(_message.Message):
    __slots__ = ("layer", "expert", "digest")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    EXPERT_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    layer: int
    expert: int
    digest: bytes
    def __init__(self, layer: _Optional[int] = ..., expert: _Optional[int] = ..., digest: _Optional[bytes] = ...) -> None: ...

class DescribeResponse(_message.Message):
    __slots__ = ("worker_id", "model", "version", "num_layers", "num_experts", "hidden_size", "intermediate_size", "dtype", "weight_format", "device", "state", "slots", "weight_bytes", "memory_free_bytes", "max_frame_bytes", "checkpoint_bytes_read", "lane_port", "slot_bytes", "memory_limit_bytes")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    NUM_EXPERTS_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    INTERMEDIATE_SIZE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FORMAT_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_BYTES_FIELD_NUMBER: _ClassVar[int]
    MEMORY_FREE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_FRAME_BYTES_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_BYTES_READ_FIELD_NUMBER: _ClassVar[int]
    LANE_PORT_FIELD_NUMBER: _ClassVar[int]
    SLOT_BYTES_FIELD_NUMBER: _ClassVar[int]
    MEMORY_LIMIT_BYTES_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    model: str
    version: str
    num_layers: int
    num_experts: int
    hidden_size: int
    intermediate_size: int
    dtype: DType
    weight_format: str
    device: str
    state: WorkerState
    slots: _containers.RepeatedCompositeFieldContainer[Slot]
    weight_bytes: int
    memory_free_bytes: int
    max_frame_bytes: int
    checkpoint_bytes_read: int
    lane_port: int
    slot_bytes: int
    memory_limit_bytes: int
    def __init__(self, worker_id: _Optional[str] = ..., model: _Optional[str] = ..., version: _Optional[str] = ..., num_layers: _Optional[int] = ..., num_experts: _Optional[int] = ..., hidden_size: _Optional[int] = ..., intermediate_size: _Optional[int] = ..., dtype: _Optional[_Union[DType, str]] = ..., weight_format: _Optional[str] = ..., device: _Optional[str] = ..., state: _Optional[_Union[WorkerState, str]] = ..., slots: _Optional[_Iterable[_Union[Slot, _Mapping]]] = ..., weight_bytes: _Optional[int] = ..., memory_free_bytes: _Optional[int] = ..., max_frame_bytes: _Optional[int] = ..., checkpoint_bytes_read: _Optional[int] = ..., lane_port: _Optional[int] = ..., slot_bytes: _Optional[int] = ..., memory_limit_bytes: _Optional[int] = ...) -> None: ...

class LoadSlotsRequest(_message.Message):
    __slots__ = ("slots",)
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    slots: _containers.RepeatedCompositeFieldContainer[Slot]
    def __init__(self, slots: _Optional[_Iterable[_Union[Slot, _Mapping]]] = ...) -> None: ...

class LoadSlotsResponse(_message.Message):
    __slots__ = ("slots", "memory_free_bytes")
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    MEMORY_FREE_BYTES_FIELD_NUMBER: _ClassVar[int]
    slots: _containers.RepeatedCompositeFieldContainer[Slot]
    memory_free_bytes: int
    def __init__(self, slots: _Optional[_Iterable[_Union[Slot, _Mapping]]] = ..., memory_free_bytes: _Optional[int] = ...) -> None: ...

class UnloadSlotsRequest(_message.Message):
    __slots__ = ("slots",)
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    slots: _containers.RepeatedCompositeFieldContainer[Slot]
    def __init__(self, slots: _Optional[_Iterable[_Union[Slot, _Mapping]]] = ...) -> None: ...

class UnloadSlotsResponse(_message.Message):
    __slots__ = ("slots", "memory_free_bytes")
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    MEMORY_FREE_BYTES_FIELD_NUMBER: _ClassVar[int]
    slots: _containers.RepeatedCompositeFieldContainer[Slot]
    memory_free_bytes: int
    def __init__(self, slots: _Optional[_Iterable[_Union[Slot, _Mapping]]] = ..., memory_free_bytes: _Optional[int] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
