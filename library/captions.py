"""From a caption as it is stored to the caption that is trained. Pure functions with keyed randomness."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import floor
from random import Random

from library.rng import keyed_random

_WILDCARD = re.compile(r"\{([^{}]+)\}")
_OPEN, _CLOSE = "\ue000", "\ue001"  # private-use characters stand for the escaped {{ and }} while wildcards are read


@dataclass(frozen=True)
class CaptionOptions:
    """The caption keys of one subset. Rates are probabilities; epochs and steps count as the user counts them, from 1."""

    shuffle: bool = False
    separator: str = ","
    keep_tokens: int = 0
    keep_tokens_separator: str = ""
    secondary_separator: str | None = None
    wildcard: bool = False
    prefix: str | None = None
    suffix: str | None = None
    token_warmup_min: int = 1
    token_warmup_step: float = 0.0
    """Steps until every token is shown; below 1, a share of the whole run. 0: off."""
    dropout_rate: float = 0.0
    dropout_every_n_epochs: int = 0
    tag_dropout_rate: float = 0.0
    several: bool = False
    """Whether a caption of several lines is as many captions, of which each reading picks one; `wildcard` implies it."""

    @property
    def is_static(self) -> bool:
        """Whether a caption is the same each time it is seen, dropping it whole apart."""
        return not (self.shuffle or self.wildcard or self.several or self.token_warmup_step or self.tag_dropout_rate)


@dataclass(frozen=True)
class CaptionMoment:
    """When a caption is read. Everything random or gradual about it follows from these and the picture's own key."""

    seed: int = 0
    epoch: int = 0  # from 0
    step: int = 0  # optimizer steps taken before this one
    max_steps: int = 0


def read_lines(text: str, options: CaptionOptions) -> str:
    """What is kept of a caption file: every line that is not empty for wildcards, else the first line only."""
    lines = [line.strip() for line in text.strip().splitlines()]
    if options.wildcard:
        return "\n".join(line for line in lines if line)
    return lines[0] if lines else ""


def _expand_wildcards(caption: str, rng: Random) -> str:
    """`{a|b}` -> a or b; `{{` and `}}` are literal braces."""
    caption = caption.replace("{{", _OPEN).replace("}}", _CLOSE)
    caption = _WILDCARD.sub(lambda match: rng.choice(match.group(1).split("|")), caption)
    return caption.replace(_OPEN, "{").replace(_CLOSE, "}")


def _split(text: str, separator: str) -> list[str]:
    return [token.strip() for token in text.split(separator) if token.strip()]


def _parts(caption: str, options: CaptionOptions) -> tuple[list[str], list[str], list[str]]:
    """Tokens that stay in front, tokens that may move or go, tokens that stay at the end."""
    mark = options.keep_tokens_separator
    if mark and mark in caption:
        front, _, rest = caption.partition(mark)
        middle, _, back = rest.partition(mark)
        return _split(front, options.separator), _split(middle, options.separator), _split(back, options.separator)
    tokens = _split(caption, options.separator)
    return tokens[: options.keep_tokens], tokens[options.keep_tokens :], []


def _shown_count(total: int, options: CaptionOptions, moment: CaptionMoment) -> int:
    """How many of `total` tokens the warm-up shows: token_warmup_min at first, all after token_warmup_step steps."""
    steps = options.token_warmup_step
    if steps < 1:
        steps = floor(steps * moment.max_steps)
    if not steps or moment.step >= steps:
        return total
    return floor(moment.step * (total - options.token_warmup_min) / steps) + options.token_warmup_min


def _change_tokens(caption: str, options: CaptionOptions, moment: CaptionMoment, rng: Random) -> str:
    front, middle, back = _parts(caption, options)
    middle = middle[: _shown_count(len(middle), options, moment)]
    if options.shuffle:
        rng.shuffle(middle)
    if options.tag_dropout_rate:
        middle = [token for token in middle if rng.random() >= options.tag_dropout_rate]
    joint = options.separator if options.separator[-1:].isspace() else options.separator + " "
    return joint.join(front + middle + back)


def is_dropped(options: CaptionOptions, moment: CaptionMoment, key: str) -> bool:
    """Whether this reading of the caption is the empty one: by chance, or because this epoch is every n-th."""
    every = options.dropout_every_n_epochs
    if every and (moment.epoch + 1) % every == 0:
        return True
    rate = options.dropout_rate
    return rate > 0 and keyed_random(moment.seed, moment.epoch, "caption dropout", key).random() < rate


def static_caption(caption: str, options: CaptionOptions) -> str:
    """The caption as it is when nothing drops it: the only one where `options.is_static` holds."""
    return final_caption(caption, options, CaptionMoment(), key="", drop=False)


def final_caption(caption: str, options: CaptionOptions, moment: CaptionMoment, key: str, *, drop: bool = True) -> str:
    """One reading of `caption`, the same for the same moment and `key` (the picture and its repeat).

    Order: drop the whole caption; pick a line; prefix and suffix; wildcards; kept tokens, token warm-up, shuffle, tag
    dropout; secondary separator. The line is picked before prefix and suffix are put on, so that both are always there.
    """
    if drop and is_dropped(options, moment, key):
        return ""
    rng = keyed_random(moment.seed, moment.epoch, "caption", key)
    lines = caption.split("\n")
    text = rng.choice(lines) if (options.wildcard or options.several) and len(lines) > 1 else lines[0]
    if options.prefix:
        text = f"{options.prefix} {text}"
    if options.suffix:
        text = f"{text} {options.suffix}"
    if options.wildcard:
        text = _expand_wildcards(text, rng)
    marked = bool(options.keep_tokens_separator) and options.keep_tokens_separator in text
    if options.shuffle or options.token_warmup_step or options.tag_dropout_rate or marked:
        text = _change_tokens(text, options, moment, rng)
    if options.secondary_separator:
        text = text.replace(options.secondary_separator, options.separator)
    return text
