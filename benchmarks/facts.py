"""Where and on what a row was measured, and the line that a measured process prints."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def commit() -> str:
    """The commit that is checked out, with a + where files differ from it; empty outside of a checkout."""

    def git(*arguments: str) -> str:
        found = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
        return found.stdout.strip() if found.returncode == 0 else ""

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "library", "networks", "benchmarks")
    return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")


def machine() -> str:
    import torch

    cores = f"{os.cpu_count()} {platform.machine()} cores"
    return f"{cores}, {torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU'}"


IN_TURN = "BENCHMARK_IN_TURN"
"""Environment variable: after each step, wait for a line of input."""


def step_done() -> None:
    """Tell whoever started this process that a step has ended: the time, and the CPU seconds of the process so far."""
    print(f"STEP {time.time()} {time.process_time()}", flush=True)
    if IN_TURN in os.environ:
        sys.stdin.readline()
        print(f"GO {time.time()} {time.process_time()}", flush=True)
