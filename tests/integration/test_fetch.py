"""What a pod's first container fetches for the process that comes after it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from services.core.checkpoints.fetch import Needed, fetch
from services.core.checkpoints.tensor_names import expert_tensor_names
from services.core.errors import CheckpointError, ConfigurationError
from tests.support.checkpoints import make_checkpoint
from tests.support.hub_server import HubServer

MODEL = "acme/tiny-mixtral"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_checkpoint(
        tmp_path_factory.mktemp("fetch") / "repository", sharded=8, dtype=torch.bfloat16
    )
    (folder / "tokenizer.json").write_text("{}")
    return folder


def files_of(repository: Path, *slots: tuple[int, int]) -> set[str]:
    weight_map = json.loads((repository / "model.safetensors.index.json").read_text())["weight_map"]
    return {weight_map[name] for slot in slots for name in expert_tensor_names(*slot)}


def test_an_expert_group_gets_the_files_of_its_experts_and_layers(
    repository: Path, tmp_path: Path
) -> None:
    with HubServer(MODEL, repository) as hub:
        done = subprocess.run(
            [
                *(sys.executable, "-m", "services.core.checkpoints.fetch"),
                *("--experts", "3", "--layers", "1"),
            ],
            cwd=ROOT,
            env=os.environ
            | {
                "EXPERTFLEET_MODEL": MODEL,
                "HF_ENDPOINT": hub.url,
                "HF_HOME": str(tmp_path),
                "HF_HUB_OFFLINE": "0",
            },
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        weights = {name for name in hub.downloads if name.endswith(".safetensors")}
    assert weights == files_of(repository, (1, 3))
    assert weights < {path.name for path in repository.glob("*.safetensors")}
    assert all(name in done.stdout for name in weights)


def test_of_a_local_folder_only_what_is_needed_is_looked_at(repository: Path) -> None:
    own = fetch(str(repository), Needed(experts="0,2", layers="0"))
    assert set(own) == files_of(repository, (0, 0), (0, 2))
    assert set(fetch(str(repository), Needed(shared=True)))
    assert fetch(str(repository), Needed()) == ()


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "broken", sharded=8, dtype=torch.bfloat16)
    missing = min(files_of(folder, (1, 3)))
    (folder / missing).unlink()
    with pytest.raises(CheckpointError, match=missing):
        fetch(str(folder), Needed(experts="3", layers="1"))


@pytest.mark.parametrize(
    ("needed", "told"),
    [
        (Needed(experts="4"), "experts 0 to 3"),
        (Needed(experts="x"), "'x' cannot be read"),
        (Needed(experts="0", layers="99"), "layers 0 to"),
    ],
)
def test_what_the_model_does_not_have_is_refused(
    repository: Path, needed: Needed, told: str
) -> None:
    with pytest.raises(ConfigurationError, match=told):
        fetch(str(repository), needed)
