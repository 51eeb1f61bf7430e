"""Who may speak to a worker and a shard once certificates are set, and to whom they speak."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import httpx
import pytest
import torch

from expert_service import probe
from router_service.dispatch.dispatcher import RemoteExperts
from router_service.dispatch.lane_choice import chosen_transport
from router_service.dispatch.local_experts import LocalExperts
from router_service.dispatch.worker_link import GrpcTransport
from router_service.experts import StepContext
from router_service.shard import AttentionShard
from router_service.shard_server import ShardServer
from services.cli.gateway_factory import build_fleet_gateway
from services.core.checkpoints.checkpoint import Checkpoint
from services.core.describe import describe_worker
from services.core.errors import PeerTlsError, UnavailableError
from services.core.memory_registry import MemoryRegistry
from services.core.placement import WorkerSlots
from services.core.registry import Registry
from services.core.settings import Settings, load_settings
from services.core.static_registry import StaticRegistry
from services.core.tls import PeerTls, TlsFiles, open_channel
from services.core.tls_diagnosis import why_refused
from services.core.worker_control import drain_worker, load_slots, unload_slots
from services.gateway.shard_link import ShardLink
from services.gateway.shard_pool import ShardPool
from tests.support.certificates import Authority, environment
from tests.support.checkpoints import fresh_seed, make_checkpoint
from tests.support.eventually import eventually
from tests.support.fake_shard import FakeShard, repeats
from tests.support.fleet import NUM_THREADS, running_workers
from tests.support.moe_layers import random_gate
from tests.support.product import DEMO_MODEL
from tests.support.records import shard_record, worker_record
from tests.support.redis_server import running_redis
from tests.support.tls_front import tls_front
from tests.support.worker_process import running_worker

NUM_LAYERS, NUM_EXPERTS = 2, 4
ALL = [WorkerSlots(experts=tuple(range(NUM_EXPERTS)), layers=range(NUM_LAYERS))]
PATIENCE_S = 30.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture
def files(authority: Authority, tmp_path: Path) -> TlsFiles:
    """Of every process of the fleet."""
    return authority.issue(tmp_path / "fleet")


@pytest.fixture
def ours(files: TlsFiles) -> PeerTls:
    return PeerTls(files)


@asynccontextmanager
async def secured_worker(
    model: Path, files: TlsFiles | None, placement: list[WorkerSlots] = ALL
) -> AsyncIterator[str]:
    """The endpoint of one that holds `placement`; without `files` a plain one."""
    settings: dict[str, Any] = {}
    if files is not None:
        settings = {
            "tls_cert_file": files.cert_file,
            "tls_key_file": files.key_file,
            "tls_ca_file": files.ca_file,
        }
    async with running_workers(model, placement, **settings) as endpoints:
        yield endpoints[0]


async def described(endpoint: str, tls: PeerTls | None) -> Any:
    async with open_channel(endpoint, tls) as channel:
        return await describe_worker(channel, timeout_s=PATIENCE_S)


async def is_refused(endpoint: str, tls: PeerTls | None) -> bool:
    """That it is for the connection, and not for a call that a server did not like."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await described(endpoint, tls)
    return caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def shown_certificate(endpoint: str, tls: PeerTls) -> bytes:
    host, _, port = endpoint.rpartition(":")
    _, writer = await asyncio.open_connection(
        host, int(port), ssl=tls.context(), server_hostname="expertfleet"
    )
    shown: bytes = writer.get_extra_info("ssl_object").getpeercert(True)
    writer.transport.abort()
    return shown


async def test_a_worker_answers_a_client_with_a_certificate_of_its_authority(
    model: Path, authority: Authority, files: TlsFiles, tmp_path: Path
) -> None:
    # Whose name is on it does not matter: a client's is that of no address.
    client = PeerTls(authority.issue(tmp_path / "client", names=("somebody",)))
    async with secured_worker(model, files) as endpoint:
        description = await described(endpoint, client)
        assert len(description.slots) == NUM_LAYERS * NUM_EXPERTS
        assert await why_refused(endpoint, client, timeout_s=1) is None


async def test_with_certificates_no_lane_is_offered(model: Path, files: TlsFiles) -> None:
    async with secured_worker(model, files) as endpoint:
        assert (await described(endpoint, PeerTls(files))).lane_port == 0
    tls = PeerTls(files)
    assert isinstance(chosen_transport("auto", max_frame_bytes=1 << 20, tls=tls), GrpcTransport)


async def test_a_worker_refuses_plain_text(model: Path, files: TlsFiles) -> None:
    async with secured_worker(model, files) as endpoint:
        assert await is_refused(endpoint, None)
        why = await why_refused(endpoint, None, timeout_s=PATIENCE_S)
        assert why is not None
        assert why.startswith("asks for TLS, and we have no certificate")


async def test_a_worker_refuses_a_client_of_another_authority(
    model: Path, authority: Authority, files: TlsFiles, tmp_path: Path
) -> None:
    # It trusts the worker; what it lacks is the worker's trust.
    stranger = PeerTls(Authority().issue(tmp_path / "stranger", trusts=authority))
    async with secured_worker(model, files) as endpoint:
        assert await is_refused(endpoint, stranger)
        why = await why_refused(endpoint, stranger, timeout_s=PATIENCE_S)
        assert why is not None
        assert why.startswith("refuses our certificate")


async def test_a_worker_refuses_a_certificate_that_has_expired(
    model: Path, authority: Authority, files: TlsFiles, tmp_path: Path
) -> None:
    late = PeerTls(authority.issue(tmp_path / "late", days=-1))
    async with secured_worker(model, files) as endpoint:
        assert await is_refused(endpoint, late)


async def test_a_worker_refuses_a_client_without_a_certificate(
    model: Path, files: TlsFiles
) -> None:
    credentials = grpc.ssl_channel_credentials(files.ca_file.read_bytes())
    options = [("grpc.ssl_target_name_override", "expertfleet")]
    async with secured_worker(model, files) as endpoint:
        async with grpc.aio.secure_channel(endpoint, credentials, options=options) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await describe_worker(channel, timeout_s=PATIENCE_S)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ("name", "shows a certificate that is refused here: Hostname mismatch"),
        ("authority", "shows a certificate that is refused here: unable to get local issuer"),
        ("plain", "speaks plain text, and we speak TLS"),
    ],
)
async def test_a_client_refuses_a_worker_that_is_not_of_the_fleet(
    wrong: str, told: str, model: Path, authority: Authority, ours: PeerTls, tmp_path: Path
) -> None:
    theirs: TlsFiles | None = None
    if wrong == "name":
        theirs = authority.issue(tmp_path / "worker", names=("localhost", "worker-0"))
    elif wrong == "authority":
        theirs = Authority().issue(tmp_path / "worker", trusts=authority)
    async with secured_worker(model, theirs) as endpoint:
        assert await is_refused(endpoint, ours)
        why = await why_refused(endpoint, ours, timeout_s=PATIENCE_S)
        assert why is not None
        assert why.startswith(told)


async def test_what_is_not_for_certificates_is_not_called_so(ours: PeerTls, model: Path) -> None:
    assert await why_refused("127.0.0.1:1", ours) is None
    assert await why_refused("127.0.0.1:1", None) is None
    async with secured_worker(model, None) as endpoint:
        assert await why_refused(endpoint, None, timeout_s=PATIENCE_S) is None


async def test_a_dispatch_gives_what_the_experts_in_process_give(
    model: Path, files: TlsFiles, ours: PeerTls
) -> None:
    checkpoint = Checkpoint.open(str(model))
    generator = torch.Generator().manual_seed(fresh_seed())
    num_threads = torch.get_num_threads()
    torch.set_num_threads(NUM_THREADS)
    local = LocalExperts.load(checkpoint, dtype=torch.float32, device=torch.device("cpu"))
    try:
        async with (
            secured_worker(model, files) as endpoint,
            _dispatching(
                checkpoint, StaticRegistry([endpoint], tls=ours, timeout_s=10), ours
            ) as remote,
        ):
            for layer in range(NUM_LAYERS):
                rows = torch.randn(7, checkpoint.config.hidden_size, generator=generator)
                ids, weights = random_gate(
                    generator, num_tokens=7, num_experts=NUM_EXPERTS, top_k=2
                )
                answer = await remote.forward(layer, rows, ids, weights, StepContext())
                expected = await local.forward(layer, rows, ids, weights, StepContext())
                assert torch.equal(answer, expected)
    finally:
        torch.set_num_threads(num_threads)


@pytest.mark.parametrize("has_registry", [True, False], ids=["registry", "static list"])
async def test_a_shard_without_certificates_says_why_it_has_no_experts(
    has_registry: bool, model: Path, files: TlsFiles, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = Checkpoint.open(str(model))
    async with secured_worker(model, files) as endpoint:
        registry: Registry = StaticRegistry([endpoint], timeout_s=2)
        if has_registry:
            registry = MemoryRegistry()
            await registry.publish(worker_record("worker-0", endpoint=endpoint), 600)
        async with _dispatching(checkpoint, registry, None, is_ready=False):
            await eventually(lambda: "asks for TLS" in caplog.text, timeout_s=PATIENCE_S)
    said = [record for record in caplog.records if "asks for TLS" in record.message]
    assert {record.levelno for record in said} == {logging.ERROR}
    assert len(said) == 1
    assert said[0].message.startswith("worker at 127.0.0.1:")


async def test_new_files_are_taken_up_and_standing_connections_kept(
    model: Path, authority: Authority, files: TlsFiles, ours: PeerTls, tmp_path: Path
) -> None:
    async with (
        secured_worker(model, files) as endpoint,
        open_channel(endpoint, ours) as standing,
    ):
        await describe_worker(standing, timeout_s=PATIENCE_S)
        first = await shown_certificate(endpoint, ours)
        # Another authority altogether, as when the fleet's own is renewed.
        renewed = Authority()
        renewed.issue(tmp_path / "fleet")
        assert await shown_certificate(endpoint, ours) != first
        assert (await described(endpoint, ours)).worker_id == "worker-0"
        old = PeerTls(authority.issue(tmp_path / "old"))
        assert await is_refused(endpoint, old)
        assert (await describe_worker(standing, timeout_s=PATIENCE_S)).worker_id == "worker-0"


async def test_files_that_do_not_belong_together_leave_the_old_ones_in_use(
    model: Path,
    authority: Authority,
    files: TlsFiles,
    ours: PeerTls,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with secured_worker(model, files) as endpoint:
        first = await shown_certificate(endpoint, ours)
        other = authority.issue(tmp_path / "other")
        old_key = files.key_file.read_bytes()
        client = PeerTls(other)
        files.key_file.write_bytes(other.key_file.read_bytes())
        assert await shown_certificate(endpoint, client) == first
        assert (await described(endpoint, client)).worker_id == "worker-0"
        assert (await described(endpoint, ours)).worker_id == "worker-0"
        assert "going on with the certificate in use: EXPERTFLEET_TLS_CERT_FILE" in caplog.text
        files.key_file.write_bytes(old_key)
        authority.issue(tmp_path / "fleet")
        assert await shown_certificate(endpoint, client) != first


async def test_slots_are_loaded_and_workers_drained_with_a_certificate_alone(
    model: Path, files: TlsFiles, ours: PeerTls
) -> None:
    first = [WorkerSlots(experts=(0, 1), layers=range(NUM_LAYERS))]
    async with secured_worker(model, files, first) as endpoint:
        for call in (
            load_slots(endpoint, [(0, 2)], timeout_s=PATIENCE_S),
            unload_slots(endpoint, [(0, 1)], timeout_s=PATIENCE_S),
            drain_worker(endpoint, timeout_s=PATIENCE_S),
        ):
            with pytest.raises(PeerTlsError, match="asks for TLS"):
                await call
        held = await load_slots(endpoint, [(0, 2)], timeout_s=PATIENCE_S, tls=ours)
        assert (0, 2) in held.slots
        held = await unload_slots(endpoint, [(0, 2)], timeout_s=PATIENCE_S, tls=ours)
        assert held.slots == {(0, 0), (0, 1), (1, 0), (1, 1)}
        await drain_worker(endpoint, timeout_s=PATIENCE_S, tls=ours)


async def test_the_probe_asks_with_the_certificate_of_the_settings(
    model: Path,
    files: TlsFiles,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    async with secured_worker(model, files) as endpoint:
        arguments = ["health", "--endpoint", endpoint, "--timeout-s", str(PATIENCE_S)]
        assert await asyncio.to_thread(probe.main, arguments) == 1
        assert "asks for TLS, and we have no certificate" in capsys.readouterr().err
        for name, value in environment(files).items():
            monkeypatch.setenv(name, value)
        assert await asyncio.to_thread(probe.main, arguments) == 0
        monkeypatch.setenv("EXPERTFLEET_TLS_KEY_FILE", str(files.ca_file))
        assert await asyncio.to_thread(probe.main, arguments) == 1
        assert "EXPERTFLEET_TLS_KEY_FILE" in capsys.readouterr().err


@pytest.mark.parametrize("has_certificate", [True, False])
async def test_a_shard_takes_gateways_with_a_certificate_alone(
    has_certificate: bool,
    ours: PeerTls,
    authority: Authority,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    server = ShardServer(FakeShard(repeats((5, 6))), host="127.0.0.1", tls=ours)
    port = await asyncio.to_thread(server.start)
    registry = MemoryRegistry()
    endpoint = f"127.0.0.1:{port}"
    await registry.publish(shard_record("shard-0", endpoint=endpoint), 600)
    theirs = PeerTls(authority.issue(tmp_path / "gateway")) if has_certificate else None
    pool = ShardPool(registry, refresh_s=0.02, tls=theirs)
    try:
        if has_certificate:
            await pool.check_ready()
        else:
            with pytest.raises(UnavailableError):
                await pool.check_ready()
            with pytest.raises(PeerTlsError, match=r"shard shard-0 at .* asks for TLS"):
                await ShardLink("shard-0", endpoint).connect(0.5)
            await eventually(lambda: "asks for TLS" in caplog.text, timeout_s=PATIENCE_S)
    finally:
        await pool.close()
        await server.stop()


async def test_a_completion_passes_gateway_shard_worker_and_store_all_by_certificates(
    authority: Authority, files: TlsFiles, tmp_path: Path
) -> None:
    """The worker is a process; shard and gateway are those of the product, without Ray. The store
    asks for certificates too."""
    named = authority.issue(tmp_path / "store", names=("localhost",))
    with running_redis(tmp_path) as store, tls_front(store.url, named) as port:
        redis_url = f"rediss://localhost:{port}/0?" + "&".join(
            [
                f"ssl_ca_certs={files.ca_file}",
                f"ssl_certfile={files.cert_file}",
                f"ssl_keyfile={files.key_file}",
            ]
        )
        variables = environment(files) | {"EXPERTFLEET_REDIS_URL": redis_url}
        settings = _settings(variables, model=str(DEMO_MODEL), device="cpu", expert_wait_s=90)
        worker = running_worker(DEMO_MODEL, "0-7", environment=variables, wait_ready=False)
        with worker as process:
            shard = await asyncio.to_thread(
                AttentionShard.start, settings, in_process_experts=False
            )
            try:
                answer = await _complete(build_fleet_gateway(settings, shard), "The first")
                plain = await _complete_in_process("The first")
            finally:
                await shard.stop()
            assert await is_refused(process.endpoint, None)
    assert answer["usage"]["completion_tokens"] == 8
    assert answer["choices"][0]["text"] == plain["choices"][0]["text"]


async def test_a_store_that_asks_for_certificates_refuses_who_has_none(
    authority: Authority, tmp_path: Path
) -> None:
    named = authority.issue(tmp_path / "store", names=("localhost",))
    with running_redis(tmp_path) as store, tls_front(store.url, named) as port:
        context = ssl.create_default_context(cafile=named.ca_file)
        with pytest.raises((ssl.SSLError, ConnectionError, asyncio.IncompleteReadError)):
            async with asyncio.timeout(PATIENCE_S):
                reader, writer = await asyncio.open_connection("localhost", port, ssl=context)
                writer.write(b"PING\r\n")
                await reader.readexactly(5)


@asynccontextmanager
async def _dispatching(
    checkpoint: Checkpoint, registry: Registry, tls: PeerTls | None, *, is_ready: bool = True
) -> AsyncIterator[RemoteExperts]:
    transport = chosen_transport("auto", max_frame_bytes=1 << 20, tls=tls)
    experts = RemoteExperts(
        checkpoint.config,
        registry=registry,
        dtype=torch.float32,
        transport=transport,
        expert_wait_s=PATIENCE_S,
        refresh_s=0.05,
    )
    waiting = asyncio.create_task(experts.wait_ready())
    try:
        if is_ready:
            await waiting
        yield experts
    finally:
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await experts.close()


def _settings(variables: Mapping[str, str], **others: object) -> Settings:
    named = {name.removeprefix("EXPERTFLEET_").lower(): text for name, text in variables.items()}
    return load_settings(**named, **others)


async def _complete(app: Any, prompt: str) -> dict[str, Any]:
    """Eight greedy tokens, asked of the gateway over HTTP."""
    transport = httpx.ASGITransport(app=app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://gateway", timeout=90) as client,
    ):
        response = await client.post(
            "/v1/completions",
            json={"model": "demo", "prompt": prompt, "max_tokens": 8, "temperature": 0},
        )
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer


async def _complete_in_process(prompt: str) -> dict[str, Any]:
    """The same with experts in process: nothing but the registry of one process, no network."""
    settings = load_settings(model=str(DEMO_MODEL), device="cpu")
    shard = await asyncio.to_thread(AttentionShard.start, settings, in_process_experts=True)
    try:
        return await _complete(build_fleet_gateway(settings, shard), prompt)
    finally:
        await shard.stop()
