"""Hub ids, against a stand-in of the hub on loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from services.core.checkpoints.checkpoint import Checkpoint
from services.core.checkpoints.hub import HubSnapshot, find_model
from services.core.checkpoints.model_files import ModelFiles, Progress
from services.core.checkpoints.tensor_names import expert_tensor_names, non_expert_tensor_names
from services.core.checkpoints.weight_map import read_weight_map
from services.core.errors import CheckpointError
from services.core.model_config import load_model_config
from tests.support.checkpoints import make_checkpoint
from tests.support.hub_server import COMMIT, HubServer

MODEL = "acme/tiny-mixtral"
METADATA = {"config.json", "generation_config.json", "tokenizer.json"}
INDEX = "model.safetensors.index.json"
ROOT = Path(__file__).parents[2]


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    folder = make_checkpoint(tmp_path / "repository", sharded=8, dtype=torch.bfloat16)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "README.md").write_text("not needed")
    (folder / "training_args.bin").write_bytes(b"not needed")
    return folder


@pytest.fixture
def hub(repository: Path) -> Iterator[HubServer]:
    with HubServer(MODEL, repository) as server:
        yield server


def snapshot(hub: HubServer, cache: Path, progress: Progress | None = None) -> HubSnapshot:
    return HubSnapshot(MODEL, cache_dir=cache, progress=progress, endpoint=hub.url)


def open_checkpoint(files: ModelFiles) -> Checkpoint:
    return Checkpoint(
        files,
        name="tiny-mixtral",
        config=load_model_config(files.folder),
        weight_map=read_weight_map(files),
    )


def shards_of(repository: Path, names: tuple[str, ...]) -> set[str]:
    weight_map = json.loads((repository / INDEX).read_text())["weight_map"]
    return {weight_map[name] for name in names}


def test_a_worker_downloads_the_small_files_and_its_own_shards_only(
    hub: HubServer, repository: Path, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(snapshot(hub, tmp_path / "cache"))
    assert set(hub.downloads) == METADATA | {INDEX}

    checkpoint.require(slots=[(1, 3)])
    own = shards_of(repository, expert_tensor_names(1, 3))
    assert set(hub.downloads) == METADATA | {INDEX} | own
    assert len(hub.downloads) == len(set(hub.downloads))
    assert len(own) < len(list(repository.glob("*.safetensors")))

    local = Checkpoint.open(str(repository))
    assert torch.equal(checkpoint.expert(1, 3).w2, local.expert(1, 3).w2)
    assert checkpoint.slot_digest(1, 3) == local.slot_digest(1, 3)


def test_an_attention_shard_downloads_what_holds_the_rest(
    hub: HubServer, repository: Path, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(snapshot(hub, tmp_path / "cache"))
    checkpoint.require(non_expert=True)
    rest = shards_of(repository, non_expert_tensor_names(checkpoint.config))
    assert set(hub.downloads) == METADATA | {INDEX} | rest


def test_what_was_downloaded_once_is_not_downloaded_again(hub: HubServer, tmp_path: Path) -> None:
    open_checkpoint(snapshot(hub, tmp_path / "cache")).require(slots=[(0, 0)])
    before = list(hub.downloads)
    again = open_checkpoint(snapshot(hub, tmp_path / "cache"))
    again.require(slots=[(0, 0)])
    again.expert(0, 0)
    assert hub.downloads == before
    assert again.folder.name == COMMIT


def test_a_model_in_the_cache_is_served_while_the_hub_is_away(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = open_checkpoint(snapshot(hub, tmp_path / "cache"))
    first.require(slots=[(0, 0)])
    hub.stop()
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    second = open_checkpoint(snapshot(hub, tmp_path / "cache"))
    assert torch.equal(second.expert(0, 0).w1, first.expert(0, 0).w1)
    with pytest.raises(CheckpointError, match="cannot be reached; check the network") as caught:
        second.require(slots=[(0, 0), (1, 3)], non_expert=True)
    assert caught.value.details["file"].endswith(".safetensors")


def test_a_hub_that_cannot_be_reached_is_named(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.stop()
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(CheckpointError, match=f"{hub.url} cannot be reached"):
        snapshot(hub, tmp_path / "cache")


def test_without_an_index_headers_are_read_remotely_and_only_the_shard_is_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    repository = make_checkpoint(tmp_path / "repository", layout="mistral", sharded=5)
    shards = {path.name for path in repository.glob("*.safetensors")}
    with HubServer(MODEL, repository) as hub:
        checkpoint = open_checkpoint(snapshot(hub, tmp_path / "cache"))
        assert set(hub.downloads) == {"params.json"}
        assert set(hub.header_reads) == shards
        weights = checkpoint.expert(0, 0)
        downloaded = set(hub.downloads) & shards
        assert downloaded == checkpoint.opened_files
        assert len(downloaded) < len(shards)
        assert torch.equal(weights.w3, Checkpoint.open(str(repository)).expert(0, 0).w3)


def test_a_repository_of_a_single_file_is_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    repository = make_checkpoint(tmp_path / "repository")
    with HubServer(MODEL, repository) as hub:
        weights = open_checkpoint(snapshot(hub, tmp_path / "cache")).expert(1, 1)
    assert torch.equal(weights.w1, Checkpoint.open(str(repository)).expert(1, 1).w1)


def test_progress_tells_how_much_of_each_file_is_there(
    hub: HubServer, repository: Path, tmp_path: Path
) -> None:
    seen: dict[str, tuple[int, int]] = {}

    def progress(done_bytes: int, total_bytes: int, what: str) -> None:
        seen[what] = (done_bytes, total_bytes)

    checkpoint = open_checkpoint(snapshot(hub, tmp_path / "cache", progress))
    checkpoint.require(slots=[(0, 2)])
    for name in METADATA | {INDEX} | shards_of(repository, expert_tensor_names(0, 2)):
        size = (repository / name).stat().st_size
        assert seen[f"downloading {name}"] == (size, size)


def test_a_shard_that_the_index_names_and_the_hub_lacks_is_refused(
    hub: HubServer, repository: Path, tmp_path: Path
) -> None:
    gone = next(iter(shards_of(repository, expert_tensor_names(1, 0)[:1])))
    (repository / gone).unlink()
    checkpoint = open_checkpoint(snapshot(hub, tmp_path / "cache"))
    with pytest.raises(CheckpointError, match=f"has no file {gone}") as caught:
        checkpoint.require(slots=[(1, 0)])
    assert caught.value.details["file"] == gone
    assert "tensor" in caught.value.details


def test_an_id_that_does_not_exist_is_refused_saying_what_to_do(
    hub: HubServer, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=r"no folder acme/other here.*no model of that id"):
        HubSnapshot("acme/other", cache_dir=tmp_path, endpoint=hub.url)


def test_a_gated_model_is_refused_saying_what_to_do(repository: Path, tmp_path: Path) -> None:
    with (
        HubServer(MODEL, repository, gated=True) as hub,
        pytest.raises(CheckpointError, match=r"accept its terms at .*acme/tiny-mixtral"),
    ):
        snapshot(hub, tmp_path)


def test_a_repository_that_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "repository").mkdir()
    (tmp_path / "repository" / "README.md").touch()
    with (
        HubServer(MODEL, tmp_path / "repository") as hub,
        pytest.raises(CheckpointError, match=r"has no file params\.json"),
    ):
        snapshot(hub, tmp_path / "cache")


def test_a_folder_takes_precedence_over_a_hub_id(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(repository.parent)
    (repository.parent / "acme").mkdir()
    repository.rename(repository.parent / MODEL)
    assert find_model(MODEL).folder == Path(MODEL)


def test_the_library_finds_the_hub_by_its_own_environment(hub: HubServer, tmp_path: Path) -> None:
    """The whole way, in a process of its own: `HF_ENDPOINT` and `HF_HOME`, and then offline."""
    script = (
        "import sys; from services.core.checkpoints.checkpoint import Checkpoint\n"
        f"checkpoint = Checkpoint.open({MODEL!r})\n"
        "checkpoint.require(slots=[(0, 1)])\n"
        "checkpoint.expert(0, 1)\n"
        "print(checkpoint.name, checkpoint.bytes_read)\n"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    for extra in ({}, {"HF_HUB_OFFLINE": "1"}):
        done = subprocess.run(
            [sys.executable, "-c", script],
            cwd=ROOT,
            env=environment | extra,
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        assert done.stdout == f"tiny-mixtral {3 * 64 * 96 * 2}\n", done.stderr
        hub.stop()
