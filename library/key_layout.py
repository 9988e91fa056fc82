"""Key layouts: one declarative table per pair of formats, read in both directions, for checkpoints and for adapter names.

A table pairs *their* names (a published checkpoint) with *ours* (the module that is trained). A rule names a module or a
tensor; whatever follows at a dot is kept, so `Rule("time_embed.0", "time_embedding.linear_1")` also maps
`time_embed.0.weight`. `{i}` and `{j}` stand for a number and appear on both sides. The first rule that fits wins.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Op:
    """A change of one tensor, and its inverse."""

    name: str
    to_ours: Callable[[Tensor], Tensor]
    to_theirs: Callable[[Tensor], Tensor]


def _swap(tensor: Tensor) -> Tensor:
    return torch.cat(tuple(reversed(tensor.chunk(2, dim=0))))


def _as_conv(tensor: Tensor) -> Tensor:
    return tensor[:, :, None, None] if tensor.ndim == 2 else tensor


def _as_linear(tensor: Tensor) -> Tensor:
    return tensor[:, :, 0, 0] if tensor.ndim == 4 else tensor


RENAME = Op("rename", lambda tensor: tensor, lambda tensor: tensor)
SWAP_HALVES = Op("swap halves", _swap, _swap)
TRANSPOSE = Op("transpose", lambda tensor: tensor.T, lambda tensor: tensor.T)
CONV_TO_LINEAR = Op("1x1 convolution to linear", _as_linear, _as_conv)
"""Theirs [O, I, 1, 1], ours [O, I]; tensors that are not matrices (biases) and those that are linear already stay."""


@dataclass(frozen=True)
class Rule:
    """`theirs` is the concatenation along dimension 0 of all of `ours`, each then changed by `op`.

    widths: relative sizes of the concatenated parts; equal when left out.
    """

    theirs: str
    ours: str | tuple[str, ...]
    op: Op = RENAME
    widths: tuple[int, ...] | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        return (self.ours,) if isinstance(self.ours, str) else self.ours

    def split(self, tensor: Tensor, part: int) -> Tensor:
        """Our `part` of their `tensor`."""
        if len(self.parts) > 1:
            widths = self.widths or (1,) * len(self.parts)
            unit, rest = divmod(tensor.shape[0], sum(widths))
            if rest:
                raise ValueError(f"{self.theirs}: {tensor.shape[0]} rows do not divide into parts {widths}")
            tensor = tensor.split([width * unit for width in widths])[part]
        return self.op.to_ours(tensor)

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """Their tensor of all our parts, in order."""
        changed = [self.op.to_theirs(tensor) for tensor in tensors]
        return changed[0] if len(changed) == 1 else torch.cat(changed)


class Origin(NamedTuple):
    """Where one of our tensors comes from: part number `part` of their `key`, by `rule`."""

    key: str
    rule: Rule
    part: int

    def take(self, tensor: Tensor) -> Tensor:
        return self.rule.split(tensor, self.part)


class Assembly(NamedTuple):
    """How one of their tensors is made: from our `keys`, in order, by `rule`."""

    keys: tuple[str, ...]
    rule: Rule


class UnmappedKeys(ValueError):
    """Keys that no rule of the table knows, or parts of a concatenation that are absent."""

    def __init__(self, keys: Iterable[str]) -> None:
        self.keys = sorted(keys)
        super().__init__(f"{len(self.keys)} keys are not in the table: {', '.join(self.keys[:8])}")


_HOLE = re.compile(r"\{(\w+)\}")


def _pattern(template: str) -> re.Pattern[str]:
    literal = [re.escape(text) if index % 2 == 0 else f"(?P<{text}>\\d+)" for index, text in enumerate(_HOLE.split(template))]
    rest = r"(?P<rest>(?:\..*)?)\Z" if template else r"(?P<rest>.*)\Z"
    return re.compile("".join(literal) + rest)


def _fill(template: str, match: re.Match[str]) -> str:
    return _HOLE.sub(lambda hole: match[hole[1]], template) + match["rest"]


@dataclass(frozen=True)
class KeyMap:
    """A table, read in both directions."""

    rules: tuple[Rule, ...]

    @cached_property
    def _from_theirs(self) -> list[tuple[re.Pattern[str], Rule]]:
        return [(_pattern(rule.theirs), rule) for rule in self.rules]

    @cached_property
    def _from_ours(self) -> list[tuple[re.Pattern[str], Rule, int]]:
        return [(_pattern(name), rule, part) for rule in self.rules for part, name in enumerate(rule.parts)]

    @cached_property
    def _from_flat(self) -> list[tuple[re.Pattern[str], Rule]]:
        return [(_pattern(rule.theirs.replace(".", "_")), rule) for rule in self.rules]

    @cached_property
    def _from_our_flat(self) -> list[tuple[re.Pattern[str], Rule, int]]:
        parts = ((name, rule, part) for rule in self.rules for part, name in enumerate(rule.parts))
        return [(_pattern(name.replace(".", "_")), rule, part) for name, rule, part in parts]

    # ---- names alone -----------------------------------------------------------------------------------------------

    def our_names(self, theirs: str) -> tuple[str, ...] | None:
        """Our names for theirs (several where theirs is a concatenation), or None when no rule fits."""
        for pattern, rule in self._from_theirs:
            if match := pattern.match(theirs):
                return tuple(_fill(name, match) for name in rule.parts)
        return None

    def their_name(self, ours: str) -> str | None:
        """Their name for ours, or None when no rule fits. The parts of a concatenation share one name."""
        for pattern, rule, _ in self._from_ours:
            if match := pattern.match(ours):
                return _fill(rule.theirs, match)
        return None

    def flat_origins(self, flat: str) -> dict[str, Origin]:
        """Our names, and where each comes from, for a layer of theirs whose name has underscores for dots, as adapters' files
        have it. Empty when no rule fits."""
        for pattern, rule in self._from_flat:
            if match := pattern.match(flat):
                return {_fill(name, match): Origin(flat, rule, part) for part, name in enumerate(rule.parts)}
        return {}

    def origin_of(self, ours: str, *, flat: bool = False) -> Origin | None:
        """Where the tensor or layer `ours` comes from; None when no rule fits. flat: it has underscores for dots."""
        for pattern, rule, part in self._from_our_flat if flat else self._from_ours:
            if match := pattern.match(ours):
                return Origin(_fill(rule.theirs, match), rule, part)
        return None

    def dotted(self, flat: str) -> str | None:
        """The name of theirs that has underscores for dots in `flat`; None when no rule fits."""
        for pattern, rule in self._from_flat:
            if match := pattern.match(flat):
                return _fill(rule.theirs, match)
        return None

    # ---- plans: which tensor comes from where ----------------------------------------------------------------------

    def origins(self, their_keys: Iterable[str]) -> tuple[dict[str, Origin], list[str]]:
        """For each of our keys where it comes from, and the keys no rule knows."""
        found: dict[str, Origin] = {}
        unknown: list[str] = []
        for key in their_keys:
            for pattern, rule in self._from_theirs:
                if match := pattern.match(key):
                    found.update({_fill(name, match): Origin(key, rule, part) for part, name in enumerate(rule.parts)})
                    break
            else:
                unknown.append(key)
        return found, unknown

    def assemblies(self, our_keys: Iterable[str]) -> tuple[dict[str, Assembly], list[str]]:
        """For each of their keys what it is made of, and our keys no rule knows or whose other parts are absent."""
        present = set(our_keys)
        found: dict[str, Assembly] = {}
        unknown: list[str] = []
        for key in sorted(present):
            for pattern, rule, _ in self._from_ours:
                if match := pattern.match(key):
                    parts = tuple(_fill(name, match) for name in rule.parts)
                    if present.issuperset(parts):
                        found[_fill(rule.theirs, match)] = Assembly(parts, rule)
                    else:
                        unknown.append(key)
                    break
            else:
                unknown.append(key)
        return found, unknown

    # ---- whole state dicts -----------------------------------------------------------------------------------------

    def to_ours(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Their state dict under our names. Raises `UnmappedKeys` rather than dropping any."""
        origins, unknown = self.origins(tensors)
        if unknown:
            raise UnmappedKeys(unknown)
        return {name: origin.take(tensors[origin.key]) for name, origin in origins.items()}

    def to_theirs(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our state dict under their names. Raises `UnmappedKeys` rather than dropping any."""
        assemblies, unknown = self.assemblies(tensors)
        if unknown:
            raise UnmappedKeys(unknown)
        return {name: made.rule.join([tensors[key] for key in made.keys]) for name, made in assemblies.items()}


IDENTITY = KeyMap((Rule("", ""),))
"""Both sides have the same names."""


def key_map(*rules: Rule | Iterable[Rule]) -> KeyMap:
    """A table of rules and of groups of rules."""
    flat: list[Rule] = []
    for rule in rules:
        flat.extend([rule] if isinstance(rule, Rule) else rule)
    return KeyMap(tuple(flat))


def nested(theirs: str, ours: str, inner: Iterable[Rule]) -> list[Rule]:
    """The rules of a submodule under its two paths."""
    return [
        Rule(
            f"{theirs}.{rule.theirs}",
            f"{ours}.{rule.ours}" if isinstance(rule.ours, str) else tuple(f"{ours}.{name}" for name in rule.ours),
            rule.op,
            rule.widths,
        )
        for rule in inner
    ]
