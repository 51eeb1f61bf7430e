"""A worker process that is told to load and unload slots, and to end, while frames flow."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import grpc.aio
import psutil
import pytest
import torch
from grpc.aio import EOF  # type: ignore[attr-defined]
from safetensors.torch import load_file, save_file

from protos import experts_pb2
from services.core.checkpoints.checkpoint import Checkpoint
from services.core.describe import describe_worker
from services.core.errors import (
    CheckpointError,
    InvalidRequestError,
    UnavailableError,
    WorkerMemoryError,
    WorkerRefusedError,
)
from services.core.expert_ffn import Assignments, PackedExpert, moe_forward
from services.core.grpc_options import DISPATCH_METHOD, channel_options
from services.core.wire import ResponseFrame, decode_response, encode_request
from services.core.worker_control import drain_worker, load_slots, unload_slots
from tests.support.checkpoints import fresh_seed, make_checkpoint
from tests.support.eventually import eventually
from tests.support.frames import random_assignments
from tests.support.worker_process import WorkerProcess, running_worker

HIDDEN, INTERMEDIATE, NUM_LAYERS, NUM_EXPERTS = 512, 1536, 2, 4
SLOT_BYTES = 3 * HIDDEN * INTERMEDIATE * 4
"""9 MB: matrices of 3 MB, which go back to the system when they are freed."""
ALWAYS, EXTRA = 1, 3
"""The expert that the worker holds in every layer, and the one that comes and goes."""
EXTRA_SLOTS = frozenset((layer, EXTRA) for layer in range(NUM_LAYERS))
TIMEOUT_S = 60.0
DispatchCall = grpc.aio.StreamStreamCall[bytes, bytes]
Experts = list[dict[int, PackedExpert]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return make_checkpoint(folder, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE)


@pytest.fixture(scope="module")
def experts(model: Path) -> Experts:
    """`ALWAYS` and `EXTRA` of each layer, in this process."""
    checkpoint = Checkpoint.open(str(model))
    torch.set_num_threads(1)
    cpu = torch.device("cpu")
    return [
        {
            expert: PackedExpert(checkpoint.expert(layer, expert), dtype=torch.float32, device=cpu)
            for expert in (ALWAYS, EXTRA)
        }
        for layer in range(NUM_LAYERS)
    ]


@pytest.fixture(scope="module")
def worker(model: Path) -> Iterator[WorkerProcess]:
    with running_worker(model, str(ALWAYS)) as worker:
        yield worker


class Sender:
    """Asks one frame after the other and checks every answer."""

    def __init__(self, experts: Experts, endpoint: str) -> None:
        self._experts = experts
        self._endpoint = endpoint
        self._generator = torch.Generator().manual_seed(fresh_seed())
        self.num_answered = 0
        self.num_unknown = 0
        self.num_refused = 0

    async def run(self, expert_ids: tuple[int, ...], until: asyncio.Event) -> None:
        """Frames for `expert_ids` in every layer, until told, or the worker ends the stream."""
        async with open_stream(self._endpoint) as call:
            while not until.is_set() and await self.ask(call, expert_ids):
                pass

    async def answers(self, count: int) -> None:
        """Return when so many further frames are answered."""
        wanted = self.num_answered + count
        await eventually(lambda: self.num_answered >= wanted, timeout_s=TIMEOUT_S)

    async def ask(self, call: DispatchCall, expert_ids: tuple[int, ...]) -> bool:
        """False if the stream has ended with everything answered."""
        layer = self.num_answered % NUM_LAYERS
        rows = torch.randn(3, HIDDEN, generator=self._generator)
        assignments = random_assignments(self._generator, num_tokens=3, expert_ids=expert_ids)
        response = await exchange(call, layer, rows, assignments)
        if response is None or response.status == experts_pb2.DISPATCH_STATUS_DRAINING:
            self.num_refused += 1
            return False
        self.num_answered += 1
        if response.status == experts_pb2.DISPATCH_STATUS_UNKNOWN_EXPERT:
            self.num_unknown += 1
            return True
        assert response.status == experts_pb2.DISPATCH_STATUS_OK, response.error
        assert response.hidden_states is not None
        expected = moe_forward(self._experts[layer], rows, assignments, combine=True)
        assert torch.equal(response.hidden_states, expected)
        return True


@contextlib.asynccontextmanager
async def open_stream(endpoint: str) -> AsyncIterator[DispatchCall]:
    options = channel_options(1 << 28)
    async with grpc.aio.insecure_channel(endpoint, options=options) as channel:
        yield cast(Any, channel).stream_stream(DISPATCH_METHOD)()


async def exchange(
    call: DispatchCall, layer: int, rows: torch.Tensor, assignments: Assignments
) -> ResponseFrame | None:
    """None if the stream ended before the frame was taken."""
    frame = encode_request(
        call_id=7, layer=layer, hidden_states=rows, assignments=assignments, combine=True
    )
    try:
        await call.write(frame)
    except (asyncio.InvalidStateError, grpc.aio.AioRpcError):
        return None
    answer = await asyncio.wait_for(call.read(), TIMEOUT_S)
    return None if answer is EOF else decode_response(cast(bytes, answer))


async def describe(worker: WorkerProcess) -> experts_pb2.DescribeResponse:
    async with grpc.aio.insecure_channel(worker.endpoint) as channel:
        return await describe_worker(channel, timeout_s=TIMEOUT_S)


def digests_of(described: experts_pb2.DescribeResponse) -> Mapping[tuple[int, int], bytes]:
    return {(slot.layer, slot.expert): slot.digest for slot in described.slots}


def resident_bytes(worker: WorkerProcess) -> int:
    return int(psutil.Process(worker.process.pid).memory_info().rss)


def break_checkpoint(model: Path, folder: Path, not_finite: str, lacking: str) -> Path:
    """A copy of the model with a NaN in one tensor, and without another."""
    folder.mkdir()
    (folder / "config.json").write_text((model / "config.json").read_text())
    (file,) = model.glob("*.safetensors")
    tensors = load_file(file)
    tensors[not_finite][5, 3] = float("nan")
    del tensors[lacking]
    save_file(tensors, folder / file.name)
    return folder


async def test_no_frame_is_lost_and_no_memory_while_slots_come_and_go(
    worker: WorkerProcess, experts: Experts
) -> None:
    before = await describe(worker)
    steady = Sender(experts, worker.endpoint)
    mixed = Sender(experts, worker.endpoint)
    done = asyncio.Event()
    sending = asyncio.gather(steady.run((ALWAYS,), done), mixed.run((ALWAYS, EXTRA), done))
    resident = []
    for _ in range(20):
        held = await load_slots(worker.endpoint, EXTRA_SLOTS, timeout_s=TIMEOUT_S)
        assert held.slots >= EXTRA_SLOTS
        unknown = mixed.num_unknown
        await mixed.answers(2)
        assert mixed.num_unknown <= unknown + 1  # the one that was on its way
        held = await unload_slots(worker.endpoint, EXTRA_SLOTS, timeout_s=TIMEOUT_S)
        assert not held.slots & EXTRA_SLOTS
        resident.append(resident_bytes(worker))
        if sending.done():
            break
    done.set()
    await sending
    assert (steady.num_unknown, steady.num_refused) == (0, 0)
    assert steady.num_answered > 20
    assert 0 < mixed.num_unknown < mixed.num_answered
    # Some samples were taken before the last frame had let go of what was unloaded.
    assert min(resident[10:]) - min(resident[:10]) < SLOT_BYTES
    after = await describe(worker)
    assert digests_of(after) == digests_of(before)
    assert after.weight_bytes == before.weight_bytes == NUM_LAYERS * SLOT_BYTES
    assert after.memory_limit_bytes == before.memory_limit_bytes
    assert "Traceback" not in worker.log


async def test_a_slot_that_is_gone_is_told_as_unknown(
    worker: WorkerProcess, experts: Experts
) -> None:
    sender = Sender(experts, worker.endpoint)
    async with open_stream(worker.endpoint) as call:
        await load_slots(worker.endpoint, EXTRA_SLOTS, timeout_s=TIMEOUT_S)
        await sender.ask(call, (ALWAYS, EXTRA))
        assert sender.num_unknown == 0
        await unload_slots(worker.endpoint, EXTRA_SLOTS, timeout_s=TIMEOUT_S)
        await sender.ask(call, (ALWAYS, EXTRA))
        assert sender.num_unknown == 1


async def test_weights_are_in_memory_only_while_they_are_held(worker: WorkerProcess) -> None:
    others = {(layer, expert) for layer in range(NUM_LAYERS) for expert in (0, 2, 3)}
    before = resident_bytes(worker)
    await load_slots(worker.endpoint, others, timeout_s=TIMEOUT_S)
    loaded = resident_bytes(worker)
    assert loaded - before > 0.9 * len(others) * SLOT_BYTES
    described = await describe(worker)
    assert described.slot_bytes == SLOT_BYTES
    assert described.weight_bytes == NUM_LAYERS * NUM_EXPERTS * SLOT_BYTES
    await unload_slots(worker.endpoint, others, timeout_s=TIMEOUT_S)

    async def is_released() -> bool:
        return loaded - resident_bytes(worker) > 0.9 * len(others) * SLOT_BYTES

    await eventually(is_released, timeout_s=TIMEOUT_S)


async def test_a_slot_loaded_later_can_stand_in_for_one_loaded_at_start(
    model: Path, worker: WorkerProcess
) -> None:
    with running_worker(model, None, "--slots", f"0-1:{EXTRA};1:0") as other:
        at_start = digests_of(await describe(other))
    assert set(at_start) == EXTRA_SLOTS | {(1, 0)}
    await load_slots(worker.endpoint, EXTRA_SLOTS, timeout_s=TIMEOUT_S)
    again = await load_slots(worker.endpoint, EXTRA_SLOTS, timeout_s=TIMEOUT_S)
    assert again.slots >= EXTRA_SLOTS
    later = digests_of(await describe(worker))
    assert {slot: later[slot] for slot in EXTRA_SLOTS} == {
        slot: at_start[slot] for slot in EXTRA_SLOTS
    }
    await unload_slots(worker.endpoint, EXTRA_SLOTS, timeout_s=TIMEOUT_S)


async def test_what_cannot_be_done_is_refused_and_changes_nothing(worker: WorkerProcess) -> None:
    endpoint = worker.endpoint
    before = digests_of(await describe(worker))
    with pytest.raises(InvalidRequestError, match=r"\(2, 0\).*layers 0 to 1 and experts 0 to 3"):
        await load_slots(endpoint, {(0, 0), (2, 0)}, timeout_s=TIMEOUT_S)
    with pytest.raises(InvalidRequestError, match=r"\(0, 4\)"):
        await unload_slots(endpoint, {(0, 4)}, timeout_s=TIMEOUT_S)
    with pytest.raises(WorkerRefusedError, match="all that this worker holds"):
        await unload_slots(endpoint, before, timeout_s=TIMEOUT_S)
    held = await unload_slots(endpoint, {(0, 0)}, timeout_s=TIMEOUT_S)
    assert held.slots == set(before)
    assert digests_of(await describe(worker)) == before


async def test_slots_beyond_the_limit_are_refused_with_bytes_wanted_and_left(model: Path) -> None:
    limit = 3 * SLOT_BYTES + 100
    environment = {"EXPERTFLEET_WORKER_MEMORY_BYTES": str(limit)}
    with running_worker(model, str(ALWAYS), environment=environment) as worker:
        endpoint = worker.endpoint
        with pytest.raises(WorkerMemoryError) as raised:
            await load_slots(endpoint, EXTRA_SLOTS, timeout_s=TIMEOUT_S)
        assert f"take {2 * SLOT_BYTES} bytes" in raised.value.message
        assert f"{SLOT_BYTES + 100} are left" in raised.value.message
        held = await load_slots(endpoint, {(0, EXTRA)}, timeout_s=TIMEOUT_S)
        assert held.memory_free_bytes == 100
        assert len(held.slots) == NUM_LAYERS + 1


async def test_a_broken_tensor_is_named_and_the_worker_serves_on(
    tmp_path: Path, experts: Experts, model: Path
) -> None:
    name = f"model.layers.1.block_sparse_moe.experts.{EXTRA}.w2.weight"
    lacking = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    broken = break_checkpoint(model, tmp_path / "model", name, lacking)
    with running_worker(broken, str(ALWAYS)) as worker:
        with pytest.raises(CheckpointError, match=name) as raised:
            await load_slots(worker.endpoint, EXTRA_SLOTS, timeout_s=TIMEOUT_S)
        assert ".safetensors" in raised.value.message
        with pytest.raises(CheckpointError, match=lacking):
            await load_slots(worker.endpoint, {(0, 0)}, timeout_s=TIMEOUT_S)
        described = await describe(worker)
        assert set(digests_of(described)) == {(0, ALWAYS), (1, ALWAYS)}
        assert described.state == experts_pb2.WORKER_STATE_READY
        await load_slots(worker.endpoint, {(0, EXTRA)}, timeout_s=TIMEOUT_S)
        sender = Sender(experts, worker.endpoint)
        async with open_stream(worker.endpoint) as call:
            await sender.ask(call, (ALWAYS, EXTRA))
        assert (sender.num_answered, sender.num_unknown) == (1, 0)


async def test_drain_under_load_answers_everything_and_ends_the_worker(
    model: Path, experts: Experts
) -> None:
    with running_worker(model, str(ALWAYS)) as worker:
        senders = [Sender(experts, worker.endpoint) for _ in range(3)]
        never = asyncio.Event()
        sending = asyncio.gather(*(sender.run((ALWAYS,), never) for sender in senders))
        await asyncio.gather(*(sender.answers(5) for sender in senders))
        loading = asyncio.create_task(load_slots(worker.endpoint, EXTRA_SLOTS, timeout_s=TIMEOUT_S))
        await drain_worker(worker.endpoint, timeout_s=TIMEOUT_S)
        await sending
        # Done just before, or given up, or come too late to be heard.
        with contextlib.suppress(WorkerRefusedError, UnavailableError):
            await loading
        assert await asyncio.to_thread(worker.wait) == 0
        assert all(sender.num_refused == 1 for sender in senders)
        assert "Traceback" not in worker.log, worker.log
        with pytest.raises(UnavailableError):
            await drain_worker(worker.endpoint, timeout_s=5.0)
