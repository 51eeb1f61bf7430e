"""Download what one process will read of a hub's model, before it is started.

    python -m services.core.checkpoints.fetch --experts 0,1 --layers 0-27   # of an expert worker
    python -m services.core.checkpoints.fetch --shared                      # of an attention shard
    python -m services.core.checkpoints.fetch --metadata                    # of a gateway

The model is the one of the settings. Files land in the hub library's cache (`HF_HOME`), whole: of
a file that holds other tensors too, those come along. Nothing is done for a local folder but to
check that it holds the tensors. Exit status 2 and a line on stderr when something is missing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from services.core.checkpoints.checkpoint import Checkpoint
from services.core.checkpoints.hub import find_model
from services.core.errors import EXIT_BAD_INPUT, ConfigurationError, ExpertfleetError
from services.core.registry_json import parse_ranges
from services.core.settings import load_settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Needed:
    """Indices as in "0,4-6"; `layers` None: all. Config and tokenizer are always needed."""

    experts: str | None = None
    layers: str | None = None
    shared: bool = False


def fetch(model: str, needed: Needed) -> Sequence[str]:
    """Returns the names of the weight files. Raises `CheckpointError` or `ConfigurationError`."""
    if needed.experts is None and not needed.shared:
        find_model(model)
        return ()
    checkpoint = Checkpoint.open(model)
    config = checkpoint.config
    experts = _indices(needed.experts, "experts", 0, config.num_local_experts)
    layers = _indices(needed.layers, "layers", config.num_hidden_layers, config.num_hidden_layers)
    slots = [(layer, expert) for layer in layers for expert in experts]
    checkpoint.require(slots=slots, non_expert=needed.shared)
    return sorted(checkpoint.opened_files)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m services.core.checkpoints.fetch")
    parser.add_argument("--experts", help="expert indices, e.g. 0,1 or 4-7")
    parser.add_argument("--layers", help="layers, e.g. 0-15; default: all")
    parser.add_argument("--shared", action="store_true", help="attention, gates and head")
    parser.add_argument("--metadata", action="store_true", help="config and tokenizer alone")
    given = parser.parse_args(arguments)
    if not (given.experts or given.shared or given.metadata):
        parser.error("say what is needed: --experts, --shared or --metadata")
    try:
        files = fetch(
            load_settings().model,
            Needed(experts=given.experts, layers=given.layers, shared=given.shared),
        )
    except ExpertfleetError as error:
        sys.stderr.write(f"{error.message}\n")
        return EXIT_BAD_INPUT
    sys.stdout.write(f"there: {', '.join(files) or 'config and tokenizer'}\n")
    return 0


def _indices(text: str | None, name: str, default: int, count: int) -> Sequence[int]:
    """Those of `text`, or the first `default`."""
    if text is None:
        return range(default)
    try:
        indices = parse_ranges(text)
    except ValueError as error:
        raise ConfigurationError(
            f"--{name} {text!r} cannot be read ({error}); write it like 0,4-6", setting=name
        ) from error
    if max(indices) >= count:
        raise ConfigurationError(
            f"--{name} {text!r}: the model has {name} 0 to {count - 1}", setting=name
        )
    return indices


if __name__ == "__main__":
    sys.exit(main())
