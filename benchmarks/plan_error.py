"""How well `expertfleet plan`'s model predicts decode steps on this machine.

    python -m benchmarks.plan_error [--model bench-xs] [--layers 4] [--workers 0,1,2,4]
        [--batches 1,8,32] [--delays-ms 0,1,5] [--hardware FILE]

Calibrates (unless a file is given), then decodes with a random model: experts in process (0
workers) and on worker processes, with a proxy that delays every byte between shard and workers.
The delay given to the model is the proxy's own, measured by a TCP echo through it. Both sides use
the same statistic of a step, see `services/cli/calibration/timing.py`. Prints prediction,
measurement and error of each row, the median and the largest error, and the constants behind them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import multiprocessing
import os
import random
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from benchmarks.delay_proxy import DelayedNetwork
from benchmarks.machine import ForeignLoad, describe_machine
from benchmarks.random_checkpoint import write_named_checkpoint
from benchmarks.side import running_workers
from benchmarks.termination import unwind_on_sigterm
from benchmarks.workers import lanes_of
from services.cli.calibration.run import calibrate
from services.cli.calibration.timing import typical_s
from services.core.model_config import ModelConfig, load_model_config
from services.core.planning.calibration import (
    Calibration,
    loopback,
    read_calibration,
    worker_layout,
)
from services.core.planning.model_sizes import ModelSizes
from services.core.planning.routing import Routing
from services.core.planning.step_model import Batch, StepModel

PROMPT_TOKENS = 16
NEW_TOKENS = 56
ECHOES = 40
ECHO_BYTES = 4096
WANTED_ERROR = 0.15


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    num_workers: int
    batch: int
    delay_s: float
    predicted_s: float
    measured_s: float
    foreign_load: float

    @property
    def error(self) -> float:
        return self.predicted_s / self.measured_s - 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="bench-xs", help="bench-s or bench-xs")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--workers", default="0,1,2,4", help="0: in process")
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--delays-ms", default="0,1,5", help="one way")
    parser.add_argument("--hardware", type=Path, help="a calibration; default: measured now")
    arguments = parser.parse_args()
    unwind_on_sigterm()
    batches = [int(count) for count in arguments.batches.split(",")]
    delays = [float(delay) / 1e3 for delay in arguments.delays_ms.split(",")]
    print(f"{describe_machine()}\n{arguments.model}, {arguments.layers} layers, bf16\n")
    calibration = _calibration(arguments.hardware)
    rows: list[Row] = []
    print("| workers | batch | delay ms | predicted ms | measured ms | error | foreign CPU |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="expertfleet-bench-") as scratch:
        folder = write_named_checkpoint(
            arguments.model, Path(scratch) / arguments.model, num_layers=arguments.layers
        )
        for num_workers in (int(count) for count in arguments.workers.split(",")):
            for row in _rows(folder, calibration, num_workers, batches, delays):
                rows.append(row)
                print(_line(row), flush=True)
    errors = [abs(row.error) for row in rows]
    print(
        f"\nmedian error {statistics.median(errors):.1%}, largest {max(errors):.1%}; "
        f"{sum(error < WANTED_ERROR for error in errors)} of {len(errors)} rows are within "
        f"{WANTED_ERROR:.0%}\n\n{calibration.to_json()}"
    )


def _calibration(path: Path | None) -> Calibration:
    if path is not None:
        return read_calibration(path)
    return calibrate(
        num_cores=len(os.sched_getaffinity(0)), say=lambda text: print(text, file=sys.stderr)
    )


def _rows(
    folder: Path,
    calibration: Calibration,
    num_workers: int,
    batches: Sequence[int],
    delays: Sequence[float],
) -> Iterator[Row]:
    config = load_model_config(folder)
    if num_workers == 0:
        yield from _side(folder, config, calibration, 0, "", batches, 0.0)
        return
    with running_workers(str(folder), "bfloat16", num_workers) as endpoints:
        for delay_s in delays:
            if not delay_s:
                yield from _side(folder, config, calibration, num_workers, endpoints, batches, 0.0)
                continue
            with contextlib.closing(DelayedNetwork(endpoints, lanes_of(endpoints))) as network:
                network.set_delay(delay_s)
                yield from _side(
                    folder,
                    config,
                    calibration,
                    num_workers,
                    network.endpoints,
                    batches,
                    _measured_delay_s(delay_s),
                )


def _side(
    folder: Path,
    config: ModelConfig,
    calibration: Calibration,
    num_workers: int,
    endpoints: str,
    batches: Sequence[int],
    delay_s: float,
) -> Iterator[Row]:
    routing = Routing(config.num_local_experts, config.num_experts_per_tok)
    model = StepModel(
        ModelSizes(config=config),
        calibration.machine_for(num_workers),
        loopback(delay_s),
        routing,
    )
    layout = worker_layout(config, num_workers)
    cores = calibration.num_cores
    # A process of its own, as a shard has; threads of an earlier one would slow it down.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        measured = pool.submit(
            _measure_steps, str(folder), endpoints, cores, tuple(batches), config.vocab_size
        ).result()
    for batch, (step_s, foreign_load) in zip(batches, measured, strict=True):
        tokens = Batch(num_tokens=batch, context=PROMPT_TOKENS + NEW_TOKENS / 2)
        yield Row(
            num_workers=num_workers,
            batch=batch,
            delay_s=delay_s,
            predicted_s=model.step(tokens, layout).step_s,
            measured_s=step_s,
            foreign_load=foreign_load,
        )


def _measure_steps(
    model: str, endpoints: str, num_threads: int, batches: tuple[int, ...], vocab_size: int
) -> list[tuple[float, float]]:
    """Seconds of a decode step and foreign CPU for each batch, one micro-batch in flight."""
    from router_service.shard import AttentionShard
    from services.core.settings import load_settings

    settings = load_settings(
        model=model,
        dtype="bfloat16",
        device="cpu",
        workers=endpoints,
        num_threads=num_threads,
        num_micro_batches=1,
        kv_cache_bytes=256 << 20,
    )
    shard = AttentionShard.start(settings, in_process_experts=not endpoints)
    measured = []
    try:
        for batch in batches:
            prompts = [
                tuple(random.randrange(3, vocab_size) for _ in range(PROMPT_TOKENS))
                for _ in range(batch)
            ]
            load = ForeignLoad([os.getppid()])
            times = asyncio.run(_arrivals(shard, prompts))
            # The streams start and end one after the other; in between all of them decode.
            middle = times[NEW_TOKENS // 5 : -NEW_TOKENS // 5]
            steps = [after - before for before, after in itertools.pairwise(middle)]
            measured.append((typical_s(steps), load.stop()))
    finally:
        shard.stop_now()
    return measured


async def _arrivals(shard: object, prompts: Sequence[Sequence[int]]) -> list[float]:
    """When the tokens of the first stream came."""
    from router_service.shard import AttentionShard
    from services.core.generation import GenerateRequest, SamplingParams

    assert isinstance(shard, AttentionShard)

    async def one(index: int) -> list[float]:
        request = GenerateRequest(
            request_id=f"plan-{len(prompts)}-{index}",
            prompt_token_ids=tuple(prompts[index]),
            sampling=SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True),
        )
        return [time.perf_counter() async for _ in shard.generate(request)]

    return (await asyncio.gather(*(one(index) for index in range(len(prompts)))))[0]


def _measured_delay_s(delay_s: float) -> float:
    """One way, by what an echo through a proxy with this delay takes longer than without proxy."""
    with _echo_server() as port:
        endpoint = f"127.0.0.1:{port}"
        direct_s = _echo_s(endpoint)
        with contextlib.closing(DelayedNetwork(endpoint)) as network:
            network.set_delay(delay_s)
            delayed_s = _echo_s(network.endpoints)
    return (delayed_s - direct_s) / 2


@contextlib.contextmanager
def _echo_server() -> Iterator[int]:
    def serve() -> None:
        for _ in range(2):
            connection, _peer = listener.accept()
            with connection:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                while data := connection.recv(ECHO_BYTES):
                    connection.sendall(data)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listener.getsockname()[1]


def _echo_s(endpoint: str) -> float:
    host, _, port = endpoint.rpartition(":")
    payload = bytes(ECHO_BYTES)
    times = []
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(ECHOES):
            started = time.perf_counter()
            connection.sendall(payload)
            missing = ECHO_BYTES
            while missing:
                received = len(connection.recv(missing))
                if not received:
                    raise ConnectionError("the echo ended")
                missing -= received
            times.append(time.perf_counter() - started)
    return typical_s(times)


def _line(row: Row) -> str:
    workers = row.num_workers or "in process"
    return (
        f"| {workers} | {row.batch} | {row.delay_s * 1e3:.2f} | {row.predicted_s * 1e3:.2f} | "
        f"{row.measured_s * 1e3:.2f} | {row.error:+.0%} | {row.foreign_load:.0%} |"
    )


if __name__ == "__main__":
    main()
