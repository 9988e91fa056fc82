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
from collections.abc import Callable, Collection, Sequence
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
from library.quarantine import BadFile

logger = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")

INDEX_FILE = "file-index.npz"
_VERSION = 1
_THREADS, _PORTION = 4, 64
_WAITING = 5  # times the processor time
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
    """`function` of each, several at a time: for work that waits for a disk, or is done outside of Python."""

    def portion(start: int) -> list[R]:
        return [function(item) for item in items[start : start + _PORTION]]

    if len(items) <= _PORTION:
        return portion(0)
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(chain.from_iterable(pool.map(portion, range(0, len(items), _PORTION))))


def in_turn(function: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """`function` of each: one after the other, unless the first ones spend most of their time waiting for a disk.

    For work of a few microseconds, at which threads would only fight over the interpreter: 10,000 headers that the system has
    in memory take four times the processor time in four threads.
    """
    began, used = time.perf_counter(), time.thread_time()
    first = [function(item) for item in items[:_PORTION]]
    waits = time.perf_counter() - began > _WAITING * (time.thread_time() - used)
    rest = items[_PORTION:]
    return first + (in_threads(function, rest) if waits else [function(item) for item in rest])


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

    def completed(self, other: Facts) -> Facts:
        """With what `other` knows beside it of the same state of the file."""
        absent = {name: getattr(other, name) for name in ("size", "digest", "look", "text") if getattr(self, name) is None}
        return replace(self, **absent, guessed=self.guessed or ("text" in absent and other.guessed))


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
        self._stored: _Stored | None = None
        """What was read from the file, until `save` lets go of it."""
        self._written: int | None = None
        """When the file was that was read."""

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("an index belongs to one process")

    def holds(self, path: str) -> bool:
        """Whether `path` lies in the folder or below it."""
        return path.startswith(self._prefix)

    def facts(self, path: str) -> Facts:
        """What is known of `path` as it is now. Raises `OSError` where it is not there."""
        status = os.stat(path)
        name = path.removeprefix(self._prefix)
        with self._lock:
            found = self._fresh.get(name) or self._read().facts(name, status.st_size, status.st_mtime_ns)
        if found is None or (found.length, found.time) != (status.st_size, status.st_mtime_ns):
            return Facts(status.st_size, status.st_mtime_ns)
        return found

    def note(self, path: str, facts: Facts) -> None:
        """Keep `facts`, which were found out after the file's length and time had been read."""
        with self._lock:
            self._fresh[path.removeprefix(self._prefix)] = facts
            self._changed = True

    def _read(self) -> _Stored:
        if self._stored is None:
            self._stored, self._written = _Stored.empty(), self._when_written()
            if self._store is not None and self._written is not None:
                found = _Stored.of(read_npz(self._store))
                if found is None:
                    logger.warning(
                        "the index of %s is damaged or of another version, and is made anew: %s", self.root, self._store
                    )
                self._stored = found or self._stored
        return self._stored

    def _when_written(self) -> int | None:
        return self._store.stat().st_mtime_ns if self._store is not None and self._store.exists() else None

    def _read_again(self) -> _Stored:
        """What is in the file now, where another process has written it since: it fills another part of the caches."""
        before = self._read()
        if self._when_written() != self._written:
            self._stored = None
            self._read().meet(before)
        return self._read()

    def save(self, *, complete: bool) -> None:
        """Write the file, if there is something new, and let go of the memory. What cannot be written costs time, not the run.

        complete: a run has asked for all its files. Those that were not met are then kept as long as they are fewer than those
        that were: another run may use other files of the folder. Those that were changed just now are not kept.
        """
        with self._lock:
            newest = time.time_ns() - _SETTLED
            fresh = {name: facts for name, facts in self._fresh.items() if facts.time < newest}
            stored = self._read_again() if self._changed else _Stored.empty()
            if self._store is not None and (fresh or (complete and not stored.is_met_by(self._fresh))):
                try:
                    write_npz(self._store, stored.updated(self._fresh, fresh, complete=complete))
                except UserError as error:
                    logger.warning("the index of %s is not kept, so the next start takes as long: %s", self.root, error)
            self._changed, self._fresh, self._stored = False, {}, None


class _Stored:
    """The content of an index file. Single elements of a column are asked for much faster than records of `rows`."""

    def __init__(self, rows: np.ndarray, names: Texts, texts: Texts) -> None:
        self.rows, self.names, self.texts = rows, names, texts
        self.number_of = {name: number for number, name in enumerate(names)}
        self.met = bytearray(len(rows))
        self.columns = [np.ascontiguousarray(rows[name]) for name in ("length", "time", "known", "size")]

    @classmethod
    def empty(cls) -> _Stored:
        return cls(np.zeros(0, _ROW), Texts.of([]), Texts.of([]))

    @classmethod
    def of(cls, arrays: dict[str, np.ndarray] | None) -> _Stored | None:
        """None where `arrays` (whose checksums were right) are not an index of this version."""
        names = ("version", "rows", "names", "name_starts", "texts", "text_starts")
        if arrays is None or any(name not in arrays for name in names) or int(arrays["version"]) != _VERSION:
            return None
        rows = arrays["rows"]
        for data, starts in (("names", "name_starts"), ("texts", "text_starts")):
            if rows.dtype != _ROW or len(arrays[starts]) != len(rows) + 1 or arrays[starts][-1] != len(arrays[data]):
                return None
        names_of, texts_of = (Texts.of_arrays(arrays[n], arrays[s]) for n, s in (names[2:4], names[4:6]))
        return cls(rows, names_of, texts_of)

    def facts(self, name: str, length: int, changed: int) -> Facts | None:
        """What is known of the file, if it has that length and time."""
        number = self.number_of.get(name)
        if number is None:
            return None
        self.met[number] = 1
        lengths, times, known_of, sizes = self.columns
        if (lengths.item(number), times.item(number)) != (length, changed):
            return None
        known = known_of.item(number)
        return Facts(
            length,
            changed,
            (sizes.item(number, 0), sizes.item(number, 1)) if known & _SIZE else None,
            self.rows["digest"][number].tobytes().hex() if known & _DIGEST else None,
            int(self.rows["look"][number]) if known & _LOOK else None,
            self.texts[number] if known & _TEXT else None,
            bool(known & _GUESSED),
        )

    def meet(self, before: _Stored) -> None:
        """All that was met of an earlier state of the file."""
        for name in self.number_of.keys() & before.number_of.keys():
            self.met[self.number_of[name]] |= before.met[before.number_of[name]]

    def is_met_by(self, noted: Collection[str]) -> bool:
        """Whether there is nothing in it to be replaced or dropped."""
        return not (self.number_of.keys() & noted) and 2 * sum(self.met) >= len(self.met)

    def _completed(self, name: str, facts: Facts) -> Facts:
        known = self.facts(name, facts.length, facts.time)
        return facts if known is None else facts.completed(known)

    def updated(self, noted: Collection[str], fresh: dict[str, Facts], *, complete: bool) -> dict[str, np.ndarray]:
        """The arrays of a new file. noted: names that are replaced or, where they are not in `fresh`, dropped; complete: as of
        `FolderIndex.save`."""
        met, replaced = np.frombuffer(self.met, bool), np.zeros(len(self.rows), bool)
        replaced[[self.number_of[name] for name in self.number_of.keys() & noted]] = True
        others = ~met & ~replaced
        kept = met & ~replaced
        if not complete or others.sum() <= len(noted) + kept.sum():
            kept |= others
        names, texts = TextBuilder(), TextBuilder()
        for number in np.flatnonzero(kept).tolist():
            names.add(self.names[number])
            texts.add(self.texts[number])
        fresh = {name: self._completed(name, facts) for name, facts in fresh.items()}
        for name, facts in fresh.items():
            names.add(name)
            texts.add(facts.text or "")
        arrays: dict[str, np.ndarray] = {"version": np.array(_VERSION)}
        arrays["rows"] = np.concatenate([self.rows[kept], np.array([_to_row(facts) for facts in fresh.values()], _ROW)])
        arrays["names"], arrays["name_starts"] = names.done().arrays()
        arrays["texts"], arrays["text_starts"] = texts.done().arrays()
        return arrays


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
        if str(root) not in self._folders and not any(index.holds(str(root)) for index in self._folders.values()):
            store = cache_path(root / INDEX_FILE, str(self._cache_dir)) if self._cache_dir else None
            self._folders[str(root)] = FolderIndex(str(root), store)

    def open_common(self, paths: Sequence[Path]) -> None:
        """Know of `paths`, by the folder that they have in common; where there is none, each folder is one."""
        folders = {str(path.parent) for path in paths}
        with suppress(ValueError):  # none, or on several drives
            self.open(Path(os.path.commonpath(folders)))

    def _look_up(self, path: Path | str) -> tuple[FolderIndex, str, Facts]:
        """The index that `path` belongs to, its text, and what is known. Raises `BadFile` for a file that is not there."""
        text = str(path)
        index = next((index for index in self._folders.values() if index.holds(text)), None)
        if index is None:
            self.open(Path(path).parent)
            index = self._folders[str(Path(path).parent)]
        try:
            return index, text, index.facts(text)
        except OSError as error:
            raise broken(Path(path), error) from error

    def save(self, *, complete: bool = False) -> None:
        """Write what is new. complete: every file of a run has been asked for, so that what was not is of no use to it."""
        for index in self._folders.values():
            index.save(complete=complete)

    # What can be asked

    def size(self, path: Path) -> Size:
        """`read_size`."""
        size: Size = self._fact(path, "size", read_size)
        return size

    def caption(self, path: Path | str) -> tuple[str, bool]:
        """`read_caption_text`."""
        index, text, facts = self._look_up(path)
        if facts.text is not None:
            return facts.text, facts.guessed
        caption, guessed = read_caption_text(Path(path))
        index.note(text, replace(facts, text=caption, guessed=guessed))
        return caption, guessed

    def look(self, path: Path, find: Callable[[Path], int]) -> int:
        """What `find` (see `library.near_duplicates`) says of the picture."""
        look: int = self._fact(path, "look", find)
        return look

    def digest(self, path: Path) -> str:
        """`content_hash` of the file."""
        digest: str = self._fact(path, "digest", _digest)
        return digest

    def note_digest(self, path: Path, digest: str, length: int, time: int) -> None:
        """Keep the content hash of a file that was read elsewhere, unless it has another length or time by now."""
        with suppress(BadFile):  # gone
            index, text, facts = self._look_up(path)
            if (facts.length, facts.time) == (length, time) and facts.digest is None:
                index.note(text, replace(facts, digest=digest))

    def _fact(self, path: Path, name: str, find: Callable[[Path], Any]) -> Any:
        """The field `name` of what is known of `path`; what `find` says, where it is not known yet."""
        index, text, facts = self._look_up(path)
        known = getattr(facts, name)
        if known is None:
            known = find(path)
            index.note(text, replace(facts, **{name: known}))
        return known


def _digest(path: Path) -> str:
    try:
        return content_hash(path.read_bytes())
    except OSError as error:
        raise broken(path, error) from error
