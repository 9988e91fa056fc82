"""Tokenizers whose captions are all padded to one length: T5's and Gemma's."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any, ClassVar


@dataclass(frozen=True, eq=False)
class PaddedTokenizer:
    """Words to ids. Holds the `tokenizers` library's object alone: workers unpickle it without importing transformers."""

    backend: Any  # tokenizers.Tokenizer
    folder: Path

    pad: ClassVar[int]
    first: ClassVar[tuple[int, ...]] = ()
    last: ClassVar[tuple[int, ...]] = ()
    """Ids before and behind every text."""

    def ids(self, text: str, length: int) -> list[int]:
        """Exactly `length` ids: the text's, cut where needed, between `first` and `last`, then padding."""
        found = self._unpadded(text, length)
        return [*found, *[self.pad] * (length - len(found))]

    def count(self, text: str, length: int) -> int:
        """How many of `ids` are no padding."""
        return len(self._unpadded(text, length))

    def _unpadded(self, text: str, length: int) -> list[int]:
        room = length - len(self.first) - len(self.last)
        return [*self.first, *self.backend.encode(text, add_special_tokens=False).ids[:room], *self.last]

    @cached_property
    def _digest(self) -> str:
        return blake2b(self.backend.to_str().encode(), digest_size=8).hexdigest()

    def fingerprint(self) -> str:
        return self._digest

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and isinstance(other, PaddedTokenizer) and self.fingerprint() == other.fingerprint()

    def __hash__(self) -> int:
        return hash(self.fingerprint())


def without_padding(backend: Any) -> Any:
    """A `tokenizers.Tokenizer` that gives texts as they are."""
    backend.no_padding()
    backend.no_truncation()
    return backend
