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
from itertools import chain
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


class _Fit(NamedTuple):
    """What a name is in a table: part number `part` of `rule`."""

    rule: Rule
    part: int
    match: re.Match[str]

    def spelt(self, template: str) -> str:
        """Another name of the rule, with the numbers and the rest of the one that was found."""
        return _HOLE.sub(lambda hole: self.match[hole[1]], template) + self.match["rest"]


class _Index:
    """Finds which of many templates a name fits. A table has hundreds of them and a checkpoint thousands of names, so only
    templates that begin as the name does are tried, and none is compiled before."""

    def __init__(self, entries: Iterable[tuple[str, Rule, int]]) -> None:
        self._entries = list(entries)
        self._beginnings: dict[str, list[int]] = {}
        for number, (template, *_) in enumerate(self._entries):
            self._beginnings.setdefault(template.partition("{")[0], []).append(number)
        self._lengths = sorted({len(beginning) for beginning in self._beginnings})
        self._patterns: dict[int, re.Pattern[str]] = {}

    def find(self, name: str) -> _Fit | None:
        """The first that fits."""
        candidates = (self._beginnings.get(name[:length], ()) for length in self._lengths if length <= len(name))
        for number in sorted(chain.from_iterable(candidates)):
            template, rule, part = self._entries[number]
            if number not in self._patterns:
                self._patterns[number] = _pattern(template)
            if match := self._patterns[number].match(name):
                return _Fit(rule, part, match)
        return None


def _origins(key: str, fit: _Fit) -> dict[str, Origin]:
    """Of all our names for their `key`."""
    return {fit.spelt(name): Origin(key, fit.rule, part) for part, name in enumerate(fit.rule.parts)}


@dataclass(frozen=True)
class KeyMap:
    """A table, read in both directions."""

    rules: tuple[Rule, ...]

    @cached_property
    def _from_theirs(self) -> _Index:
        return _Index((rule.theirs, rule, 0) for rule in self.rules)

    @cached_property
    def _from_ours(self) -> _Index:
        return _Index((name, rule, part) for rule in self.rules for part, name in enumerate(rule.parts))

    @cached_property
    def _from_flat(self) -> _Index:
        return _Index((rule.theirs.replace(".", "_"), rule, 0) for rule in self.rules)

    @cached_property
    def _from_our_flat(self) -> _Index:
        return _Index((name.replace(".", "_"), rule, part) for rule in self.rules for part, name in enumerate(rule.parts))

    # ---- names alone -----------------------------------------------------------------------------------------------

    def our_names(self, theirs: str) -> tuple[str, ...] | None:
        """Our names for theirs (several where theirs is a concatenation), or None when no rule fits."""
        fit = self._from_theirs.find(theirs)
        return tuple(fit.spelt(name) for name in fit.rule.parts) if fit else None

    def their_name(self, ours: str) -> str | None:
        """Their name for ours, or None when no rule fits. The parts of a concatenation share one name."""
        fit = self._from_ours.find(ours)
        return fit.spelt(fit.rule.theirs) if fit else None

    def flat_origins(self, flat: str) -> dict[str, Origin]:
        """Our names, and where each comes from, for a layer of theirs whose name has underscores for dots, as adapters' files
        have it. Empty when no rule fits."""
        fit = self._from_flat.find(flat)
        return _origins(flat, fit) if fit else {}

    def origin_of(self, ours: str, *, flat: bool = False) -> Origin | None:
        """Where the tensor or layer `ours` comes from; None when no rule fits. flat: it has underscores for dots."""
        fit = (self._from_our_flat if flat else self._from_ours).find(ours)
        return Origin(fit.spelt(fit.rule.theirs), fit.rule, fit.part) if fit else None

    def dotted(self, flat: str) -> str | None:
        """The name of theirs that has underscores for dots in `flat`; None when no rule fits."""
        fit = self._from_flat.find(flat)
        return fit.spelt(fit.rule.theirs) if fit else None

    # ---- plans: which tensor comes from where ----------------------------------------------------------------------

    def origins(self, their_keys: Iterable[str]) -> tuple[dict[str, Origin], list[str]]:
        """For each of our keys where it comes from, and the keys no rule knows."""
        found: dict[str, Origin] = {}
        unknown: list[str] = []
        for key in their_keys:
            if fit := self._from_theirs.find(key):
                found.update(_origins(key, fit))
            else:
                unknown.append(key)
        return found, unknown

    def assemblies(self, our_keys: Iterable[str]) -> tuple[dict[str, Assembly], list[str]]:
        """For each of their keys what it is made of, and our keys no rule knows or whose other parts are absent."""
        present = set(our_keys)
        found: dict[str, Assembly] = {}
        unknown: list[str] = []
        for key in sorted(present):
            fit = self._from_ours.find(key)
            parts = tuple(fit.spelt(name) for name in fit.rule.parts) if fit else ()
            if fit and present.issuperset(parts):
                found[fit.spelt(fit.rule.theirs)] = Assembly(parts, fit.rule)
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
