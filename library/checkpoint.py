"""Files written so that nothing is ever lost: atomic writes, which files to keep, and states to resume from."""

from __future__ import annotations

import logging
import math
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from library.errors import UserError, is_disk_full

if TYPE_CHECKING:
    from library.option_groups import OutputOptions, StateOptions

logger = logging.getLogger(__name__)

# ---- atomic writes ---------------------------------------------------------------------------------------------------


def atomic_write(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` make a file or a folder under a temporary name beside `path`, then put it in place in one move.

    `path` holds either what was there before or all that is new, also after a crash or power loss. The temporary name ends
    as `path` does, for writers that look at the suffix. Raises `UserError` when the disk is full.
    """
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    with explained_full_disk(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _remove(temporary)
            write(temporary)
            _as_usual(temporary)
            _flush(temporary)
            _put_in_place(temporary, path)
        finally:
            _remove(temporary)


@contextmanager
def explained_full_disk(path: Path) -> Iterator[None]:
    """While `path` is written, under another name until it is whole: a full disk becomes a `UserError`."""
    try:
        yield
    except Exception as error:  # safetensors and torch raise exceptions of their own for it
        if not is_disk_full(error):
            raise
        free = shutil.disk_usage(path.parent).free
        raise UserError(
            f"no space left while writing {path}: {free:,} bytes are free. Nothing was overwritten. "
            "Free some space, or give another --output_dir."
        ) from error


def atomic_write_text(path: Path, text: str) -> None:
    """`atomic_write` of UTF-8 text with the line ends it has. What cannot be written so (some names of files) is escaped."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace", newline="")

    atomic_write(path, write)


def _put_in_place(temporary: Path, path: Path) -> None:
    if path.is_dir():  # a folder with contents cannot be replaced in one move: keep the old one until the new one is there
        old = path.with_name(f".old-{os.getpid()}-{path.name}")
        os.rename(path, old)
        try:
            os.rename(temporary, path)
        except OSError:
            os.rename(old, path)
            raise
        try:
            shutil.rmtree(old)
        except PermissionError as error:  # on Windows, while another program has one of its files open
            logger.warning("%s has been replaced, but what was there before cannot be removed: %s. Remove %s", path, error, old)
    else:
        os.replace(temporary, path)
    _fsync(path.parent)


_UMASK = os.umask(0o022)
os.umask(_UMASK)  # it can only be read by setting it


def _as_usual(path: Path) -> None:
    """Permissions as for any new file: safetensors makes its files readable by their owner alone."""
    for entry in [path, *path.rglob("*")] if path.is_dir() else [path]:
        if entry.is_file():
            entry.chmod(0o666 & ~_UMASK)


def _flush(path: Path) -> None:
    """Bytes and names on the disk, not only in its cache, before anything old gives way."""
    if path.is_dir():
        for entry in sorted(path.rglob("*")):
            _fsync(entry)
    _fsync(path)


def _fsync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return  # Windows has no handle on a folder to flush
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> bool:
    """Remove a file or folder; False when there was none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif path.exists() or path.is_symlink():
        path.unlink()
    else:
        return False
    return True


# ---- what is saved when, under which name, and what it replaces --------------------------------------------------------


_LEFT = re.compile(r"\.(tmp|old)-\d+-(.+)")
_ABANDONED = 3600.0  # seconds: what is still being written is younger


def output_stems(output_name: str | None) -> list[str]:
    """How the names of what a run saves begin."""
    return [output_name] if output_name else ["epoch", "at", "last"]


def settle_leftovers(folder: Path, output_name: str | None) -> None:
    """Remove what runs called `output_name` had half-written when they were killed; put back what they were just replacing."""
    for entry in sorted(folder.iterdir()):
        match = _LEFT.fullmatch(entry.name)
        if match is None or not match[2].startswith(tuple(output_stems(output_name))):
            continue
        with suppress(OSError):  # another process may have been here first
            changed = max(path.stat().st_mtime for path in (entry, *entry.rglob("*")))
            if time.time() - changed < _ABANDONED:
                continue
            if match[1] == "old" and not (folder / match[2]).exists():
                entry.rename(folder / match[2])
            else:
                _remove(entry)


def check_output(output_dir: str | None, flag: str = "--output_dir") -> Path:
    """The output folder, given as `flag`, made and found to be writable before anything is loaded."""
    if not output_dir:
        raise UserError(f"{flag} is missing: say where the results go.")
    folder = Path(output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"probe")
    except OSError as error:
        if is_disk_full(error):
            raise UserError(f"{flag} {folder}: its disk is full. Free some space, or choose another folder.") from error
        raise UserError(f"{flag} {folder} cannot be written to: {error.strerror}. Choose another folder.") from error
    return folder


@dataclass(frozen=True)
class CheckpointPolicy:
    """When a run saves, the stems of what it saves, and what a new file makes superfluous. All as in sd-scripts."""

    output_name: str | None
    num_epochs: int
    every_n_epochs: int | None
    every_n_steps: int | None
    last_n_epochs: int | None
    last_n_steps: int | None
    last_n_epochs_state: int | None
    last_n_steps_state: int | None
    save_state: bool
    save_state_at_end: bool

    @classmethod
    def of(cls, output: OutputOptions, state: StateOptions, num_epochs: int) -> CheckpointPolicy:
        """`--save_n_epoch_ratio n` means at least n files, and wins over `--save_every_n_epochs`."""
        every_n_epochs = output.save_every_n_epochs
        if output.save_n_epoch_ratio:
            every_n_epochs = math.floor(num_epochs / output.save_n_epoch_ratio) or 1
        return cls(
            output_name=output.output_name,
            num_epochs=num_epochs,
            every_n_epochs=every_n_epochs or None,
            every_n_steps=output.save_every_n_steps or None,
            last_n_epochs=output.save_last_n_epochs,
            last_n_steps=output.save_last_n_steps,
            last_n_epochs_state=output.save_last_n_epochs_state or output.save_last_n_epochs,
            last_n_steps_state=output.save_last_n_steps_state or output.save_last_n_steps,
            save_state=state.save_state,
            save_state_at_end=state.save_state or state.save_state_on_train_end,
        )

    def due_at_step(self, step: int) -> bool:
        """`step` updates have been made."""
        return self.every_n_steps is not None and step > 0 and step % self.every_n_steps == 0

    def due_at_epoch(self, epoch: int) -> bool:
        """`epoch` epochs are complete. The last one is saved as the final file only."""
        return self.every_n_epochs is not None and epoch % self.every_n_epochs == 0 and 0 < epoch < self.num_epochs

    def epoch_name(self, epoch: int) -> str:
        return f"{self.output_name or 'epoch'}-{epoch:06d}"

    def step_name(self, step: int) -> str:
        return f"{self.output_name or 'at'}-step{step:08d}"

    @property
    def last_name(self) -> str:
        return self.output_name or "last"

    @property
    def best_name(self) -> str:
        return f"{self.last_name}-best"

    def stale_at_epoch(self, epoch: int, *, state: bool = False) -> str | None:
        """The stem that saving `epoch` makes superfluous; state: among the state folders, which may be kept longer."""
        kept = self.last_n_epochs_state if state else self.last_n_epochs
        if kept is None or self.every_n_epochs is None:
            return None
        stale = epoch - self.every_n_epochs * kept
        return self.epoch_name(stale) if stale > 0 else None

    def stale_at_step(self, step: int, *, state: bool = False) -> str | None:
        """As `stale_at_epoch`; here what is kept is counted in steps: those of the last n steps, and not in files."""
        kept = self.last_n_steps_state if state else self.last_n_steps
        if kept is None or self.every_n_steps is None:
            return None
        stale = step - kept - 1
        stale -= stale % self.every_n_steps
        return self.step_name(stale) if stale > 0 else None


def state_name(stem: str) -> str:
    return f"{stem}-state"


def average_name(stem: str) -> str:
    """Of the averaged weights (`--ema`) beside the file called `stem`."""
    return f"{stem}-ema"


@dataclass(frozen=True)
class CheckpointWriter:
    """Writes and prunes the files of one run. Only the main process has work to do here."""

    folder: Path
    policy: CheckpointPolicy
    suffix: str
    """Of the saved model; empty for a folder."""

    def save_model(self, stem: str, write: Callable[[Path], None]) -> Path:
        """Have `write` make the model's file or folder called `stem`, whole or not at all."""
        path = self.folder / f"{stem}{self.suffix}"
        atomic_write(path, write)
        logger.info("saved %s", path)
        return path

    def prune(self, *, step: int | None = None, epoch: int | None = None, state: bool = False) -> Path | None:
        """Remove what the model (or state) just saved at `step` or `epoch` makes superfluous; returns what was removed."""
        if step is not None:
            stem = self.policy.stale_at_step(step, state=state)
        else:
            assert epoch is not None
            stem = self.policy.stale_at_epoch(epoch, state=state)
        if stem is None:
            return None
        path = self.folder / (state_name(stem) if state else f"{stem}{self.suffix}")
        if not state and _remove(self.folder / f"{average_name(stem)}{self.suffix}"):
            logger.info("removed the averages beside %s", path)
        if not _remove(path):
            return None
        logger.info("removed %s", path)
        return path
