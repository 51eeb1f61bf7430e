"""Which files of the standard library the model reads, and which it never sees."""

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

# Tests say little about how code is written, and the rest is generated tables or long data.
_SKIPPED_FOLDERS = frozenset(
    {
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idle_test",
        "pydoc_data",
        "encodings",
        "__pycache__",
    }
)
_SKIPPED_FILES = ("_sysconfigdata", "html/entities.py", "locale.py", "__phello__")


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFile:
    """One Python file; `path` is relative to the standard library and uses forward slashes."""

    path: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """The two sides of the split, each in path order."""

    train: tuple[SourceFile, ...]
    heldout: tuple[SourceFile, ...]


def standard_library() -> Path:
    """Folder of the running interpreter's own Python sources."""
    return Path(sysconfig.get_path("stdlib"))


def read_sources(root: Path) -> list[SourceFile]:
    """Every readable `.py` file under `root` worth learning from, in path order."""
    sources = []
    for file in sorted(root.rglob("*.py")):
        relative = file.relative_to(root)
        if _SKIPPED_FOLDERS.isdisjoint(relative.parts) and not relative.as_posix().startswith(
            _SKIPPED_FILES
        ):
            text = file.read_bytes().decode("utf-8", errors="replace").replace("\r\n", "\n")
            if text.strip() and "\ufffd" not in text:
                sources.append(SourceFile(path=relative.as_posix(), text=text.expandtabs(8)))
    return sources


def split(sources: list[SourceFile], heldout_fraction: float, seed: int) -> Corpus:
    """Hold out whole files by a hash of their path; adding a file never moves another one."""
    heldout = [_unit_hash(source.path, seed) < heldout_fraction for source in sources]
    return Corpus(
        train=tuple(source for source, held in zip(sources, heldout, strict=True) if not held),
        heldout=tuple(source for source, held in zip(sources, heldout, strict=True) if held),
    )


def _unit_hash(path: str, seed: int) -> float:
    digest = hashlib.sha256(f"{seed}:{path}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
