#!/usr/bin/env python3
"""Make the environment and run the demo or the tests: python quickstart.py setup | demo [options] | test [options]

Standard library only. The syntax and the annotations stay within Python 3.6, so that a Python that is too old
reads this file far enough to say so.
"""
# ruff: noqa: UP006, UP021, UP035, UP045

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Dict, List, NoReturn, Optional, Sequence, Tuple

MINIMUM_PYTHON = (3, 10)
FORMAT = 1
"""Part of every stamp: raise it when this file installs differently, and every environment is set up again."""

ROOT = Path(__file__).resolve().parent
RUNTIME = "requirements.txt"
DEVELOPMENT = "requirements-dev.txt"

CAUSES = (
    (r"No space left on device|Errno 28\b|WinError 112|not enough space", "the disk is full"),
    (r"CERTIFICATE_VERIFY_FAILED|SSLError", "the package index's certificate was not accepted (proxy? wrong clock?)"),
    (
        r"name resolution|getaddrinfo failed|nodename nor servname|NewConnectionError|NameResolutionError|ProxyError"
        r"|ConnectTimeout|Connection (?:refused|reset|aborted)|Network is unreachable|Max retries exceeded|HTTP error 5\d\d",
        "the package index could not be reached",
    ),
    (r"Read timed out|ReadTimeout|IncompleteRead|DO NOT MATCH THE HASHES|connection broken", "a download broke off"),
    (r"Permission denied|Errno 13\b|WinError 5\b", "no permission to write there"),
    (r"WinError 32\b", "a file is in use: close the programs that run from .venv"),
)
"""(what pip's log says, what it means). The first that is found explains the failure."""


class SetupError(Exception):
    """The environment could not be made. The message is one line, for the user."""


class Environment:
    """The virtual environment of one copy of the project."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = root / ".venv"
        self.stamp = self.folder / "quickstart-stamp.json"
        self.log = self.folder / "quickstart.log"

    @property
    def python(self) -> Path:
        windows = self.folder / "Scripts" / "python.exe"
        return windows if windows.exists() else self.folder / "bin" / "python"

    def version(self) -> Optional[Tuple[int, int]]:
        """(major, minor) of the environment's Python; None when it is missing, half-made or broken."""
        code = "import pip, sys; print(sys.version_info[0], sys.version_info[1])"
        try:
            result = subprocess.run(
                [str(self.python), "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=60
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        words = result.stdout.split()
        return (int(words[0]), int(words[1])) if result.returncode == 0 and len(words) == 2 else None

    def fingerprint(self, requirements: str) -> str:
        """Changes when what `requirements` asks for, the environment's Python or this installer changes."""
        digest = hashlib.sha256(f"{FORMAT} {self._recorded_python()}".encode())
        for name in requirement_files(self.root, requirements):
            digest.update(b"\0" + (self.root / name).read_bytes().replace(b"\r\n", b"\n"))
        return digest.hexdigest()

    def _recorded_python(self) -> str:
        """The version line of pyvenv.cfg, "" when there is none: read, not run, as this is asked at every start."""
        try:
            text = (self.folder / "pyvenv.cfg").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""
        found = re.search(r"^version(?:_info)?\s*=\s*(\S+)", text, re.MULTILINE)
        return found.group(1) if found else ""

    def stamped(self) -> Dict[str, str]:
        """What finished installing: requirements file -> fingerprint. Empty before, and after an interrupted set-up."""
        try:
            stamps = json.loads(self.stamp.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return stamps if isinstance(stamps, dict) else {}

    def up_to_date(self, requirements: str) -> bool:
        return self.python.exists() and self.stamped().get(requirements) == self.fingerprint(requirements)

    def write_stamp(self, requirements: str) -> None:
        """Last act of a set-up. Files that `requirements` includes are installed with it and stamped with it."""
        stamps = {name: self.fingerprint(name) for name in requirement_files(self.root, requirements)}
        partial = self.stamp.with_name(self.stamp.name + ".tmp")
        partial.write_text(json.dumps(stamps, indent=1), encoding="utf-8")
        os.replace(str(partial), str(self.stamp))


def requirement_files(root: Path, name: str) -> List[str]:
    """`name` and every file it includes with `-r`, each once."""
    try:
        text = (root / name).read_text(encoding="utf-8")
    except OSError as error:
        raise SetupError(f"cannot read {root / name}: {error.strerror}") from error
    files = [name]
    for included in re.findall(r"^\s*-r\s+(\S+)", text, re.MULTILINE):
        files += [file for file in requirement_files(root, included) if file not in files]
    return files


class Status:
    """One line with the step and the time it has taken: rewritten twice a second on a terminal, else printed now and then."""

    def __init__(self, step: str, quiet_seconds: float = 30.0) -> None:
        self.step = step
        self.detail = ""
        self.started = time.time()
        self.live = sys.stdout.isatty()
        self.pause = 0.5 if self.live else quiet_seconds
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._tick, daemon=True)

    def line(self) -> str:
        minutes, seconds = divmod(int(time.time() - self.started), 60)
        return f"[{minutes}:{seconds:02d}] {self.step}" + (f": {self.detail}" if self.detail else "")

    def _write(self, end: str) -> None:
        width = shutil.get_terminal_size().columns - 1
        print("\r" + self.line()[:width].ljust(width) if self.live else self.line(), end=end, flush=True)

    def _tick(self) -> None:
        while not self._done.wait(self.pause):
            self._write(end="" if self.live else "\n")

    def __enter__(self) -> "Status":
        self._write(end="" if self.live else "\n")
        self._thread.start()
        return self

    def __exit__(self, kind: Optional[type], error: object, trace: object) -> None:
        self._done.set()
        self._thread.join()
        self.detail = "done" if kind is None else "stopped"
        self._write(end="\n")


def pip_progress(line: str, before: str) -> str:
    """What to show after one line of pip's output, when `before` was shown."""
    amount = re.match(r"\s*Progress (\d+) of (\d+)", line)
    if amount:
        done, total = (int(part) / 1e6 for part in amount.groups())
        return f"{before.partition(',')[0]}, {done:.0f} of {total:.0f} MB"
    found = re.match(r"\s*(Collecting|Downloading|Processing|Using cached|Building wheel for|Installing)\s+(.*)", line)
    if not found:
        return before
    verb, rest = found.group(1), found.group(2).strip()
    if rest.startswith("collected packages"):
        return f"unpacking {rest.count(',') + 1} packages"
    return f"{verb.lower()} {rest.rsplit('/', 1)[-1]}"


def cause(text: str) -> Optional[str]:
    """What the first known message in `text` means."""
    return next((meaning for pattern, meaning in CAUSES if re.search(pattern, text)), None)


def explain(output: str) -> str:
    """Why pip failed, in one line, from everything it printed."""
    final = output[output.find("ERROR:") :] if "ERROR:" in output else output
    known = cause(final)
    if known:
        return known
    named = re.search(r"No matching distribution found for (\S+)", final)
    if named:  # also what pip says after its warnings that it cannot reach the index
        version = "{}.{}".format(*sys.version_info[:2])
        return cause(output) or f"there is no {named.group(1)} for Python {version} on this system"
    errors = re.findall(r"^\s*ERROR: (?!Exception)(.+?)\s*$", output, re.MULTILINE)
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return (errors or lines[-1:] or ["it printed nothing"])[0]


def supports_raw_progress(python: Path) -> bool:
    """`--progress-bar raw`, which tells progress to a program, came with pip 24.1."""
    result = subprocess.run([str(python), "-m", "pip", "--version"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    found = re.match(rb"pip (\d+)\.(\d+)", result.stdout)
    return found is not None and (int(found.group(1)), int(found.group(2))) >= (24, 1)


def make_environment(environment: Environment) -> None:
    """Make `.venv`, or keep the one that is there if its Python and pip work."""
    version = environment.version()
    if version is not None and version >= MINIMUM_PYTHON:
        return
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError as error:
        package = "python{}.{}-venv".format(*sys.version_info[:2])
        raise SetupError(
            f"this Python cannot make virtual environments ({error.name} is missing). "
            f"On Debian and Ubuntu: sudo apt install {package}"
        ) from error
    again = " again, as the one there has no working Python 3.10 or newer with pip" if environment.folder.exists() else ""
    with Status(f"making {environment.folder}{again}"):
        command = [sys.executable, "-m", "venv", "--clear", str(environment.folder)]
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True)
    if result.returncode != 0:
        raise SetupError(f"cannot make {environment.folder}: {explain(result.stdout)}")


def install(environment: Environment, requirements: str) -> None:
    """pip install -r `requirements`. Everything pip says goes to the log; a failure becomes one line.

    Most of what is installed is never imported, so that compiling it all would take longer than all the rest. What is imported
    is compiled then, once, unless this is forbidden.
    """
    command = [str(environment.python), "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
    if not sys.dont_write_bytecode:
        command.append("--no-compile")
    if supports_raw_progress(environment.python):
        command.append("--progress-bar=raw")
    command += ["-r", requirements]
    with environment.log.open("w", encoding="utf-8") as log, Status(f"installing {requirements}") as status:
        pip = subprocess.Popen(
            command,
            cwd=str(environment.root),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=dict(os.environ, PYTHONIOENCODING="utf-8", PYTHONUNBUFFERED="1"),
        )
        assert pip.stdout is not None
        try:
            for raw in pip.stdout:
                line = raw.decode("utf-8", "replace")
                if not line.startswith("Progress "):
                    log.write(line)
                status.detail = pip_progress(line, status.detail)
        finally:
            code = pip.wait()
        if code != 0:
            log.flush()
            reason = explain(environment.log.read_text(encoding="utf-8", errors="replace"))
            raise SetupError(f"installing {requirements} failed: {reason}. pip's full log: {environment.log}")


def setup(environment: Environment, requirements: str) -> None:
    """Bring `.venv` to what `requirements` asks for; nothing is done when nothing changed."""
    if environment.up_to_date(requirements):
        return
    requirement_files(environment.root, requirements)  # a file that is missing is said before anything is touched
    if environment.stamp.exists():
        environment.stamp.unlink()
    make_environment(environment)
    install(environment, requirements)
    environment.write_stamp(requirements)


def run(environment: Environment, arguments: Sequence[str]) -> int:
    """Run the environment's Python. Ctrl-C is the child's: it saves its work and decides how it ends."""
    sys.stdout.flush()
    child = subprocess.Popen([str(environment.python)] + list(arguments), cwd=str(environment.root))
    while True:
        try:
            code = child.wait()
        except KeyboardInterrupt:
            continue
        return 128 - code if code < 0 else code  # killed by a signal: the shell's way to say it


def parse(arguments: Sequence[str]) -> Tuple[argparse.Namespace, List[str]]:
    """(our options, what is passed through)."""
    parser = argparse.ArgumentParser(
        prog="quickstart.py",
        usage="quickstart.py setup [--dev] | demo [options of examples/demo.py] | test [options of pytest]",
        description="Makes .venv with the pinned packages if anything changed, then runs what you ask for.",
        allow_abbrev=False,
    )
    parser.add_argument("command", choices=("setup", "demo", "test"), help="only the environment, the demo, or the test suite")
    parser.add_argument("--dev", action="store_true", help="setup: with what the tests and checks need")
    ours = 1 if arguments and arguments[0] in ("demo", "test") else len(arguments)
    return parser.parse_args(arguments[:ours]), list(arguments[ours:])


def fail(message: str, code: int) -> NoReturn:
    print("quickstart: " + " ".join(message.splitlines()), file=sys.stderr)
    raise SystemExit(code)


def main(arguments: Sequence[str]) -> int:
    if sys.version_info[:2] < MINIMUM_PYTHON:
        needed, found = (".".join(str(part) for part in version) for version in (MINIMUM_PYTHON, sys.version_info[:3]))
        fail(f"Python {needed} or newer is needed; {sys.executable} is Python {found}", 2)
    options, rest = parse(arguments)
    development = options.command == "test" or options.dev
    environment = Environment(ROOT)
    try:
        setup(environment, DEVELOPMENT if development else RUNTIME)
    except SetupError as error:
        fail(str(error), 1)
    except OSError as error:
        fail(f"set-up failed: {error.strerror or error} ({error.filename or environment.folder}).", 1)
    except KeyboardInterrupt:
        fail("interrupted. Run the same command again to go on from there.", 130)
    if options.command == "test":
        # a process a core; a file's tests stay together, as they share models they make once. tests/conftest.py orders files
        return run(environment, ["-m", "pytest", "-n", "auto", "--dist", "loadfile", "--no-loadscope-reorder"] + rest)
    if options.command == "demo":
        return run(environment, [str(Path("examples") / "demo.py")] + rest)
    print(f"The environment is ready: {environment.python}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
