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
        for path in _files_in(folder):
            if not TEMPORARY.fullmatch(path.name):
                continue
            with contextlib.suppress(OSError):  # another process may have been here first
                if time.time() - path.stat().st_mtime > _ABANDONED:
                    path.unlink()


def prune_readings(wanted: Iterable[Path], text_format: TextFormat, keep: int) -> int:
    """Remove readings of captions that are not among the `wanted` files, of each picture that has one there.

    keep: as many of them as are left, those used last; a run with another seed or an edited caption may find them again.
    Gives the number removed.
    """
    stem, extension = os.path.splitext(text_format.suffix)
    reading = re.compile(rf"(.*{re.escape(stem)})_[0-9a-f]{{8}}{re.escape(extension)}")
    wanted = set(wanted)
    pictures = set()
    for path in wanted:
        match = reading.fullmatch(path.name)
        pictures.add(path if match is None else path.with_name(match[1] + extension))
        if match is not None:
            with contextlib.suppress(OSError):  # in a folder that cannot be written, nothing is removed either
                os.utime(path)
    others: dict[Path, list[tuple[float, Path]]] = defaultdict(list)
    for folder in {path.parent for path in wanted}:
        for path in _files_in(folder):
            match = reading.fullmatch(path.name)
            if match is not None and path not in wanted:
                others[path.with_name(match[1] + extension)].append((path.stat().st_mtime, path))
    removed = 0
    for picture, found in others.items():
        if picture in pictures:
            removed += sum(_remove_ours(path) for _, path in sorted(found, reverse=True)[keep:])
    if removed:
        logger.info("%d cached captions that no picture has had lately were removed", removed)
    return removed


def _files_in(folder: Path) -> list[Path]:
    return [Path(entry) for entry in os.scandir(folder)] if folder.is_dir() else []


def _remove_ours(path: Path) -> bool:
    arrays = read_npz(path)
    if arrays is None or "fingerprint" not in arrays:
        return False
    with contextlib.suppress(OSError):
        path.unlink()
        return True
    return False
