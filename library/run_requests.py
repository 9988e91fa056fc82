"""What is asked of a run while it trains: by Ctrl-C or SIGTERM, or by a file in its output folder."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from library.interrupts import InterruptFlag

logger = logging.getLogger(__name__)

STOP, SAVE, SAMPLE = "stop", "save", "sample"
REQUESTS = (STOP, SAVE, SAMPLE)
FILES = {"stop": STOP, "save_now": SAVE, "sample_now": SAMPLE}
"""File name in the output folder -> what it asks for. The file is removed when it is seen."""
SECONDS_BETWEEN_LOOKS = 1.0


class RunRequests:
    """Requests to this process. The output folder is the main process's, so only that one looks there."""

    def __init__(self, folder: Path | None) -> None:
        """folder: the output folder; None on processes that do not look for files."""
        self.folder = folder
        self.interrupt = InterruptFlag()
        self._looked = 0.0

    @contextmanager
    def heard(self) -> Iterator[None]:
        """While entered, signals are requests. Files left from before the run ask nothing of it."""
        self._take_files()
        with self.interrupt:
            yield

    def poll(self) -> tuple[bool, ...]:
        """Of each of `REQUESTS`, whether it is asked for now. A file's request is given once."""
        asked = {STOP} if self.interrupt.requested else set()
        now = time.monotonic()
        if self.folder is not None and now - self._looked >= SECONDS_BETWEEN_LOOKS:
            self._looked = now
            asked |= set(self._take_files())
        return tuple(name in asked for name in REQUESTS)

    def _take_files(self) -> Iterable[str]:
        found = []
        for name, request in FILES.items() if self.folder is not None else ():
            path = self.folder / name  # type: ignore[operator]
            try:
                path.unlink()
            except FileNotFoundError:
                continue
            except OSError as error:
                logger.warning("%s cannot be removed, so it is not acted on: %s", path, error.strerror)
                continue
            logger.info("%s: asked to %s", path, request)
            found.append(request)
        return found
