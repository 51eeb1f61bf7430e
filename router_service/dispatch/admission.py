"""Whether a worker computes the model this shard serves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from protos import experts_pb2
from router_service.dispatch.dispatch_plan import frame_bytes
from services.core.errors import ConfigurationError
from services.core.model_config import ModelConfig
from services.core.registry import Slot, WorkerRecord
from services.core.tensor_codec import DTYPE_TO_PROTO


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionRules:
    """What every worker must agree with."""

    num_layers: int
    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    dtype: torch.dtype

    @staticmethod
    def of(config: ModelConfig, dtype: torch.dtype) -> AdmissionRules:
        return AdmissionRules(
            num_layers=config.num_hidden_layers,
            num_experts=config.num_local_experts,
            top_k=config.num_experts_per_tok,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            dtype=dtype,
        )

    def check(
        self,
        record: WorkerRecord,
        description: experts_pb2.DescribeResponse,
        digests: Mapping[Slot, bytes],
    ) -> None:
        """Raise `ConfigurationError` saying what a worker differs in.

        `digests` are those of the slots seen so far; replicas of a slot must have the same.
        """
        name = f"worker {record.worker_id} at {record.endpoint} is not used: "
        if description.worker_id != record.worker_id:
            raise ConfigurationError(
                f"{name}worker {description.worker_id} answers at that address; "
                "remove the stale entry or wait for its lease to end"
            )
        for what, expected in self._expected().items():
            seen = getattr(description, what)
            if seen != expected:
                raise ConfigurationError(
                    f"{name}its {what} is {_shown(what, seen)}, this model's is "
                    f"{_shown(what, expected)}; start both with the same model and dtype"
                )
        one_token = frame_bytes(
            1, top_k=self.top_k, row_bytes=self.hidden_size * self.dtype.itemsize
        )
        if description.max_frame_bytes < one_token:
            raise ConfigurationError(
                f"{name}its max_frame_bytes {description.max_frame_bytes} does not take one token; "
                f"set EXPERTFLEET_MAX_FRAME_BYTES to {one_token} or more"
            )
        self._check_slots(name, description, digests)

    def _check_slots(
        self,
        name: str,
        description: experts_pb2.DescribeResponse,
        digests: Mapping[Slot, bytes],
    ) -> None:
        for slot in description.slots:
            where = f"layer {slot.layer}, expert {slot.expert}"
            if slot.layer >= self.num_layers or slot.expert >= self.num_experts:
                raise ConfigurationError(f"{name}it holds {where}, which the model does not have")
            if digests.get((slot.layer, slot.expert), slot.digest) != slot.digest:
                raise ConfigurationError(
                    f"{name}its weights of {where} differ from those seen before; load the same "
                    "checkpoint in the same format, or restart this shard to serve the new one"
                )

    def _expected(self) -> dict[str, int]:
        return {
            "num_layers": self.num_layers,
            "num_experts": self.num_experts,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "dtype": DTYPE_TO_PROTO[self.dtype],
        }


def _shown(what: str, value: int) -> str:
    return experts_pb2.DType.Name(value) if what == "dtype" else str(value)
