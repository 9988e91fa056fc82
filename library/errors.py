"""Errors a user can act on, and the suggestions in them. Imports nothing heavy: every script loads this first."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable


class UserError(Exception):
    """Something the user can put right. Shown as its message alone, without a traceback; exit code 2.

    A message has what, where and what to do, with both values:
    `rank mismatch: file 16, --network_dim 32 (style.safetensors). Use --dim_from_weights.`
    """


class Interrupted(Exception):
    """The user stopped the run; what could be kept has been kept. Shown as its message, which says how to go on; exit 130."""


def suggest(name: str, known: Iterable[str]) -> str:
    """`" Did you mean 'x'?"` for the nearest of `known`, or an empty string when none is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean '{near[0]}'?" if near else ""


_FULL_CODES = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}
_FULL_WORDS = ("No space left on device", "File too large", "Disk quota exceeded", "(os error 112)")  # 112: Windows' own


def is_disk_full(error: BaseException) -> bool:
    """Whether a disk without room, a quota or a file size limit is behind `error`, or behind what it was raised from.

    safetensors and torch pass such an error on as text, in exceptions of their own.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in _FULL_CODES:
            return True
        if not isinstance(seen, UserError) and any(words in str(seen) for words in _FULL_WORDS):
            return True
        seen = seen.__cause__ or seen.__context__
    return False
