"""Data files that cannot be used. They are left out, listed in the output folder and counted; --strict_data makes them errors.

Nothing of the user's is changed. A file may turn out bad at any time: when its header is read, when it is decoded for a
cache, or, in a data loader's worker, in the middle of the run.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from library.errors import UserError

logger = logging.getLogger(__name__)

QUARANTINE_FILE = "quarantine.jsonl"


class BadFile(UserError):
    """One picture, mask or caption that cannot be used, and why."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"cannot use {path}: {reason}. Replace or remove the file.")
        self.path, self.reason = path, reason

    def __reduce__(self) -> tuple[type[BadFile], tuple[Path, str]]:
        return BadFile, (self.path, self.reason)


@dataclass
class Quarantine:
    """The bad files of a run. Every process has its own; what they share is the file."""

    folder: Path | None = None
    """Where the list is written; None: nowhere."""
    strict: bool = False
    found: dict[Path, str] = field(default_factory=dict)
    """Those this process knows of, with the reasons."""

    @property
    def path(self) -> Path | None:
        return self.folder / QUARANTINE_FILE if self.folder else None

    def collect(self, bad: Sequence[BadFile]) -> None:
        """Put several down together. Strict: raise `UserError` with all of them."""
        if self.strict and bad:
            lines = "".join(f"\n  {one.path}: {one.reason}" for one in bad)
            raise UserError(f"{len(bad)} files cannot be used (--strict_data):{lines}")
        self.found |= {one.path: one.reason for one in bad}

    def add(self, bad: BadFile) -> None:
        """Put one down in the course of the run: known at once here, and appended to the file. Strict: raise it."""
        if self.strict:
            raise bad
        if bad.path in self.found:
            return
        self.found[bad.path] = bad.reason
        if self.path is None or str(bad.path) not in self._written():
            logger.warning("left out: %s: %s", bad.path, bad.reason)
            self._write(self._lines({bad.path: bad.reason}), append=True)

    def known(self) -> frozenset[str]:
        """Those that this process or another has put down."""
        return frozenset(self._written() | {str(path) for path in self.found})

    def begin(self) -> None:
        """Write what was found before anything is loaded, in place of an earlier run's list, and say how many there are."""
        if self.path is not None and (self.found or self.path.exists()):
            self._write(self._lines(self.found), append=False)
        self.report()

    def report(self) -> None:
        """One line for people, if there is anything to say."""
        total = self.total()
        if total:
            first = next(iter(self.found), None)
            logger.warning(
                "%d files cannot be used and are left out%s%s",
                total,
                f" (first: {first}: {self.found[first]})" if first else "",
                f"; all of them, with the reasons: {self.path}" if self.path else "",
            )

    def total(self) -> int:
        """Bad files of all processes."""
        return len(self.known())

    def _written(self) -> set[str]:
        if self.path is None or not self.path.is_file():
            return set()
        with self.path.open(encoding="utf-8") as file:
            return {json.loads(line)["path"] for line in file if line.endswith("\n")}

    @staticmethod
    def _lines(found: dict[Path, str]) -> str:
        return "".join(json.dumps({"path": str(path), "reason": reason}) + "\n" for path, reason in found.items())

    def _write(self, lines: str, *, append: bool) -> None:
        """A full disk costs the list, not the run."""
        if self.path is None:
            return
        try:
            if append:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(lines)
            else:
                temporary = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}.tmp")
                temporary.write_text(lines, encoding="utf-8")
                os.replace(temporary, self.path)
        except OSError as error:
            logger.warning("cannot write %s: %s", self.path, error.strerror or error)
