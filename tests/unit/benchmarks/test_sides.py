from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.sides import GROUPS, SIDES, Places, SideUnavailableError, is_side, side_spec

MODEL = Path("/models/bench-s")


def test_every_side_of_the_default_is_known() -> None:
    assert all(is_side(name) for name in SIDES)
    assert {name for group in GROUPS for name in group} == set(SIDES)
    assert is_side("workers16-int4")
    assert not is_side("workers")


def test_ours_must_agree_with_the_experts_in_process_of_the_same_weights(tmp_path: Path) -> None:
    spec = side_spec("workers2", MODEL, Places.under(tmp_path))

    assert spec.is_ours
    assert spec.exactly_as == "inprocess"
    assert spec.command[-4:] == ("workers", str(MODEL), "--workers", "2")


def test_a_peer_that_is_not_installed_says_how_to_install_it(tmp_path: Path) -> None:
    with pytest.raises(SideUnavailableError, match=r"benchmarks\.peers install vllm"):
        side_spec("vllm", MODEL, Places.under(tmp_path))


def test_processes_of_one_peer_share_the_cores_without_overlap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2, 3})
    python = tmp_path / "vllm" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()

    environment = side_spec("vllm-tp2", MODEL, Places.under(tmp_path)).environment

    assert environment["VLLM_CPU_OMP_THREADS_BIND"] == "0,1|2,3"
    assert environment["OMP_NUM_THREADS"] == "2"


def test_sides_of_llamacpp_share_the_file_of_their_weights(tmp_path: Path) -> None:
    python = tmp_path / "llamacpp" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    places = Places.under(tmp_path)

    plain, remote, quantised = (
        side_spec(f"llamacpp-{name}", MODEL, places) for name in ("bf16", "rpc2", "q8_0")
    )

    gguf = str(places.models / "bench-s.bf16.gguf")
    assert gguf in plain.command
    assert gguf in remote.command
    assert quantised.is_quantised
    assert not remote.is_quantised
