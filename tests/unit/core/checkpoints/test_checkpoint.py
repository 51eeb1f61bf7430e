from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from services.core.checkpoints.checkpoint import Checkpoint
from services.core.checkpoints.tensor_names import (
    expert_tensor_names,
    non_expert_tensor_names,
    tensor_sources,
)
from services.core.errors import CheckpointError
from tests.support.checkpoints import (
    Layout,
    fresh_seed,
    make_checkpoint,
    make_model,
    mistral_tensors,
    save_model,
)

SLOTS = [(layer, expert) for layer in range(2) for expert in range(4)]


def read_all(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Every tensor of the model by canonical name."""
    config = checkpoint.config
    names = list(non_expert_tensor_names(config))
    for layer in range(config.num_hidden_layers):
        for expert in range(config.num_local_experts):
            names += expert_tensor_names(layer, expert)
    return {name: checkpoint.tensor(name, tensor_sources(name, config)[0].shape) for name in names}


def canonical(model: Any, folder: Path) -> dict[str, torch.Tensor]:
    """The model's tensors as transformers writes them and the safetensors library reads them."""
    save_model(model, folder, layout="classic")
    tensors: dict[str, torch.Tensor] = load_file(folder / "model.safetensors")
    return tensors


def assert_same(read: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(read) == set(expected)
    for name, tensor in expected.items():
        assert read[name].dtype == tensor.dtype, name
        assert torch.equal(read[name], tensor), name


@pytest.mark.parametrize("sharded", [False, 3])
@pytest.mark.parametrize("layout", ["classic", "fused", "mistral"])
@pytest.mark.parametrize("dense", [False, True])
def test_every_layout_gives_the_tensors_that_transformers_wrote(
    tmp_path: Path, layout: Layout, sharded: int, dense: bool
) -> None:
    model = make_model(dtype=torch.bfloat16, dense=dense, num_key_value_heads=1, head_dim=24)
    save_model(model, tmp_path / "m", layout=layout, sharded=sharded)
    checkpoint = Checkpoint.open(str(tmp_path / "m"))
    assert_same(read_all(checkpoint), canonical(model, tmp_path / "oracle"))
    assert checkpoint.config.dtype == "bfloat16"
    assert checkpoint.name == "m"


def test_an_index_beside_consolidated_files_is_used(tmp_path: Path) -> None:
    model = make_model()
    save_model(model, tmp_path / "m", layout="mistral", sharded=3)
    weight_map = {
        name: file.name
        for file in (tmp_path / "m").glob("*.safetensors")
        for name in load_file(file)
    }
    index = tmp_path / "m" / "consolidated.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    checkpoint = Checkpoint.open(str(tmp_path / "m"))
    checkpoint.require(slots=[(1, 3)])
    assert len(checkpoint.opened_files) < len(set(weight_map.values()))
    assert_same(read_all(checkpoint), canonical(model, tmp_path / "oracle"))


def test_mistrals_first_release_with_experts_in_one_tensor_is_read(tmp_path: Path) -> None:
    """w1, w2 and w3 of all experts one below the other, w2 transposed."""
    model = make_model(dtype=torch.float16)
    folder = tmp_path / "m"
    save_model(model, folder, layout="mistral")
    tensors = mistral_tensors(model)
    for layer in range(2):
        prefix = f"layers.{layer}.feed_forward"
        stored = f"layers.{layer}.block_sparse_moe"
        tensors[f"{stored}.gate.weight"] = tensors.pop(f"{prefix}.gate.weight")
        for name in ("w1", "w2", "w3"):
            experts = [tensors.pop(f"{prefix}.experts.{e}.{name}.weight") for e in range(4)]
            rows = [expert.t() if name == "w2" else expert for expert in experts]
            tensors[f"{stored}.{name}"] = torch.cat(rows).contiguous()
    save_file(tensors, folder / "consolidated.safetensors")
    checkpoint = Checkpoint.open(str(folder))
    read = read_all(checkpoint)
    assert_same(read, canonical(model, tmp_path / "oracle"))
    assert all(tensor.is_contiguous() for tensor in read.values())
    w2 = expert_tensor_names(1, 3)[1]
    assert torch.equal(checkpoint.rows_of(w2, (64, 96))[5:9], read[w2][5:9])


def test_attention_scores_of_mistrals_rotary_pairs_equal_those_of_half_rotation(
    tmp_path: Path,
) -> None:
    """Stated without a permutation: each form is rotated by its own rule, and scores agree."""
    make_checkpoint(tmp_path, layout="mistral", num_key_value_heads=4, head_dim=16)
    stored = load_file(tmp_path / "consolidated.safetensors")
    read = read_all(Checkpoint.open(str(tmp_path)))
    hidden_states = torch.randn(9, 64)
    angles = torch.outer(torch.arange(9.0), 10000.0 ** -(torch.arange(8.0) / 8))

    def in_pairs(rows: torch.Tensor) -> torch.Tensor:
        complex_rows = torch.view_as_complex(rows.view(9, 4, 8, 2))
        turned = complex_rows * torch.polar(torch.ones_like(angles), angles)[:, None]
        return torch.view_as_real(turned).flatten(2)

    def in_halves(rows: torch.Tensor) -> torch.Tensor:
        first, second = rows.view(9, 4, 16).chunk(2, dim=-1)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    def scores(rotate: Callable[..., torch.Tensor], *weights: torch.Tensor) -> torch.Tensor:
        query, key = (rotate(hidden_states @ weight.t()) for weight in weights)
        return torch.einsum("qhd,khd->hqk", query, key)

    for layer in range(2):
        theirs = [stored[f"layers.{layer}.attention.{name}.weight"] for name in ("wq", "wk")]
        ours = [read[f"model.layers.{layer}.self_attn.{name}_proj.weight"] for name in "qk"]
        torch.testing.assert_close(
            scores(in_halves, *ours), scores(in_pairs, *theirs), rtol=1e-4, atol=1e-4
        )
        assert not torch.allclose(scores(in_halves, *theirs), scores(in_pairs, *theirs), atol=0.1)


def test_a_worker_opens_only_the_shards_of_its_experts_and_reads_only_their_bytes(
    tmp_path: Path,
) -> None:
    make_checkpoint(tmp_path, sharded=8, dtype=torch.bfloat16)
    weight_map = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    checkpoint = Checkpoint.open(str(tmp_path))
    assert not checkpoint.opened_files
    checkpoint.require(slots=[(1, 2)])
    assert checkpoint.bytes_read == 0
    weights = checkpoint.expert(1, 2)
    assert (weights.w1.shape, weights.w2.shape, weights.w3.shape) == ((96, 64), (64, 96), (96, 64))
    assert checkpoint.bytes_read == 3 * 64 * 96 * 2
    own = {weight_map[name] for name in expert_tensor_names(1, 2)}
    assert checkpoint.opened_files == own
    assert len(own) < len(set(weight_map.values()))


def test_other_shards_need_not_exist(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, sharded=8)
    weight_map = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    own = {weight_map[name] for name in expert_tensor_names(0, 1)}
    for file in tmp_path.glob("*.safetensors"):
        if file.name not in own:
            file.unlink()
    Checkpoint.open(str(tmp_path)).expert(0, 1)
    with pytest.raises(CheckpointError, match=r"model-.*is missing from") as caught:
        Checkpoint.open(str(tmp_path)).require(non_expert=True)
    assert caught.value.details["tensor"].startswith("model.")


def test_only_the_slice_of_a_fused_tensor_is_read(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, layout="fused")
    checkpoint = Checkpoint.open(str(tmp_path))
    checkpoint.expert(0, 3)
    assert checkpoint.bytes_read == 3 * 64 * 96 * 4


@pytest.mark.parametrize("layout", ["classic", "fused", "mistral"])
def test_rows_are_read_as_they_are_sliced(tmp_path: Path, layout: Layout) -> None:
    make_checkpoint(tmp_path, layout=layout)
    checkpoint = Checkpoint.open(str(tmp_path))
    for name, shape in zip(expert_tensor_names(1, 2), ((96, 64), (64, 96), (96, 64)), strict=True):
        expected = checkpoint.tensor(name, shape)
        before = checkpoint.bytes_read
        rows = checkpoint.rows_of(name, shape)
        assert (tuple(rows.shape), checkpoint.bytes_read) == (shape, before)
        assert torch.equal(rows[7:20], expected[7:20])
        assert checkpoint.bytes_read == before + 13 * shape[1] * 4
        assert torch.equal(rows[40:999], expected[40:])
    with pytest.raises(CheckpointError, match=r"\[96, 64\], but \[96, 65\] was asked for"):
        checkpoint.rows_of(expert_tensor_names(1, 2)[0], (96, 65))


def test_a_tensor_owns_its_memory(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    checkpoint = Checkpoint.open(str(tmp_path))
    first = checkpoint.tensor("model.norm.weight", (64,))
    expected = first.clone()
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert torch.equal(first, expected)
    first.zero_()


def test_tied_embeddings_are_read_for_the_head(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, tie_word_embeddings=True)
    checkpoint = Checkpoint.open(str(tmp_path))
    head = checkpoint.tensor("lm_head.weight", (256, 64))
    assert torch.equal(head, checkpoint.tensor("model.embed_tokens.weight", (256, 64)))


def test_progress_runs_up_to_what_was_required(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    seen: list[tuple[int, int, str]] = []
    checkpoint = Checkpoint.open(str(tmp_path), progress=lambda *told: seen.append(told))
    checkpoint.require(slots=[(0, 0), (0, 1)])
    checkpoint.expert(0, 0)
    checkpoint.expert(0, 1)
    total = 2 * 3 * 64 * 96 * 4
    assert [told[1] for told in seen] == [total] * 6
    assert [told[0] for told in seen] == [total * n // 6 for n in range(1, 7)]
    assert {told[2] for told in seen} == {"reading weights"}


def test_digests_tell_weights_apart_and_are_the_same_in_every_layout(tmp_path: Path) -> None:
    model = make_model(dtype=torch.bfloat16)
    digests = []
    layouts: tuple[Layout, ...] = ("classic", "fused", "mistral")
    for layout in layouts:
        save_model(model, tmp_path / layout, layout=layout, sharded=3)
        checkpoint = Checkpoint.open(str(tmp_path / layout))
        digests.append([checkpoint.slot_digest(*slot) for slot in SLOTS])
        assert checkpoint.bytes_read == 0
    assert digests[0] == digests[1] == digests[2]
    assert len(set(digests[0])) == len(SLOTS)
    assert {len(digest) for digest in digests[0]} == {16}
    classic, fused = (Checkpoint.open(str(tmp_path / layout)) for layout in layouts[:2])
    assert classic.non_expert_digest() == fused.non_expert_digest()


def test_the_digest_of_the_rest_covers_weights_and_config(tmp_path: Path) -> None:
    seed = fresh_seed()
    folders = [
        make_checkpoint(tmp_path / "a", seed=seed),
        make_checkpoint(tmp_path / "b", seed=seed),
        make_checkpoint(tmp_path / "c", seed=seed + 1),
        make_checkpoint(tmp_path / "d", seed=seed, rope_theta=5e5),
        make_checkpoint(tmp_path / "e", seed=seed, dtype=torch.bfloat16),
    ]
    digests = [Checkpoint.open(str(folder)).non_expert_digest() for folder in folders]
    assert digests[0] == digests[1]
    assert len(set(digests[1:])) == 4


# Refusals. Each edits a checkpoint that is sound before, and is told at `require` unless said.

W2 = "model.layers.1.block_sparse_moe.experts.2.w2.weight"


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_checkpoint(tmp_path)
    Checkpoint.open(str(tmp_path)).require(slots=SLOTS, non_expert=True)
    return tmp_path


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(W2), "lacks tensor"),
        (lambda t: t.update({W2: torch.zeros(96, 64)}), r"shape \[96, 64\].*implies \[64, 96\]"),
        (lambda t: t.update({W2: torch.zeros(64, 96, dtype=torch.int8)}), "dtype I8"),
        (lambda t: t.update({W2: t[W2].to(torch.float8_e4m3fn)}), "dtype F8_E4M3"),
        (lambda t: t.update({W2: t[W2].double()}), "dtype F64"),
    ],
)
def test_a_tensor_that_cannot_be_served_is_named_with_its_file(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], Any], said: str
) -> None:
    edit(folder, change)
    checkpoint = Checkpoint.open(str(folder))
    checkpoint.require(slots=[(0, 0)], non_expert=True)
    with pytest.raises(CheckpointError, match=said) as caught:
        checkpoint.require(slots=[(1, 2)])
    assert W2 in caught.value.message
    assert "model.safetensors" in caught.value.message
    assert caught.value.details["tensor"] == W2
    assert caught.value.details["file"] == str(folder / "model.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_weight_that_is_not_finite_is_found_wherever_it_is(
    tmp_path: Path, dtype: torch.dtype, value: float
) -> None:
    make_checkpoint(tmp_path, dtype=dtype)
    element = int(torch.randint(64 * 96, ()))
    edit(tmp_path, lambda t: t[W2].view(-1).__setitem__(element, value))
    checkpoint = Checkpoint.open(str(tmp_path))
    checkpoint.expert(1, 1)
    with pytest.raises(CheckpointError, match=f"value {value} at element {element}") as caught:
        checkpoint.expert(1, 2)
    assert caught.value.details == {"file": str(tmp_path / "model.safetensors"), "tensor": W2}


def test_the_largest_finite_values_are_not_taken_for_infinite(folder: Path) -> None:
    edit(folder, lambda t: t[W2].fill_(torch.finfo(torch.float32).max))
    Checkpoint.open(str(folder)).expert(1, 2)


def test_a_truncated_shard_is_refused(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="truncated") as caught:
        Checkpoint.open(str(folder)).require(non_expert=True)
    assert caught.value.details["file"] == str(file)
    assert "tensor" in caught.value.details


def test_a_corrupt_shard_of_an_index_is_refused_when_it_is_needed(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, sharded=4)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    (tmp_path / index["weight_map"][W2]).write_bytes(b"<html>not found</html>")
    checkpoint = Checkpoint.open(str(tmp_path))
    with pytest.raises(CheckpointError, match="safetensors") as caught:
        checkpoint.require(slots=[(1, 2)])
    assert caught.value.details["file"].endswith(index["weight_map"][W2])
    assert "experts.2" in caught.value.details["tensor"]


def test_an_index_that_lies_about_a_shard_is_refused(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, sharded=4)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    others = set(index["weight_map"].values()) - {index["weight_map"][W2]}
    index["weight_map"][W2] = min(others)
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"lacks tensor.*says it holds"):
        Checkpoint.open(str(tmp_path)).require(slots=[(1, 2)])


@pytest.mark.parametrize(
    "index", [{}, {"weight_map": ["a"]}, {"weight_map": {"a": 1}}, {"weight_map": {"a": "../b"}}]
)
def test_an_index_that_is_no_map_to_files_beside_it_is_refused(
    tmp_path: Path, index: dict[str, Any]
) -> None:
    make_checkpoint(tmp_path, sharded=4)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
        Checkpoint.open(str(tmp_path))


def test_two_files_with_the_same_tensor_are_refused(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, layout="mistral", sharded=2)
    files = sorted(tmp_path.glob("*.safetensors"))
    save_file(load_file(files[0]), files[1])
    with pytest.raises(CheckpointError, match=r"both consolidated\.00.*and consolidated\.01"):
        Checkpoint.open(str(tmp_path))


def test_a_shape_asked_for_must_be_the_tensors(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"\[64\], but \[65\] was asked for"):
        Checkpoint.open(str(folder)).tensor("model.norm.weight", (65,))


def test_a_config_of_another_size_is_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 300}))
    with pytest.raises(CheckpointError, match=r"\[256, 64\], but the config implies \[300, 64\]"):
        Checkpoint.open(str(folder)).require(non_expert=True)


def test_a_slot_beyond_the_model_is_refused(folder: Path) -> None:
    checkpoint = Checkpoint.open(str(folder))
    for slot in [(2, 0), (0, 4)]:
        with pytest.raises(CheckpointError, match="no tensor"):
            checkpoint.require(slots=[slot])


def test_an_empty_folder_a_missing_one_and_a_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"is empty; it must hold config\.json"):
        Checkpoint.open(str(tmp_path / "empty"))
    with pytest.raises(CheckpointError, match=r"there is no folder.*or a hub id"):
        Checkpoint.open(str(tmp_path / "none"))
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="is a file; give the folder"):
        Checkpoint.open(str(tmp_path / "file"))


def test_a_folder_without_weights_names_a_format_that_is_not_read(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match=r"holds no weights.*pytorch_model\.bin"):
        Checkpoint.open(str(folder))
