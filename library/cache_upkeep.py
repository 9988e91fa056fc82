"""What is removed from cache folders: readings of captions that no run has asked for lately, and what a killed run left.

Nothing else is, and never a file that we did not write.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from library.cache_formats import TextFormat
from library.cache_io import TEMPORARY, read_npz

logger = logging.getLogger(__name__)

_ABANDONED = 3600.0  # seconds: a file that is still being written is younger


def remove_leftovers(folders: Iterable[Path]) -> None:
    """Remove temporary files of writers that were killed."""
    for folder in folders:
        for entry in os.scandir(folder) if folder.is_dir() else ():
            if not TEMPORARY.fullmatch(entry.name):
                continue
            with contextlib.suppress(OSError):  # another process may have been here first
                if time.time() - entry.stat().st_mtime > _ABANDONED:
                    os.unlink(entry.path)


def prune_readings(wanted: Iterable[Path], text_format: TextFormat, keep: int) -> int:
    """Remove readings of captions that are not among the `wanted` files, of each picture that has one there.

    keep: as many of them as are left, those used last; a run with another seed or an edited caption may find them again.
    Gives the number removed.
    """
    stem, extension = os.path.splitext(text_format.suffix)
    reading = re.compile(rf"(.*{re.escape(stem)})_[0-9a-f]{{8}}{re.escape(extension)}")
    names: dict[str, set[str]] = defaultdict(set)  # by folder
    for path in wanted:
        folder, name = os.path.split(path)
        names[folder].add(name)
    removed = sum(_prune_folder(folder, own, reading, extension, keep) for folder, own in names.items())
    if removed:
        logger.info("%d cached captions that no picture has had lately were removed", removed)
    return removed


def _prune_folder(folder: str, wanted: set[str], reading: re.Pattern[str], extension: str, keep: int) -> int:
    pictures = set()
    for name in wanted:
        match = reading.fullmatch(name)
        pictures.add(name if match is None else match[1] + extension)
        if match is not None:
            with contextlib.suppress(OSError):  # in a folder that cannot be written, nothing is removed either
                os.utime(os.path.join(folder, name))
    others: dict[str, list[tuple[float, str]]] = defaultdict(list)
    for entry in os.scandir(folder) if os.path.isdir(folder) else ():
        match = reading.fullmatch(entry.name)
        if match is not None and entry.name not in wanted and match[1] + extension in pictures:
            others[match[1]].append((entry.stat().st_mtime, entry.path))
    return sum(_remove_ours(Path(path)) for found in others.values() for _, path in sorted(found, reverse=True)[keep:])


def _remove_ours(path: Path) -> bool:
    arrays = read_npz(path)
    if arrays is None or "fingerprint" not in arrays:
        return False
    with contextlib.suppress(OSError):
        path.unlink()
        return True
    return False
