"""A container engine (docker or podman), and services of the compose file run by it.

For machines whose engine has no compose plugin: each key that a service of ours uses is translated
into an option of `run`; another key fails.
"""

from __future__ import annotations

import json
import os
import resource
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.support.compose import Service

_PROCESSES = 16384
_IGNORED = {"build", "profiles", "stop_grace_period", "healthcheck"}


def find_engine() -> list[str] | None:
    """Command line of the engine that ENGINE and ENGINE_OPTIONS name, or of the one there is."""
    options = shlex.split(os.environ.get("ENGINE_OPTIONS", ""))
    if engine := os.environ.get("ENGINE"):
        return [engine, *options]
    if shutil.which("docker") and _succeeds("docker", "info"):
        return ["docker", *options]
    return ["podman", *options] if shutil.which("podman") else None


class ContainerEngine:
    def __init__(self, command: Sequence[str]) -> None:
        self.command = tuple(command)
        self.is_podman = "podman" in self.run("--version").lower()

    def run(self, *arguments: str, timeout_s: float = 120.0) -> str:
        """Standard output; a failure is raised with what the engine said."""
        done = self.attempt(*arguments, timeout_s=timeout_s)
        assert done.returncode == 0, f"{arguments}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout.strip()

    def attempt(
        self, *arguments: str, timeout_s: float = 120.0
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*self.command, *arguments], capture_output=True, text=True, timeout=timeout_s
        )

    def inspect(self, kind: str, name: str) -> dict[str, Any]:
        described: list[dict[str, Any]] = json.loads(self.run(kind, "inspect", name))
        return described[0]

    def logs(self, name: str, lines: int = 40) -> str:
        done = self.attempt("logs", "--tail", str(lines), name)
        return done.stdout + done.stderr

    def start_service(self, name: str, service: Service, *, container: str, network: str) -> None:
        """Run `service` detached; on `network` others find it by `name`.

        Published ports take a free port of the host instead of the one that the file names.
        """
        options = ["--detach", "--name", container, "--network", network, "--network-alias", name]
        command: list[str] = []
        for key, value in service.items():
            if key in _IGNORED or key == "image":
                continue
            if key == "command":
                command += value
            elif key == "entrypoint":
                options += ["--entrypoint", value[0]]
                command = [*value[1:], *command]
            else:
                options += self._options(key, value)
        self.run_image(service["image"], *command, options=options)

    def run_image(self, image: str, *command: str, options: Sequence[str] = ()) -> str:
        return self.run("run", *self._host_options(), *options, image, *command)

    def published_port(self, container: str, port: int) -> int:
        return int(self.run("port", container, f"{port}/tcp").splitlines()[0].rpartition(":")[2])

    def remove(self, container: str) -> None:
        self.attempt("kill", container)  # `rm` alone would give it time to end
        self.attempt("rm", "--force", "--volumes", container)

    def _host_options(self) -> list[str]:
        if not self.is_podman:
            return []
        # The limits it asks for may be above what this process may set, and its timer for health
        # checks is systemd's.
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        options = [f"--ulimit=nofile={files}:{files}", f"--ulimit=nproc={_PROCESSES}:{_PROCESSES}"]
        if not Path("/run/systemd/private").exists():
            options.append("--no-healthcheck")
        return options

    def _options(self, key: str, value: Any) -> list[str]:
        match key:
            case "read_only":
                # Podman would make some folders writable of its own accord.
                return ["--read-only", *(["--read-only-tmpfs=false"] if self.is_podman else [])]
            case "init":
                return ["--init"]
            case "cap_drop" | "security_opt":
                flag = "--" + key.replace("_", "-")
                return [part for each in value for part in (flag, each.removesuffix(":true"))]
            case "tmpfs":
                # As docker mounts it where nothing more is said.
                return [p for each in value for p in ("--tmpfs", f"{each}:rw,noexec,nosuid,nodev")]
            case "user" | "restart":
                return [f"--{key}", value]
            case "shm_size":
                return ["--shm-size", value]
            case "environment":
                return [p for name, text in value.items() for p in ("--env", f"{name}={text}")]
            case "ports":
                return [p for each in value for p in ("--publish", _any_host_port(each))]
        raise AssertionError(f"{key}: not translated")


def _any_host_port(published: str) -> str:
    host, _, port = published.split(":")
    return f"{host}::{port}"


def _succeeds(*command: str) -> bool:
    try:
        return subprocess.run(command, capture_output=True, timeout=30).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False
