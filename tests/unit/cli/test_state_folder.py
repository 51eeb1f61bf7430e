from __future__ import annotations

import json
from pathlib import Path

import pytest

from services.cli import state_folder
from services.cli.state_folder import RunningInstance, StateFolder
from services.core.errors import ConfigurationError


def test_a_folder_in_use_is_refused_with_the_users_pid_and_url(tmp_path: Path) -> None:
    first = StateFolder(tmp_path / "state")
    first.record(url="http://127.0.0.1:1234")
    with pytest.raises(ConfigurationError, match=r"pid \d+, http://127.0.0.1:1234"):
        StateFolder(tmp_path / "state")
    first.close()
    StateFolder(tmp_path / "state").close()


def test_closing_leaves_only_logs(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path / "state")
    (folder.run_folder / "socket").write_text("x")
    run_folder = folder.run_folder
    folder.close()
    assert not run_folder.exists()
    assert {path.name for path in (tmp_path / "state").iterdir()} == {"logs"}


def test_what_a_killed_instance_left_is_removed_at_the_next_start(tmp_path: Path) -> None:
    leftover = tmp_path / "expertfleet-run-killed"
    leftover.mkdir()
    state = tmp_path / "state"
    state.mkdir()
    (state / "instance.json").write_text(json.dumps({"pid": 1, "run_folder": str(leftover)}))
    StateFolder(state).close()
    assert not leftover.exists()


def test_a_leftover_that_is_none_of_ours_is_left_alone(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    state = tmp_path / "state"
    state.mkdir()
    (state / "instance.json").write_text(json.dumps({"run_folder": str(precious)}))
    StateFolder(state).close()
    assert precious.exists()


def test_sockets_move_to_the_temporary_folder_when_the_path_is_long(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path / ("long" * 20))
    assert not folder.run_folder.is_relative_to(folder.path)
    assert len(str(folder.run_folder)) <= state_folder.LONGEST_RUN_FOLDER
    folder.close()


def test_an_unwritable_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="--state-dir"):
        StateFolder(tmp_path / "file")


def test_a_large_log_is_set_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_folder, "LOG_BYTES_KEPT", 10)
    folder = StateFolder(tmp_path / "state")
    folder.log_file("store").write_text("x" * 100)
    assert not folder.log_file("store").exists()
    assert (folder.path / "logs" / "store.log.1").read_text() == "x" * 100
    folder.close()


def test_commands_find_the_running_instance_and_say_when_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="--state-dir"):
        RunningInstance.find(tmp_path / "state")
    folder = StateFolder(tmp_path / "state")
    folder.record(url="http://127.0.0.1:1234")
    found = RunningInstance.find(tmp_path / "state")
    assert found.url == "http://127.0.0.1:1234"
    assert found.control_socket.parent == folder.run_folder
    told = json.loads((tmp_path / "state" / "instance.json").read_text())
    ended = {**told, "pid": 2**22 + 1}
    (tmp_path / "state" / "instance.json").write_text(json.dumps(ended))
    with pytest.raises(ConfigurationError, match="no `expertfleet up` runs"):
        RunningInstance.find(tmp_path / "state")
    folder.close()
