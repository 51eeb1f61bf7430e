"""Rounds over side processes that answer at once with made-up times."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks.bound import Ceilings
from benchmarks.plot import plot
from benchmarks.report import ModelReport, figures, markdown
from benchmarks.rounds import Rounds, Samples, workloads
from benchmarks.side_process import SideFailedError, SideProcess
from benchmarks.sides import SideSpec
from benchmarks.targets import BOUND
from services.core.model_config import ModelConfig, load_model_config
from tests.support.waiting import wait_until

FAKE = """
import sys
from benchmarks.jobs import claim_results, result_of, serve_jobs
speed, fails_at = float(sys.argv[1]), int(sys.argv[2])
results = claim_results()
print("a library's banner")
jobs = 0
def run(job):
    global jobs
    jobs += 1
    if jobs == fails_at:
        raise RuntimeError("out of luck")
    if not job:
        # Faster and slower in turn, by as much as `speed` says.
        factor = 1 + (speed - 1) * (-1) ** jobs
        return {"read_bytes_per_s": factor * 1e9, "flop_per_s": factor * 1e10}
    times = [[(1 + step) / speed for step in range(job["max_tokens"])] for _ in job["prompts"]]
    tokens = [[prompt[0]] * job["max_tokens"] for prompt in job["prompts"]]
    return result_of(0.0, times, tokens, {"attention": 2.0, "experts": 3.0})
serve_jobs(run, results, {"fake": "1.0"})
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[StartFake]:
    starter = StartFake(tmp_path)
    yield starter
    for side in starter.sides:
        side.close()


class StartFake:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.sides: list[SideProcess] = []

    def __call__(
        self, name: str, speed: float, *, is_ours: bool = False, fails_at: int = 0
    ) -> SideProcess:
        command = (sys.executable, "-c", FAKE, str(speed), str(fails_at))
        spec = SideSpec(name=name, command=command, is_ours=is_ours)
        side = SideProcess(spec, self._folder / f"{name}.log")
        self.sides.append(side)
        side.wait_ready()
        return side


def rounds(sides: list[SideProcess], probe: SideProcess) -> Rounds:
    return Rounds(
        sides=sides,
        probe=probe,
        workloads=workloads([1, 4], context=8, new_tokens=5),
        vocab_size=100,
        say=lambda text: None,
    )


def test_rounds_measure_rates_ratios_and_the_split_of_a_step(start: StartFake) -> None:
    sides = [start("inprocess", 20.0, is_ours=True), start("vllm", 10.0)]
    samples = rounds(sides, start("probe", 1.0)).run(2)

    assert samples.rates["decode 4"]["inprocess"] == pytest.approx([80.0, 80.0])
    assert samples.rates["prefill 512"]["vllm"] == pytest.approx([5120.0, 5120.0])
    # 4 x 5 tokens, the last of which comes 5 / 10 s after the start.
    assert samples.rates["serve 4"]["vllm"] == pytest.approx([40.0, 40.0])
    assert samples.ratio("decode 1", "inprocess", "vllm") == pytest.approx(2.0)
    assert samples.timings["decode 4"]["vllm"] == [{"attention": 2.0, "experts": 3.0}] * 2
    assert samples.agreement["vllm"].prefix_share == 1.0
    ceilings = Ceilings(read_bytes_per_s=1e9, flop_per_s=1e10)
    assert samples.ceilings["decode 4"] == [ceilings] * 2


def test_a_round_is_held_against_the_ceilings_of_its_own_moment(start: StartFake) -> None:
    run = rounds([start("inprocess", 20.0, is_ours=True)], start("probe", 1.5))
    samples = run.run(2)
    report = report_of(run, samples)

    # Measured before and after, of which one is 1.5 and the other 0.5 times 1e9.
    assert samples.ceilings["decode 4"] == [Ceilings(read_bytes_per_s=1e9, flop_per_s=1e10)] * 2
    bound = report.bounds()["decode 4"]
    assert report.ratio("decode 4", "inprocess", BOUND) == pytest.approx(80.0 / bound)


def test_a_peer_that_fails_is_left_out_and_named(start: StartFake) -> None:
    sides = [start("inprocess", 20.0, is_ours=True), start("vllm", 10.0, fails_at=21)]
    samples = rounds(sides, start("probe", 1.0)).run(2)

    assert list(samples.rates["decode 4"]) == ["inprocess"]
    assert samples.failed["vllm"].startswith("vllm ended with status 1")
    assert samples.ratio("decode 1", "inprocess", "vllm") is None


def test_a_failure_of_ours_ends_the_run_with_its_log(start: StartFake) -> None:
    side = start("inprocess", 20.0, is_ours=True, fails_at=1)

    with pytest.raises(SideFailedError, match="out of luck"):
        rounds([side], start("probe", 1.0)).run(1)


def test_a_side_that_is_stopped_between_jobs_answers_and_ends(start: StartFake) -> None:
    side = start("vllm", 10.0)
    side.pauses = True

    job = {"prompts": [[7, 8]], "max_tokens": 2}
    assert [side.run(job)["tokens"] for _ in range(2)] == [[[7, 7]]] * 2
    stat = Path(f"/proc/{side.pid}/stat")
    wait_until(lambda: stat.read_text().split()[2] == "T", what="it stands still")
    side.close()
    assert not Path(f"/proc/{side.pid}").exists()


def test_the_report_holds_every_side_and_every_target(start: StartFake) -> None:
    sides = [start("inprocess", 20.0, is_ours=True), start("vllm", 10.0)]
    run = rounds(sides, start("probe", 1.0))
    report = report_of(run, run.run(1))

    text = markdown("a machine", "today", "a command", [report])
    assert "| vllm | 5120 (5120 to 5120) | 10.0 (10.0 to 10.0) |" in text
    assert "in process / vLLM | **2.00** of 0.8, met | **2.00** of 1, met |" in text
    assert "4 workers / transformers |  | not run |" in text
    assert "- not measured: llamacpp-bf16: not installed" in text
    assert "vllm: fake 1.0" in text
    written = figures("a machine", "today", [report])["models"]["demo"]
    assert written["ratios"][1]["measured"]["decode 4"] == pytest.approx(2.0)
    assert written["bound_tokens_per_s"]["decode 1"] > 0

    drawn = "".join(ElementTree.fromstring(plot([report])).itertext())
    assert "vllm" in drawn
    assert "attention" in drawn
    assert "bound" in drawn


def test_ratios_are_within_a_round_of_a_group(start: StartFake) -> None:
    probe = start("probe", 1.0)
    slow_hour = rounds([start("inprocess", 10.0, is_ours=True), start("vllm", 10.0)], probe)
    fast_hour = rounds([start("inprocess", 30.0, is_ours=True), start("transformers", 5.0)], probe)
    groups = [slow_hour.run(1), fast_hour.run(2)]
    report = report_of(slow_hour, *groups)

    assert report.sides == ["inprocess", "vllm", "transformers"]
    assert report.samples.rates["decode 1"]["inprocess"] == pytest.approx([10.0, 30.0, 30.0])
    assert report.ratio("decode 1", "inprocess", "vllm") == pytest.approx(1.0)
    assert report.ratio("decode 1", "inprocess", "transformers") == pytest.approx(6.0)
    assert report.ratio("decode 1", "vllm", "transformers") is None
    bound = report.bounds()["decode 1"]
    assert report.ratio("decode 1", "inprocess", BOUND) == pytest.approx(30.0 / bound)
    written = figures("a machine", "today", [report])["models"]["demo"]
    assert written["groups"] == [["inprocess", "vllm"], ["inprocess", "transformers"]]


def report_of(run: Rounds, *groups: Samples) -> ModelReport:
    return ModelReport(
        name="demo",
        config=demo_config(),
        workloads=run.workloads,
        num_rounds=1,
        groups=groups,
        versions={side.name: side.versions for side in run.sides},
        skipped={"llamacpp-bf16": "not installed"},
    )


def demo_config() -> ModelConfig:
    return load_model_config(Path(__file__).parents[3] / "models" / "demo")
