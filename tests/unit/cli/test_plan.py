from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from services.cli.main import app
from services.cli.quantities import parse_bytes, parse_duration_s, parse_network, parse_tokens
from services.core.errors import ConfigurationError, ExpertfleetError

ROOT = Path(__file__).parents[3]


def run(*arguments: str) -> Result:
    return CliRunner(env={"COLUMNS": "100"}).invoke(app, ["plan", *arguments])


def refusal(*arguments: str) -> str:
    error = run(*arguments).exception
    assert isinstance(error, ExpertfleetError), error
    return error.message


def test_the_table_has_a_column_for_each_precision() -> None:
    done = run("--model", "mixtral-8x22b", "--gpu", "l4", "--network", "25g", "--users", "200")
    assert done.exit_code == 0, done.output
    assert "140.6 B parameters, 39.2 B active" in done.output
    lines = {line[:28].strip(): line[28:].split() for line in done.output.splitlines()}
    assert lines["all weights, GB"] == ["281.3", "146.0", "82.6"]
    assert lines["one expert, GB"] == ["33.8", "16.9", "9.0"]
    assert lines["pods per copy"] == ["2", "1", "1"]
    assert lines["shards"] == ["34", "34", "34"]
    for row in ("TTFT, ms", "TPOT, ms", "tokens/s", "$ a million tokens"):
        assert len(lines[row]) == 3, row
        assert all(float(cell) > 0 for cell in lines[row])


def test_json_has_the_whole_plan() -> None:
    done = run("--precision", "int4", "--json", "--users", "20", "--gpu-price", "1.5")
    plan = json.loads(done.output)
    assert plan["gpu"]["price_per_hour"] == 1.5
    assert plan["workload"]["users"] == 20
    (int4,) = plan["plans"]
    assert int4["weights"] == "int4"
    assert int4["expert_bytes"] == 8_984_199_168
    assert int4["pods"]["pods_per_group"] == 1
    assert int4["shard"]["max_streams"] == 6
    assert int4["problem"] is None
    assert int4["dollars_per_hour"] == pytest.approx(1.5 * int4["num_cards"])
    rates = int4["rates"]
    assert rates["tpot_s"] >= rates["decode"]["step_s"] > 0
    assert rates["bound_by"] in rates["shares"]
    assert set(rates["decode"]["layer"]) == {
        "attention_s",
        "dispatch_s",
        "wire_s",
        "delay_s",
        "expert_s",
        "stall_s",
    }


def test_a_checkpoint_on_disk_can_be_planned_for() -> None:
    for path in ("models/demo", "models/demo/config.json"):
        done = run("--model", str(ROOT / path), "--context", "256", "--users", "2", "--json")
        assert done.exit_code == 0, done.output
        assert json.loads(done.output)["plans"][0]["num_shards"] == 1


def test_what_does_not_fit_is_told_with_what_would() -> None:
    done = run("--context", "64k")
    assert done.exit_code == 0
    assert "needs cards of 27.2 GB or more" in " ".join(done.output.split())


def test_measured_host_costs_replace_the_assumed_ones(tmp_path: Path) -> None:
    from tests.unit.core.planning.test_calibration import CALIBRATION

    path = tmp_path / "calibration.json"
    path.write_text(CALIBRATION.to_json())
    assumed = json.loads(run("--json", "--precision", "int4").output)
    measured = json.loads(run("--json", "--precision", "int4", "--hardware", str(path)).output)
    costs = asdict(CALIBRATION.costs)
    decode = measured["plans"][0]["rates"]["decode"]
    streams = measured["plans"][0]["streams_per_shard"]
    assert decode["overhead_s"] == pytest.approx(costs["step_s"] + streams * costs["sequence_s"])
    assert assumed["plans"][0]["rates"]["decode"]["overhead_s"] != decode["overhead_s"]


def test_a_fleet_of_machines_like_the_measured_one_can_be_planned(tmp_path: Path) -> None:
    from tests.unit.core.planning.test_calibration import CALIBRATION

    path = tmp_path / "calibration.json"
    path.write_text(CALIBRATION.to_json())
    machine = ("--gpu", "measured", "--hardware", str(path), "--gpu-memory", "64gb")
    done = run(*machine, "--gpu-price", "0.2", "--precision", "bf16", "--json")
    plan = json.loads(done.output)
    assert plan["gpu"]["bandwidth"] == pytest.approx(1 / 5e-11)
    (bf16,) = plan["plans"]
    slot_bytes = bf16["expert_bytes"] / 56
    assert bf16["rates"]["decode"]["layer"]["expert_s"] > slot_bytes * 5e-11
    assert "--gpu-price" in refusal(*machine)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--model", "mixtral-9x9b"), "mixtral-8x7b, mixtral-8x22b"),
        (("--gpu", "l5"), "l4, a10, rtx-3090"),
        (("--gpu", "custom"), "--gpu-memory, --gpu-bandwidth"),
        (("--gpu", "rtx-3090", "--math", "fp8"), "has no fp8"),
        (("--precision", "int3"), "bf16, int8, int4"),
        (("--context", "128k"), "limit of 65536"),
        (("--context", "8q"), "--context '8q'"),
        (("--network", "fast"), "10g, 25g"),
        (("--network", "0g"), "rate above 0"),
        (("--network-delay", "5"), "50us"),
        (("--experts-per-pod", "9"), "8 experts"),
        (("--skew", "0.1"), "from 0.25"),
        (("--compute-efficiency", "1.5"), "0 to 1"),
        (("--gpu-memory", "0gb"), "above 0"),
        (("--hardware", "/nonexistent/file.json"), "--calibrate"),
        (("--calibrate", "--hardware", "/"), "cannot be written"),
    ],
)
def test_bad_input_is_refused_with_what_to_do(arguments: tuple[str, ...], text: str) -> None:
    assert text in refusal(*arguments)


def test_quantities_are_read_as_people_write_them() -> None:
    assert parse_tokens("8k", "x") == 8192
    assert parse_tokens("1000", "x") == 1000
    assert parse_network("25g", "x") == 25e9 / 8
    assert parse_network("300gb/s", "x") == 300e9
    assert parse_duration_s("50us", "x") == pytest.approx(50e-6)
    assert parse_bytes("24gb", "x") == 24e9
    assert parse_bytes("22.5GiB", "x") == 22.5 * 2**30
    with pytest.raises(ConfigurationError, match="-1k"):
        parse_tokens("-1k", "--context")
