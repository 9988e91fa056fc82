"""Errors a user can act on, and the suggestions in them. Imports nothing heavy: every script loads this first."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user can put right. Shown as its message alone, without a traceback; exit code 2.

    A message has what, where and what to do, with both values:
    `rank mismatch: file 16, --network_dim 32 (style.safetensors). Use --dim_from_weights.`
    """


def suggest(name: str, known: Iterable[str]) -> str:
    """`" Did you mean 'x'?"` for the nearest of `known`, or an empty string when none is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean '{near[0]}'?" if near else ""
