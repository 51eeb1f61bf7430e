"""Child of `expertfleet up`: starts Ray, deploys gateway and shards, ends both on SIGTERM.

Restarts them when it is told to on its control socket.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from types import FrameType

from services.cli.command_queue import Command, CommandQueue
from services.core.errors import EXIT_BAD_INPUT, CheckpointError, ConfigurationError
from services.core.logging_setup import configure_logging
from services.core.settings import load_settings

RESTART_SHARDS = "restart_shards"
RESTART_GATEWAY = "restart_gateway"
REPLACE = "replace"
STOP_GRACEFULLY_S = 4.0
GATEWAY = "services.cli.gateway_factory:build_fleet_gateway"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--in-process-experts", action="store_true")
    parser.add_argument("--min-shards", type=int, required=True)
    parser.add_argument("--max-shards", type=int, required=True)
    parser.add_argument("--ray-dir", type=Path, required=True)
    parser.add_argument("--control-socket", type=Path, required=True)
    parser.add_argument("--num-gpus", type=int, default=0)
    arguments = parser.parse_args()
    settings = load_settings()
    configure_logging(settings.log_level, service="expertfleet-ray", instance="host")
    # Imported after the environment that the launcher set; it imports Ray.
    from router_service import deployment

    plan = deployment.DeploymentPlan(
        gateway=GATEWAY,
        min_shards=arguments.min_shards,
        max_shards=arguments.max_shards,
        in_process_experts=arguments.in_process_experts,
        num_gpus=arguments.num_gpus,
    )
    deployed = deployment.Deployment(settings, plan)

    def execute(command: Command) -> None:
        changed = load_settings(**command["settings"])
        if command["command"] == RESTART_SHARDS:
            deployed.restart_shards(changed, surge=command["surge"])
        elif command["command"] == RESTART_GATEWAY:
            deployed.restart_gateway(changed)
        else:
            deployed.replace(changed)

    commands = CommandQueue(arguments.control_socket, (RESTART_SHARDS, RESTART_GATEWAY, REPLACE))
    try:
        deployment.start_ray(ray_dir=arguments.ray_dir, num_gpus=arguments.num_gpus)
        # After Ray's start, which installs handlers of its own, and before the gateway answers.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _leave)
        deployed.start()
        with commands:
            commands.carry_out(execute)
    except (CheckpointError, ConfigurationError) as error:
        sys.stderr.write(f"{error.message}\n")
        return EXIT_BAD_INPUT
    finally:
        deployment.stop(STOP_GRACEFULLY_S)
    return 0


def _leave(number: int, _: FrameType | None) -> None:
    """Unwind whatever waits, once; a second signal must not disturb the stopping."""
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, signal.SIG_IGN)
    raise SystemExit(0)


if __name__ == "__main__":
    sys.exit(main())
