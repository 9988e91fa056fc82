"""Weights in prompts: `(word)`, `(word:1.3)` and `[word]`, as the common user interfaces read them."""

from __future__ import annotations

import re

ROUND = 1.1
SQUARE = 1 / 1.1
_PIECE = re.compile(r"\\[\\()\[\]]|[(\[\])]|:\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*\)|[^\\()\[\]:]+|.", re.DOTALL)


def parse_weights(prompt: str) -> list[tuple[str, float]]:
    """`prompt` as pieces of text with weights; neighbours of one weight are one piece.

    `(x)` multiplies by 1.1, `[x]` divides by 1.1, `(x:1.3)` multiplies by 1.3; they nest. `\\(` is a bracket of the text.
    A bracket that is never closed still counts to the end; one that was never opened is text.
    """
    pieces: list[tuple[str, float]] = []
    opened: list[tuple[str, int]] = []  # kind of bracket, index of the first piece inside

    def scale(start: int, factor: float) -> None:
        pieces[start:] = [(text, weight * factor) for text, weight in pieces[start:]]

    for match in _PIECE.finditer(prompt):
        token, number = match[0], match[1]
        if token in "([":
            opened.append((token, len(pieces)))
        elif number is not None and opened and opened[-1][0] == "(":
            scale(opened.pop()[1], float(number))
        elif token == ")" and opened and opened[-1][0] == "(":
            scale(opened.pop()[1], ROUND)
        elif token == "]" and opened and opened[-1][0] == "[":
            scale(opened.pop()[1], SQUARE)
        else:
            pieces.append((token[1:] if len(token) == 2 and token[0] == "\\" else token, 1.0))
    for kind, start in reversed(opened):
        scale(start, ROUND if kind == "(" else SQUARE)
    return _merged(pieces)


def _merged(pieces: list[tuple[str, float]]) -> list[tuple[str, float]]:
    merged: list[tuple[str, float]] = []
    for text, weight in pieces:
        if merged and merged[-1][1] == weight:
            merged[-1] = (merged[-1][0] + text, weight)
        else:
            merged.append((text, weight))
    return merged or [("", 1.0)]
