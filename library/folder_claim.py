"""Runs that write to one folder at the same time: which of them this one has to keep out of the way of.

The lock is the operating system's, so that one of a killed run holds nobody up.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from library.errors import UserError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

logger = logging.getLogger(__name__)

SUFFIX = ".running"


@contextmanager
def claimed(folder: Path, name: str) -> Iterator[bool]:
    """Inside, no other run called `name` writes to `folder`; a `UserError` where one does. Gives whether none at all does."""
    own = folder / f".{name.replace('/', '_')}{SUFFIX}"
    with own.open("a") as file:
        if not _lock(file):
            raise UserError(
                f"another run called {name} is writing to {folder}, and both would replace each other's files. Wait for it, "
                f"stop it (with a file {folder / 'stop'}), or choose another --output_name or --output_dir."
            )
        others = [path for path in folder.glob(f".*{SUFFIX}") if path != own and _is_running(path)]
        if others:
            logger.warning(
                "another run (%s) is writing to %s. It keeps metrics.csv, image_losses.csv and the files that ask something of "
                "a run (stop, save_now, sample_now); the logs of this one begin with its name. Better give each run a folder",
                ", ".join(path.name[1 : -len(SUFFIX)] for path in others),
                folder,
            )
        try:
            yield not others
        finally:
            file.close()  # Windows removes no file that is open
            own.unlink(missing_ok=True)


def _is_running(path: Path) -> bool:
    """Whether a run holds the lock `path`; what a killed one left is removed."""
    try:
        with path.open("a") as file:
            held = not _lock(file)
        if not held:
            path.unlink(missing_ok=True)
    except OSError:  # somebody else's
        return False
    return held


def _lock(file: IO[str]) -> bool:
    """False where another process has it. Locks of this kind do not pass to children, which may live a little longer."""
    try:
        if sys.platform == "win32":
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:  # a file system without locks: nothing is known
        return True
    return True
