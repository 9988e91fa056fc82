"""Scripts from the outside: how errors become messages and exit codes, and where the log goes."""

from __future__ import annotations

import errno
import logging
import sys
from pathlib import Path
from typing import Any

import pytest

from library import cli
from library.cli import run_script, setup_logging
from library.errors import Interrupted, UserError, is_disk_full
from library.option_groups import LoggingOptions


def run(error: BaseException | None, monkeypatch: pytest.MonkeyPatch, *argv: str) -> int:
    def main(_: list[str] | None) -> None:
        if error is not None:
            raise error

    monkeypatch.setattr(sys, "argv", ["script.py", *argv])
    with pytest.raises(SystemExit) as info:
        run_script(main)
    return int(info.value.code or 0)


def wrapped(outer: Exception, inner: Exception) -> Exception:
    outer.__cause__ = inner
    return outer


FULL = OSError(errno.ENOSPC, "No space left on device", "out/a.safetensors")


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (None, 0, []),
        (UserError("one\ntwo"), 2, ["error: one\nerror: two"]),
        (Interrupted("stopped at step 3; go on with --resume x"), 130, ["stopped at step 3"]),
        (KeyboardInterrupt(), 130, ["stopped"]),
        (FULL, 2, ["no space left", "out/a.safetensors"]),
        (wrapped(RuntimeError("cannot write"), FULL), 2, ["no space left"]),
        (RuntimeError("I/O error: No space left on device (os error 28)"), 2, ["no space left"]),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory. Tried\nmore"), 2, ["--gradient_checkpointing"]),
        (ZeroDivisionError("oops"), 1, ["internal error: ZeroDivisionError: oops", "--debug"]),
    ],
)
def test_errors_become_messages_and_exit_codes(
    error: BaseException | None, code: int, says: list[str], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert run(error, monkeypatch) == code
    said = capsys.readouterr().err
    assert [part for part in says if part not in said] == []
    assert "Traceback" not in said
    traces = list(tmp_path.glob("traceback-*.txt"))
    assert len(traces) == (1 if code == cli.EXIT_INTERNAL else 0)
    assert all(str(path) in said and "ZeroDivisionError" in path.read_text() for path in traces)


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(ZeroDivisionError("oops"), monkeypatch, "--debug") == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_full_disk_is_told_from_other_errors() -> None:
    assert is_disk_full(FULL)
    assert not is_disk_full(OSError(errno.EACCES, "Permission denied"))
    assert not is_disk_full(RuntimeError("shape mismatch"))


@pytest.fixture
def root_logger() -> Any:
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    yield root
    for handler in [h for h in root.handlers if h not in before]:
        root.removeHandler(handler)
        handler.close()
    root.setLevel(level)


def test_logging_goes_where_the_options_say(root_logger: logging.Logger, tmp_path: Path) -> None:
    target = tmp_path / "run.log"
    foreign = [handler for handler in root_logger.handlers if not hasattr(handler, "from_setup_logging")]
    for _ in range(2):  # a second call replaces the first one's handler
        setup_logging(LoggingOptions(console_log_file=str(target), console_log_level="WARNING", console_log_simple=True))
    logging.getLogger("library.x").info("quiet")
    logging.getLogger("library.x").warning("loud %d", 1)
    assert target.read_text() == "loud 1\n"
    assert [handler for handler in root_logger.handlers if handler in foreign] == foreign


def test_only_the_main_process_says_more_than_errors(
    root_logger: logging.Logger, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    setup_logging(LoggingOptions())
    logging.getLogger("library.x").warning("from rank 1")
    logging.getLogger("library.x").error("broken on rank 1")
    said = capsys.readouterr().err
    assert "from rank 1" not in said and "broken on rank 1" in said


def test_a_log_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    options = LoggingOptions(console_log_file=str(tmp_path / "no" / "run.log"))
    with pytest.raises(UserError, match="--console_log_file"):
        setup_logging(options)
