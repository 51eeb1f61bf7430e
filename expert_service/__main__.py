"""`python -m expert_service`: one expert worker, without the rest of the product's command line."""

from __future__ import annotations

import argparse
import sys

from expert_service.main import run_worker
from services.core.errors import EXIT_BAD_INPUT, ConfigurationError
from services.core.settings import load_settings


def main() -> int:
    arguments = _parser().parse_args()
    try:
        settings = load_settings(
            model=arguments.model,
            dtype=arguments.dtype,
            device=arguments.device,
            expert_weights=arguments.expert_weights,
        )
    except ConfigurationError as error:
        sys.stderr.write(f"{error.message}\n")
        return EXIT_BAD_INPUT
    return run_worker(
        settings,
        experts=arguments.experts,
        layers=arguments.layers,
        slots=arguments.slots,
        host=arguments.host,
        port=arguments.port,
        worker_id=arguments.worker_id,
        metrics_port=arguments.metrics_port,
        advertised_host=arguments.advertised_host,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m expert_service", description=__doc__)
    parser.add_argument("--model", help="folder of a checkpoint, or a hub id")
    parser.add_argument("--experts", help="expert indices, e.g. 0,1 or 4-7")
    parser.add_argument("--layers", help="layers, e.g. 0-15; default: all")
    parser.add_argument("--slots", help="instead: layers:experts;..., e.g. 0-3:0,1;5:7")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=0, help="gRPC port; 0 picks a free one")
    parser.add_argument("--metrics-port", type=int, default=0, help="Prometheus port")
    parser.add_argument("--worker-id", help="name in the registry; default: a random one")
    parser.add_argument("--advertised-host", help="where others reach this worker")
    parser.add_argument("--dtype", help="auto, bfloat16, float16 or float32")
    parser.add_argument("--device", help="cpu, cuda, cuda:N or auto")
    parser.add_argument("--expert-weights", help="auto, int8 or int4; auto: as they are stored")
    return parser


if __name__ == "__main__":
    sys.exit(main())
