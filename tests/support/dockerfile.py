"""A Dockerfile as stages of instructions, for tests that look at how it builds."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

PATH = Path(__file__).parents[2] / "deploy/docker/Dockerfile"


@dataclass(frozen=True, slots=True, kw_only=True)
class Instruction:
    name: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    name: str
    base: str
    instructions: tuple[Instruction, ...]

    def texts(self, name: str) -> list[str]:
        return [each.text for each in self.instructions if each.name == name]


@dataclass(frozen=True, slots=True, kw_only=True)
class Dockerfile:
    arguments: dict[str, str]
    """Of all stages: those before the first FROM."""
    stages: dict[str, Stage]

    def lineage(self, name: str) -> list[Stage]:
        """The stages that an image is made of, the first one first."""
        stage = self.stages[name]
        return [*(self.lineage(stage.base) if stage.base in self.stages else []), stage]

    def instructions(self, name: str) -> list[Instruction]:
        """All that lead to an image, in order."""
        return [each for stage in self.lineage(name) for each in stage.instructions]

    def environment(self, name: str) -> dict[str, str]:
        texts = [each.text for each in self.instructions(name) if each.name == "ENV"]
        return dict(re.findall(r"(\w+)=(\S+)", " ".join(texts)))


def read_dockerfile(path: Path = PATH) -> Dockerfile:
    arguments: dict[str, str] = {}
    stages: dict[str, Stage] = {}
    current: list[Instruction] = []
    heading: tuple[str, str] | None = None

    def close() -> None:
        if heading is not None:
            base, name = heading
            stages[name] = Stage(name=name, base=base, instructions=tuple(current))

    for line in _logical_lines(path.read_text()):
        name, _, text = line.partition(" ")
        if name == "FROM":
            close()
            base, _, stage = text.partition(" AS ")
            heading, current = (base, stage), []
        elif heading is None:
            variable, _, value = text.partition("=")
            arguments[variable] = value
        else:
            current.append(Instruction(name=name, text=text.strip()))
    close()
    return Dockerfile(arguments=arguments, stages=stages)


def _logical_lines(text: str) -> list[str]:
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [line for line in joined.splitlines() if line.strip()]
