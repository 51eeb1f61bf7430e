"""Renewing every process of a running product, one after the other, while it serves.

With the same model each process is followed by one like it. Another model's workers, shards and
gateway come up beside those that serve, in a namespace of the store of their own, so that nothing
ever sees weights of both; what the old gateway has accepted ends on the old shards and workers.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

from services.cli.fleet_workers import FleetWorkers
from services.cli.front import Front
from services.cli.startup import fits_beside, memory_available
from services.core.checkpoints.hub import find_model
from services.core.errors import InvalidRequestError, UnavailableError
from services.core.model_config import load_model_config
from services.core.settings import Settings

What = Literal["workers", "shards", "gateway", "all"]
Progress = Callable[[str], None]

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")


def parse_what(text: object) -> What:
    """Raises `InvalidRequestError`."""
    for what in get_args(What):
        if text == what:
            return what  # type: ignore[no-any-return]
    known = ", ".join(get_args(What))
    raise InvalidRequestError(f"{text!r} cannot be restarted; there are {known}")


class RollingRestart:
    """Over `workers` (none where experts are in the shards' process) and `front`."""

    def __init__(self, workers: FleetWorkers, front: Front, progress: Progress) -> None:
        self._workers = workers
        self._front = front
        self._progress = progress

    async def renew(self, what: What, settings: Settings) -> None:
        """Restart `what`, each process with the model it has."""
        if what in ("workers", "all"):
            for worker_id in self._workers.ids:
                new_id = await self._workers.renew(worker_id)
                self._progress(f"{new_id} serves in place of {worker_id}")
        if what in ("shards", "all"):
            await self._front.restart_shards(settings)
            self._progress("the shards are new")
        if what in ("gateway", "all") and not (what == "all" and self._front.is_one_process):
            await self._front.restart_gateway(settings)
            self._progress("the gateway is new")

    async def change_model(self, model: str, settings: Settings) -> Settings:
        """Serve `model` in the place of what `settings` name; returns the new settings.

        Raises `ExpertfleetError`, and the old model is served on, when the new one differs in more
        than its weights, does not fit into memory beside the old one, or does not start.
        """
        changed = settings.override(
            model=model,
            served_model_name=_served_name(settings),
            fleet=next_fleet(settings.fleet),
        )
        _refuse_another_shape(settings, changed)
        old_ids = self._workers.ids
        placement = await self._placement(old_ids)
        new_ids: list[str] = []
        self._workers.settings = changed
        try:
            if placement:
                new_ids = await self._workers.start(placement)
                self._progress(f"{', '.join(new_ids)} hold the experts of {model}")
            await self._front.replace(changed)
        except BaseException:
            self._workers.settings = settings
            for worker_id in new_ids:
                await self._workers.remove(worker_id)
            raise
        self._progress(f"shards and gateway serve {model}")
        for worker_id in old_ids:
            await self._workers.remove(worker_id)
        return changed

    async def _placement(self, worker_ids: tuple[str, ...]) -> list[frozenset[tuple[int, int]]]:
        """What each worker holds now. Raises unless there is memory for all of it once more."""
        if not worker_ids:
            return []
        ready = await self._workers.ready()
        missing = set(worker_ids) - set(ready)
        if missing:
            away = ", ".join(sorted(missing))
            raise UnavailableError(f"workers that do not serve now: {away}; try again later")
        wanted, available = sum(r.weight_bytes for r in ready.values()), memory_available()
        if not fits_beside(wanted, available):
            raise UnavailableError(
                f"the new model's experts take {wanted / 2**20:.0f} MiB beside the old ones', and "
                f"{available / 2**20:.0f} MiB are free; stop `expertfleet up` and start it again"
            )
        return [ready[worker_id].slots for worker_id in worker_ids]


def next_fleet(fleet: str) -> str:
    """ "default" -> "default-2" -> "default-3": the namespace of the next model's processes."""
    match = re.fullmatch(r"(.+)-(\d+)", fleet)
    return f"{match[1]}-{int(match[2]) + 1}" if match else f"{fleet}-2"


def _served_name(settings: Settings) -> str:
    """The model goes on under the name that clients use."""
    # Imported here: it brings the tokeniser, which the command line does without.
    from services.gateway.served_model import served_name

    return settings.served_model_name or served_name(settings.model)


def _refuse_another_shape(old: Settings, new: Settings) -> None:
    """Raises `InvalidRequestError` unless the models differ in nothing but weights."""
    old_folder, new_folder = find_model(old.model).folder, find_model(new.model).folder
    if load_model_config(old_folder) != load_model_config(new_folder):
        raise InvalidRequestError(
            f"{new.model} has another config.json than {old.model}; only weights can be changed "
            "while serving"
        )
    for name in _TOKENIZER_FILES:
        if _bytes_of(old_folder / name) != _bytes_of(new_folder / name):
            raise InvalidRequestError(
                f"{new.model} has another {name} than {old.model}; only weights can be changed "
                "while serving"
            )


def _bytes_of(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None
