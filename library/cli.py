"""What all scripts do around their work: read the options, set up logging, and turn errors into messages and exit codes.

Imports nothing heavy: a misspelt flag is answered at once.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn, Protocol, TypeVar

from library.errors import Interrupted, UserError, is_disk_full
from library.option_groups import LoggingOptions
from library.option_rules import RULES, Rule, check_rules
from library.options import NoFamilyOptions, parse


class _Container(Protocol):
    @property
    def logging(self) -> LoggingOptions: ...


Options = TypeVar("Options", bound=_Container)

GARBAGE_AFTER = 50_000
"""Objects made, beyond those that went, until Python looks for unreachable ones among the newest. At its own 700 a sixth of a
start is spent on looking through imported modules, time and again."""
_OURS = "from_setup_logging"  # marks a handler of ours
EXIT_INTERNAL, EXIT_USER, EXIT_INTERRUPTED = 1, 2, 130


def read_options(
    container_class: type[Options],
    argv: Sequence[str] | None = None,
    family_group: type = NoFamilyOptions,
    description: str | None = None,
    rules: Iterable[Rule] = RULES,
) -> Options:
    """The start of every script: options, then logging as they say, then all rules. Raises `UserError`."""
    options = parse(container_class, argv, family_group, description)
    setup_logging(options.logging)
    check_rules(options, rules)
    return options


class _ConsoleHandler(logging.StreamHandler):
    """Writes to the console around a progress bar, if one is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        progress = sys.modules.get("tqdm")
        if progress is None:
            super().emit(record)
        else:
            progress.tqdm.write(self.format(record), file=sys.stderr)


def setup_logging(logging_options: LoggingOptions) -> None:
    """Send log lines to the console, or to `--console_log_file`. Only the main process says more than errors."""
    target = logging_options.console_log_file
    try:
        handler: logging.Handler = (
            logging.FileHandler(target, encoding="utf-8", errors="backslashreplace") if target else _ConsoleHandler(sys.stderr)
        )
    except OSError as error:
        raise UserError(f"--console_log_file {target}: cannot be written: {error.strerror}.") from None
    pattern = "%(message)s" if logging_options.console_log_simple else "%(asctime)s %(levelname)-7s %(message)s"
    handler.setFormatter(logging.Formatter(pattern, datefmt="%H:%M:%S"))
    root = logging.getLogger()
    for before in [other for other in root.handlers if hasattr(other, _OURS)]:  # not those of whoever runs us
        root.removeHandler(before)
        before.close()
    setattr(handler, _OURS, True)
    root.addHandler(handler)
    is_main = os.environ.get("RANK", "0") == "0"
    root.setLevel((logging_options.console_log_level or "INFO") if is_main else "ERROR")


def run_script(main: Callable[[list[str] | None], None]) -> NoReturn:
    """Run `main` on the command line and exit: 0 done, 1 our fault, 2 for the user to put right, 130 stopped by the user.

    A traceback is shown with `--debug` only; otherwise one of ours goes to a file, whose path is told.
    """
    gc.set_threshold(GARBAGE_AFTER)
    debug = "--debug" in sys.argv[1:]
    try:
        main(None)
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            traceback.print_exc()
        message, code = _explain(error, debug)
        print(message, file=sys.stderr, flush=True)
        sys.exit(code)
    sys.exit(0)


def _explain(error: BaseException, debug: bool) -> tuple[str, int]:
    """The message and the exit code for `error`."""
    if isinstance(error, UserError):
        lines = str(error).split("\n")
        return "\n".join(f"error: {line}" for line in lines), EXIT_USER
    if isinstance(error, Interrupted):
        return str(error), EXIT_INTERRUPTED
    if isinstance(error, KeyboardInterrupt):
        return "stopped.", EXIT_INTERRUPTED
    if is_disk_full(error):
        where = f" ({error.filename})" if isinstance(error, OSError) and error.filename else ""
        return f"error: no space left on the disk{where}. Free some space; the last complete save is untouched.", EXIT_USER
    if type(error).__name__ == "OutOfMemoryError":  # torch's; not imported here
        return (
            "error: the device is out of memory. Lower --train_batch_size (raise --gradient_accumulation_steps to make up for "
            f"it) or --resolution, or add --gradient_checkpointing or --cache_latents. ({str(error).splitlines()[0]})",
            EXIT_USER,
        )
    hint = "" if debug else f" The traceback is in {_write_traceback(error)}; --debug shows it here."
    return f"internal error: {type(error).__name__}: {error}.{hint}", EXIT_INTERNAL


def _write_traceback(error: BaseException) -> str:
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="traceback-", suffix=".txt", delete=False, encoding="utf-8"
        ) as file:  # fmt: skip
            file.write("".join(traceback.format_exception(error)))
        return file.name
    except OSError as problem:
        return f"no file ({problem.strerror})"
