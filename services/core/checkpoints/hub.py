"""Models named by a hub id. Each process downloads what it needs and nothing else.

The huggingface_hub library reads its own environment: `HF_ENDPOINT`, `HF_HOME`, `HF_TOKEN`,
`HF_HUB_OFFLINE` and the rest.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import HfApi, constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # the base class of the HTTP library's errors
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

from services.core.checkpoints.model_files import LocalFolder, ModelFiles, Progress
from services.core.errors import CheckpointError

METADATA_PATTERNS = (
    "config.json",
    "generation_config.json",
    "params.json",
    "*.safetensors.index.json",
    "tokenizer*.json",
    "tokenizer.model*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tekken.json",
    "chat_template.*",
)
"""Small files that come with a model in any case."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_Result = TypeVar("_Result")


def find_model(
    model: str, *, cache_dir: Path | None = None, progress: Progress | None = None
) -> ModelFiles:
    """The files of a folder or of a hub id, whichever `model` names; a folder takes precedence.

    A hub model's config, tokenizer and index files are downloaded before this returns, into
    `cache_dir` or the library's own cache. Raises `CheckpointError`.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return LocalFolder(folder)
    if folder.exists():
        raise CheckpointError(
            f"{folder} is a file; give the folder that holds config.json", file=str(folder)
        )
    if not _HUB_ID.fullmatch(model):
        raise CheckpointError(
            f"there is no folder {folder}; give the folder of a checkpoint, "
            "or a hub id of the form owner/name",
            file=str(folder),
        )
    return HubSnapshot(model, cache_dir=cache_dir, progress=progress)


class HubSnapshot:
    """One commit of a hub repository, the latest when this is made.

    When the hub cannot be reached, the commit that was last downloaded is used, and `names` are
    the files that are there.
    """

    def __init__(
        self,
        model_id: str,
        *,
        cache_dir: Path | None = None,
        progress: Progress | None = None,
        endpoint: str | None = None,
    ) -> None:
        self._endpoint = endpoint or constants.ENDPOINT
        self._model_id = model_id
        self._cache_dir = cache_dir
        self._progress = progress
        self._revision: str | None = None
        self.folder = self._fetch_config().parent
        self._revision = self.folder.name
        self.names = self._list_files()
        for name in sorted(self.names):
            if any(fnmatchcase(name, pattern) for pattern in METADATA_PATTERNS):
                self.fetch(name)

    def fetch(self, name: str) -> Path:
        """Raises `CheckpointError` saying what keeps the file from being downloaded."""
        bar = _bar_class(self._progress, name) if self._progress else None

        def download() -> str:
            return str(
                hf_hub_download(
                    self._model_id,
                    name,
                    revision=self._revision,
                    cache_dir=self._cache_dir,
                    tqdm_class=bar,
                    endpoint=self._endpoint,
                )
            )

        return Path(self._ask(name, download))

    def tensor_names(self, name: str) -> Collection[str]:
        if (self.folder / name).is_file():
            return LocalFolder(self.folder).tensor_names(name)
        metadata = self._ask(
            name,
            lambda: HfApi(endpoint=self._endpoint).parse_safetensors_file_metadata(
                self._model_id, name, revision=self._revision
            ),
        )
        return metadata.tensors.keys()

    def _fetch_config(self) -> Path:
        try:
            return self.fetch("config.json")
        except CheckpointError as error:
            there = try_to_load_from_cache(self._model_id, "params.json", self._cache_dir)
            if isinstance(error, _FileNotInRepositoryError) or isinstance(there, str):
                return self.fetch("params.json")
            raise

    def _list_files(self) -> frozenset[str]:
        try:
            info = HfApi(endpoint=self._endpoint).model_info(
                self._model_id, revision=self._revision
            )
        except (HTTPError, OfflineModeIsEnabled):
            return LocalFolder(self.folder).names
        files = (file.rfilename for file in info.siblings or ())
        return frozenset(name for name in files if "/" not in name)

    def _ask(self, name: str, request: Callable[[], _Result]) -> _Result:
        """Run a request to the hub and say in our words what went wrong with it."""
        model, hub = self._model_id, self._endpoint
        try:
            return request()
        except GatedRepoError as error:
            raise self._error(
                f"{model} is gated: accept its terms at {hub}/{model} and set HF_TOKEN", name
            ) from error
        except (RepositoryNotFoundError, HFValidationError) as error:
            raise self._error(
                f"there is no folder {model} here, and {hub} has no model of that id that it would "
                "show us; check the spelling, and set HF_TOKEN if it is private",
                name,
            ) from error
        except (RemoteEntryNotFoundError, RevisionNotFoundError) as error:
            raise _FileNotInRepositoryError(
                f"{model} at {hub} has no file {name}", file=name, model=model
            ) from error
        except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
            raise self._error(
                f"{name} of {model} is not in the local cache, and {hub} cannot be reached; "
                "check the network, HF_ENDPOINT and HF_HUB_OFFLINE, or give a local folder",
                name,
            ) from error
        except (HTTPError, HfHubHTTPError, OSError) as error:
            raise self._error(
                f"{name} of {model} cannot be had from {hub}: {error}", name
            ) from error

    def _error(self, message: str, name: str) -> CheckpointError:
        return CheckpointError(message, file=name, model=self._model_id)


class _FileNotInRepositoryError(CheckpointError):
    """The repository was reached and has no such file."""


def _bar_class(progress: Progress, name: str) -> type[Any]:
    """The library reports a download to progress bars of a class it is given; this one passes on
    the furthest that any of them is, and shows nothing."""
    furthest = 0

    class Bar(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **(options | {"disable": True}))  # type: ignore[no-untyped-call]
            self._done = int(options.get("initial") or 0)
            self._total_bytes = int(options.get("total") or 0)

        def update(self, n: float | None = 1) -> None:
            nonlocal furthest
            self._done += int(n or 0)
            furthest = max(furthest, self._done)
            progress(furthest, max(furthest, self._total_bytes), f"downloading {name}")

    return Bar
