"""What earlier runs found out about data files: sizes of pictures, captions, content hashes.

It is kept in one file for each picture folder, in `--cache_dir` or the user's own cache folder, as picture folders may be
read-only. What is known of a file holds as long as its length and time are those it had. A file that was changed just before
it was read is not kept, as another change within the clock's step would not show.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from library.buckets import Size
from library.cache_io import cache_path, read_npz, write_npz
from library.compact import TextBuilder, Texts
from library.errors import UserError
from library.image_io import broken, content_hash, read_size
from library.metadata_file import read_caption_text

logger = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")

INDEX_FILE = "file-index.npz"
_VERSION = 1
_THREADS, _PORTION = 8, 64
_SETTLED = 2_000_000_000  # nanoseconds: the step of the coarsest clock that file systems have (FAT)


def user_cache_folder() -> Path:
    """Where the system wants programs to keep what they can make again."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "image-diffusion-trainer"


def in_threads(function: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """`function` of each, several at a time: most of the time goes by while the disk or the network answers."""

    def portion(start: int) -> list[R]:
        return [function(item) for item in items[start : start + _PORTION]]

    if len(items) <= _PORTION:
        return portion(0)
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(chain.from_iterable(pool.map(portion, range(0, len(items), _PORTION))))


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of one file of `length` bytes, last changed at `time` (nanoseconds). None: not known."""

    length: int
    time: int
    size: Size | None = None
    """Of an upright picture."""
    digest: str | None = None
    """Content hash."""
    look: int | None = None
    """64 bits: see `library.near_duplicates`."""
    text: str | None = None
    """Of a caption file."""
    guessed: bool = False
    """Whether the encoding of `text` is a guess."""

    @classmethod
    def of(cls, path: Path) -> Facts:
        """Those that the folder tells. Raises `OSError`."""
        status = os.stat(path)
        return cls(status.st_size, status.st_mtime_ns)


_ROW = np.dtype(
    [
        ("length", np.int64),
        ("time", np.int64),
        ("known", np.uint8),  # bits: which of the following are
        ("size", np.int32, 2),
        ("digest", np.uint8, 16),
        ("look", np.uint64),
    ]
)
_SIZE, _DIGEST, _LOOK, _TEXT, _GUESSED = (1 << bit for bit in range(5))


def _to_row(facts: Facts) -> tuple[Any, ...]:
    values = {_SIZE: facts.size, _DIGEST: facts.digest, _LOOK: facts.look, _TEXT: facts.text}
    known = sum(bit for bit, value in values.items() if value is not None) | (_GUESSED if facts.guessed else 0)
    digest = np.frombuffer(bytes.fromhex(facts.digest or "00" * 16), np.uint8)
    return facts.length, facts.time, known, facts.size or (0, 0), digest, facts.look or 0


class FolderIndex:
    """The files of one folder and of those below it. Safe to use from several threads."""

    def __init__(self, root: str, store: Path | None) -> None:
        self.root = root
        self._prefix = root if root.endswith(("/", os.sep)) else root + os.sep
        self._store = store
        """Where it is kept; None: nowhere."""
        self._fresh: dict[str, Facts] = {}
        self._changed = False
        self._lock = threading.Lock()
        self._rows: np.ndarray | None = None
        """What was read from the file, until `save` lets go of it."""
        self._texts = self._names = Texts.of([])
        self._row_of: dict[str, int] = {}
        self._met: np.ndarray = np.zeros(0, bool)

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("an index belongs to one process")

    def holds(self, path: Path) -> bool:
        """Whether `path` lies in the folder or below it."""
        return str(path).startswith(self._prefix)

    # Questions

    def facts(self, path: Path) -> Facts:
        """What is known of `path` as it is now. Raises `OSError` where it is not there."""
        now = Facts.of(path)
        name = self._name(path)
        with self._lock:
            found = self._fresh.get(name) or self._stored(name)
        return found if found is not None and (found.length, found.time) == (now.length, now.time) else now

    def note(self, path: Path, facts: Facts) -> None:
        """Keep `facts`, which were found out after the file's length and time had been read."""
        with self._lock:
            self._fresh[self._name(path)] = facts
            self._changed = True

    def _name(self, path: Path) -> str:
        return str(path).removeprefix(self._prefix)

    # The file

    def _load(self) -> np.ndarray:
        if self._rows is not None:
            return self._rows
        self._rows = np.zeros(0, _ROW)
        if self._store is not None and self._store.exists():
            arrays = read_npz(self._store)
            if arrays is None or not self._fill(arrays):
                logger.warning(
                    "the index of %s is damaged, or of another version, and is made anew: %s", self.root, self._store
                )
        return self._rows

    def _fill(self, arrays: dict[str, np.ndarray]) -> bool:
        """Whether `arrays` (whose checksums were right) are an index of this version."""
        names = ("version", "rows", "names", "name_starts", "texts", "text_starts")
        if any(name not in arrays for name in names) or int(arrays["version"]) != _VERSION:
            return False
        rows = arrays["rows"]
        if rows.dtype != _ROW:
            return False
        for data, starts in (("names", "name_starts"), ("texts", "text_starts")):
            if len(arrays[starts]) != len(rows) + 1 or arrays[starts][-1] != len(arrays[data]):
                return False
        self._names = Texts.of_arrays(arrays["names"], arrays["name_starts"])
        self._texts = Texts.of_arrays(arrays["texts"], arrays["text_starts"])
        self._row_of = {name: number for number, name in enumerate(self._names)}
        self._rows, self._met = rows, np.zeros(len(rows), bool)
        return True

    def _stored(self, name: str) -> Facts | None:
        self._load()
        number = self._row_of.get(name)
        if number is None:
            return None
        self._met[number] = True
        return self._facts_at(number)

    def _facts_at(self, number: int) -> Facts:
        length, changed, known, (width, height), digest, look = self._load()[number].item()
        return Facts(
            length,
            changed,
            (width, height) if known & _SIZE else None,
            bytes(digest).hex() if known & _DIGEST else None,
            look if known & _LOOK else None,
            self._texts[number] if known & _TEXT else None,
            bool(known & _GUESSED),
        )

    def save(self) -> None:
        """Write the file, if there is something new, and let go of the memory. What cannot be written costs time, not the run.

        Files that were not met are kept as long as they are fewer than those that were: another run may use other files of
        the folder.
        """
        with self._lock:
            if self._changed and self._store is not None:
                try:
                    self._write(self._store)
                except UserError as error:
                    logger.warning("the index of %s is not kept, so the next start takes as long: %s", self.root, error)
            self._changed = False
            self._fresh, self._rows, self._row_of = {}, None, {}
            self._texts = self._names = Texts.of([])

    def _write(self, store: Path) -> None:
        rows, newest = self._load(), time.time_ns() - _SETTLED
        replaced = np.zeros(len(rows), bool)
        for name in self._fresh.keys() & self._row_of.keys():
            replaced[self._row_of[name]] = True
        others = ~self._met & ~replaced
        kept = ~replaced if others.sum() <= len(self._fresh) + (self._met & ~replaced).sum() else self._met & ~replaced
        fresh = {name: facts for name, facts in self._fresh.items() if facts.time < newest}
        if not fresh and kept.all():
            return
        names, texts = TextBuilder(), TextBuilder()
        for number in np.flatnonzero(kept).tolist():
            names.add(self._names[number])
            texts.add(self._texts[number])
        for name, facts in fresh.items():
            names.add(name)
            texts.add(facts.text or "")
        arrays: dict[str, np.ndarray] = {}
        arrays["names"], arrays["name_starts"] = names.done().arrays()
        arrays["texts"], arrays["text_starts"] = texts.done().arrays()
        added = np.array([_to_row(facts) for facts in fresh.values()], _ROW)
        write_npz(store, {"version": np.array(_VERSION), "rows": np.concatenate([rows[kept], added]), **arrays})


class KnownFiles:
    """The data files of a run, and what is known of them. cache_dir: where indexes are kept; None: nowhere."""

    def __init__(self, cache_dir: Path | None = None) -> None:
        self._cache_dir = cache_dir
        self._folders: dict[str, FolderIndex] = {}

    @classmethod
    def of_user(cls, cache_dir: str | None) -> KnownFiles:
        """cache_dir: `--cache_dir`."""
        return cls(Path(cache_dir) if cache_dir else user_cache_folder())

    def open(self, root: Path) -> None:
        """Know of files in `root` and below from now on, unless a folder that contains it is open."""
        if str(root) not in self._folders and self._find(root) is None:
            store = cache_path(root / INDEX_FILE, str(self._cache_dir)) if self._cache_dir else None
            self._folders[str(root)] = FolderIndex(str(root), store)

    def open_common(self, paths: Sequence[Path]) -> None:
        """Know of `paths`, by the folder that they have in common; where there is none, each folder is one."""
        folders = {str(path.parent) for path in paths}
        with suppress(ValueError):  # none, or on several drives
            self.open(Path(os.path.commonpath(folders)))

    def _find(self, path: Path) -> FolderIndex | None:
        return next((index for index in self._folders.values() if index.holds(path)), None)

    def _look_up(self, path: Path) -> tuple[FolderIndex, Facts]:
        """The index that `path` belongs to, and what is known. Raises `BadFile` for a file that is not there."""
        index = self._find(path)
        if index is None:
            self.open(path.parent)
            index = self._folders[str(path.parent)]
        try:
            return index, index.facts(path)
        except OSError as error:
            raise broken(path, error) from error

    def save(self) -> None:
        """Write what is new."""
        for index in self._folders.values():
            index.save()

    # What can be asked

    def size(self, path: Path) -> Size:
        """`read_size`."""
        index, facts = self._look_up(path)
        if facts.size is None:
            facts = replace(facts, size=read_size(path))
            index.note(path, facts)
        assert facts.size is not None
        return facts.size

    def caption(self, path: Path) -> tuple[str, bool]:
        """`read_caption_text`."""
        index, facts = self._look_up(path)
        if facts.text is None:
            text, guessed = read_caption_text(path)
            facts = replace(facts, text=text, guessed=guessed)
            index.note(path, facts)
        assert facts.text is not None
        return facts.text, facts.guessed

    def digest(self, path: Path) -> str:
        """`content_hash` of the file."""
        index, facts = self._look_up(path)
        if facts.digest is None:
            try:
                facts = replace(facts, digest=content_hash(path.read_bytes()))
            except OSError as error:
                raise broken(path, error) from error
            index.note(path, facts)
        assert facts.digest is not None
        return facts.digest
