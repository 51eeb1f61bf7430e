"""The sides of llama.cpp, through the C interface of `llama-cpp-python`.

    python -m benchmarks.peers.llamacpp_side CHECKPOINT --weights bf16|q8_0|q4_0 --gguf FILE
        [--rpc-servers 2]

Runs in llama.cpp's own environment (`python -m benchmarks.peers install llamacpp`). The GGUF file
is written from the checkpoint when it is not there. With RPC servers the layers are split evenly
over that many processes on loopback, each of which computes on an even share of the cores.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib.metadata
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

from benchmarks.jobs import Job, Result, claim_results, result_of, serve_jobs
from benchmarks.peers.gguf_file import WEIGHTS, write_gguf

TOKENS_PER_SEQUENCE = 1024
MAX_SEQUENCES = 32
TOKENS_PER_CALL = 2048
SERVER_START_S = 60.0
CPU_DEVICE = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--weights", choices=WEIGHTS, default="bf16")
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--rpc-servers", type=int, default=0)
    parser.add_argument("--rpc-port", type=int, help="be such a server, on this port of loopback")
    arguments = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    if arguments.rpc_port is not None:
        _serve_rpc(arguments.rpc_port, max(1, cores // max(1, arguments.rpc_servers)))
        return
    results = claim_results()
    if not arguments.gguf.is_file():
        write_gguf(arguments.checkpoint, arguments.gguf, arguments.weights)
    versions = {"llama-cpp-python": importlib.metadata.version("llama-cpp-python")}
    llama_cpp.llama_backend_init()
    with _rpc_servers(arguments) as endpoints:
        devices = [_device_of(endpoint) for endpoint in endpoints]
        model = LlamaModel(arguments.gguf, cores, offload_to=devices)
        serve_jobs(model.run, results, versions)


class LlamaModel:
    """Greedy decoding of up to `MAX_SEQUENCES` prompts together, one token of each a call."""

    def __init__(self, gguf: Path, num_threads: int, *, offload_to: Sequence[int]) -> None:
        model_params = llama_cpp.llama_model_default_params()
        model_params.n_gpu_layers = 999 if offload_to else 0
        if offload_to:
            even = [1.0] * len(offload_to)
            self._split = (ctypes.c_float * llama_cpp.llama_max_devices())(*even)
            model_params.tensor_split = self._split
            # Named, as devices that are registered late are not used by themselves.
            self._devices = (ctypes.c_void_p * (len(offload_to) + 1))(*offload_to, None)
            model_params.devices = ctypes.addressof(self._devices)
        self._model = llama_cpp.llama_model_load_from_file(str(gguf).encode(), model_params)
        if not self._model:
            raise SystemExit(f"llama.cpp cannot load {gguf}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = TOKENS_PER_SEQUENCE * MAX_SEQUENCES
        params.n_seq_max = MAX_SEQUENCES
        params.n_batch = TOKENS_PER_CALL
        params.n_threads = params.n_threads_batch = num_threads
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise SystemExit("llama.cpp cannot make a context")
        vocab = llama_cpp.llama_model_get_vocab(self._model)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(vocab)
        self._batch = llama_cpp.llama_batch_init(TOKENS_PER_CALL, 0, 1)

    def run(self, job: Job) -> Result:
        """All prompts first, as many tokens a call as it takes, then decoding in lockstep."""
        prompts: list[list[int]] = job["prompts"]
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        started = time.perf_counter()
        times: list[list[float]] = [[] for _ in prompts]
        tokens: list[list[int]] = [[] for _ in prompts]
        pending = [
            (sequence, position, token, position == len(prompt) - 1)
            for sequence, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        for step in range(job["max_tokens"]):
            for first in range(0, len(pending), TOKENS_PER_CALL):
                answers = self._decode(pending[first : first + TOKENS_PER_CALL])
                now = time.perf_counter()
                for sequence, token in answers:
                    times[sequence].append(now)
                    tokens[sequence].append(token)
            pending = [
                (sequence, len(prompt) + step, tokens[sequence][-1], True)
                for sequence, prompt in enumerate(prompts)
            ]
        return result_of(started, times, tokens)

    def _decode(self, entries: Sequence[tuple[int, int, int, bool]]) -> list[tuple[int, int]]:
        """Entries (sequence, position, token, whether an answer is wanted) -> (sequence, token)."""
        batch = self._batch
        batch.n_tokens = len(entries)
        for index, (sequence, position, token, wanted) in enumerate(entries):
            batch.token[index] = token
            batch.pos[index] = position
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = sequence
            batch.logits[index] = wanted
        status = llama_cpp.llama_decode(self._context, batch)
        if status:
            raise SystemExit(f"llama_decode failed with status {status}")
        return [
            (sequence, self._likeliest(index))
            for index, (sequence, _, _, wanted) in enumerate(entries)
            if wanted
        ]

    def _likeliest(self, index: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(self._context, index)
        return int(np.ctypeslib.as_array(logits, shape=(self._vocab_size,)).argmax())


@contextlib.contextmanager
def _rpc_servers(arguments: argparse.Namespace) -> Iterator[list[str]]:
    """Server processes that listen on loopback; they end with this process."""
    servers: list[subprocess.Popen[bytes]] = []
    endpoints: list[str] = []
    try:
        for _ in range(arguments.rpc_servers):
            port = _free_port()
            command = [sys.executable, "-m", "benchmarks.peers.llamacpp_side"]
            command += [str(arguments.checkpoint), "--gguf", str(arguments.gguf)]
            command += ["--rpc-servers", str(arguments.rpc_servers), "--rpc-port", str(port)]
            servers.append(subprocess.Popen(command, stdin=subprocess.DEVNULL))
            endpoints.append(f"127.0.0.1:{port}")
        for server, endpoint in zip(servers, endpoints, strict=True):
            _wait_listening(server, endpoint)
        yield endpoints
    finally:
        for server in servers:
            server.terminate()
        for server in servers:
            server.wait(timeout=30)


def _serve_rpc(port: int, num_threads: int) -> None:
    """Serve this machine's CPU as a device; returns never. There is no authentication."""
    ggml, rpc = _library("ggml"), _library("ggml-rpc")
    ggml.ggml_backend_dev_by_type.restype = ctypes.c_void_p
    devices = (ctypes.c_void_p * 1)(ggml.ggml_backend_dev_by_type(CPU_DEVICE))
    rpc.ggml_backend_rpc_start_server.argtypes = [
        ctypes.c_char_p,
        ctypes.c_char_p,
        ctypes.c_size_t,
        ctypes.c_size_t,
        ctypes.c_void_p,
    ]
    rpc.ggml_backend_rpc_start_server(f"127.0.0.1:{port}".encode(), None, num_threads, 1, devices)


def _device_of(endpoint: str) -> int:
    """A server's device, made known."""
    ggml, rpc = _library("ggml"), _library("ggml-rpc")
    rpc.ggml_backend_rpc_add_server.restype = ctypes.c_void_p
    rpc.ggml_backend_rpc_add_server.argtypes = [ctypes.c_char_p]
    ggml.ggml_backend_register.argtypes = [ctypes.c_void_p]
    registry = rpc.ggml_backend_rpc_add_server(endpoint.encode())
    ggml.ggml_backend_register(registry)
    ggml.ggml_backend_reg_dev_get.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    ggml.ggml_backend_reg_dev_get.restype = ctypes.c_void_p
    return int(ggml.ggml_backend_reg_dev_get(registry, 0))


def _library(name: str) -> Any:
    """One of the shared libraries installed beside `llama_cpp`."""
    folder = Path(llama_cpp.__file__).parent / "lib"
    return ctypes.CDLL(str(folder / f"lib{name}.so"))


def _wait_listening(server: subprocess.Popen[bytes], endpoint: str) -> None:
    host, _, port = endpoint.rpartition(":")
    deadline = time.monotonic() + SERVER_START_S
    while server.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=1):
            return
        time.sleep(0.05)
    raise SystemExit(f"llama.cpp's RPC server at {endpoint} did not start")


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


if __name__ == "__main__":
    main()
