"""`--network_args`: read once into a frozen dataclass. An unknown name or a wrong type is an error before any layer is made.

Imports no torch: options can be checked before anything heavy is loaded.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Protocol, TypeVar

from library.errors import UserError, suggest

ArgsT = TypeVar("ArgsT")


@dataclass(frozen=True)
class Kind:
    """One kind of value: what the user should have written, and the conversion (raises ValueError or TypeError)."""

    expected: str
    convert: Callable[[Any], Any]


def _integer(value: Any) -> int:
    if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
        raise ValueError(value)
    return int(value)


def _number(value: Any) -> float:
    number = math.nan if isinstance(value, bool) else float(value)
    if not math.isfinite(number):
        raise ValueError(value)
    return number


def _boolean(value: Any) -> bool:
    known = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    return known[str(value).strip().lower()]


def _items(value: Any) -> list[Any]:
    """Of a text with commas, with or without brackets around it, or of a list."""
    if isinstance(value, str):
        text = value.strip()
        bare = text[1:-1] if text.startswith("[") and text.endswith("]") else text
        return [item.strip() for item in bare.split(",")]
    return list(value) if isinstance(value, Sequence) else [value]


def one_of(*known: str) -> Callable[[Any], str]:
    """The conversion of a `Kind` whose values are these words."""

    def convert(value: Any) -> str:
        if value not in known:
            raise ValueError(value)
        return str(value)

    return convert


def _rate_weights(value: Any) -> tuple[float, ...] | str:
    """Numbers (an empty item is 0, as in sd-scripts), or a preset's name with an optional `+offset`."""
    if isinstance(value, str) and value.split("+")[0].strip() in RATE_PRESETS:
        _, _, offset = value.partition("+")
        _number(offset or 0)
        return value
    return tuple(_number(0 if item == "" else item) for item in _items(value))


def _indices(value: Any) -> frozenset[int] | None:
    """`0-3,8` as numbers; None for `all`."""
    text = str(value).strip()
    if text in ("all", "none"):
        return None if text == "all" else frozenset()
    found: set[int] = set()
    for item in text.split(","):
        first, _, last = item.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return frozenset(found)


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise ValueError(text) from error


def _patterns(value: Any) -> tuple[re.Pattern[str], ...]:
    """A list as sd-scripts takes it, in Python's notation, or patterns with commas between them."""
    if isinstance(value, str) and value.strip().startswith("["):
        try:
            value = ast.literal_eval(value.strip())
        except SyntaxError as error:
            raise ValueError(value) from error
    return tuple(_pattern(str(item)) for item in _items(value))


def _by_pattern(convert: Callable[[str], Any]) -> Callable[[Any], tuple[tuple[re.Pattern[str], Any], ...]]:
    def read(value: Any) -> tuple[tuple[re.Pattern[str], Any], ...]:
        pairs = [item.rpartition("=") for item in str(value).split(",")]
        return tuple((_pattern(pattern), convert(number)) for pattern, _, number in pairs)

    return read


RATE_PRESETS: dict[str, Callable[[float], float]] = {
    "cosine": lambda depth: math.sin(math.pi * (1 - depth) / 2),
    "sine": lambda depth: math.sin(math.pi * depth / 2),
    "linear": lambda depth: depth,
    "reverse_linear": lambda depth: 1 - depth,
    "zeros": lambda depth: 0.0,
}
"""Block learning rates by name: weight as a function of the block's position, 0 = first and 1 = last block of its list."""

INTEGER = Kind("a whole number", _integer)
NUMBER = Kind("a number", _number)
BOOLEAN = Kind("true or false", _boolean)
INTEGERS = Kind("whole numbers separated by commas", lambda value: tuple(_integer(item) for item in _items(value)))
NUMBERS = Kind("numbers separated by commas", lambda value: tuple(_number(item) for item in _items(value)))
INDICES = Kind("block numbers such as 0-3,8, or all, or none", _indices)
PATTERNS = Kind("regular expressions separated by commas, or a list of them such as ['a', 'b']", _patterns)
RANKS = Kind("regex=rank, separated by commas", _by_pattern(int))
RATES = Kind("regex=rate, separated by commas", _by_pattern(float))
RATE_WEIGHTS = Kind(f"numbers separated by commas, or one of {', '.join(RATE_PRESETS)} with an optional +x", _rate_weights)


SIZE_ARGS = (
    "conv_dim", "conv_alpha", "block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas", "network_reg_dims",
    "train_block_indices", "exclude_patterns", "include_patterns",
)  # fmt: skip
"""Arguments without effect where ranks and alphas come from a file."""
NO_RANK = ("dropout", "rank_dropout")
"""Arguments without meaning where nothing has a rank-sized space to drop from."""


def arg(kind: Kind, help: str) -> Any:
    """A network argument; None unless the user gave it."""
    return field(default=None, metadata={"kind": kind, "help": help})


class NamedLayer(Protocol):
    """What a pattern is looked for in."""

    @property
    def key(self) -> str:
        """The layer's name in files."""

    @property
    def path(self) -> str:
        """Its dotted path in the original model."""


def fits(pattern: re.Pattern[str], layer: NamedLayer) -> bool:
    """A pattern names a layer when it is found anywhere in its key, or is the whole of its path, as sd-scripts has both."""
    return pattern.search(layer.key) is not None or pattern.fullmatch(layer.path) is not None


@dataclass(frozen=True, kw_only=True)
class NetworkArgs:
    """Arguments of every network that adapts layers one by one. Lists of blocks follow the arch's `BlockTable`."""

    unused: ClassVar[tuple[str, ...]] = ()
    """Of these arguments, those an algorithm has no use for."""

    conv_dim: int | None = arg(INTEGER, "rank of convolutions larger than 1x1; they are left alone without it")
    conv_alpha: float | None = arg(NUMBER, "alpha of those convolutions (1)")
    block_dims: tuple[int, ...] | None = arg(INTEGERS, "rank per block; 0 leaves a block out")
    block_alphas: tuple[float, ...] | None = arg(NUMBERS, "alpha per block")
    conv_block_dims: tuple[int, ...] | None = arg(INTEGERS, "conv_dim per block")
    conv_block_alphas: tuple[float, ...] | None = arg(NUMBERS, "conv_alpha per block")
    down_lr_weight: tuple[float, ...] | str | None = arg(RATE_WEIGHTS, "learning rate factors, down blocks, shallow first")
    mid_lr_weight: tuple[float, ...] | None = arg(NUMBERS, "learning rate factors, middle blocks")
    up_lr_weight: tuple[float, ...] | str | None = arg(RATE_WEIGHTS, "learning rate factors, up blocks, deep first")
    block_lr_zero_threshold: float | None = arg(NUMBER, "factors not above this are 0, and their blocks are left out (0)")
    train_block_indices: frozenset[int] | None = arg(INDICES, "blocks that learn, counted as in block_dims (all)")
    exclude_patterns: tuple[re.Pattern[str], ...] | None = arg(PATTERNS, "layers that are left alone")
    include_patterns: tuple[re.Pattern[str], ...] | None = arg(PATTERNS, "layers that are adapted all the same, anywhere")
    network_reg_dims: tuple[tuple[re.Pattern[str], int], ...] | None = arg(RANKS, "rank of layers by pattern")
    network_reg_lrs: tuple[tuple[re.Pattern[str], float], ...] | None = arg(RATES, "learning rate of layers by pattern")
    dropout: float | None = arg(NUMBER, "LyCORIS' name for --network_dropout")
    rank_dropout: float | None = arg(NUMBER, "probability of dropping one rank for one sample")
    module_dropout: float | None = arg(NUMBER, "probability of skipping one adapted layer for one step")
    loraplus_lr_ratio: float | None = arg(NUMBER, "LoRA+: learning rate of the up matrices over that of the down matrices")
    loraplus_unet_lr_ratio: float | None = arg(NUMBER, "the same, for the denoiser only")
    loraplus_text_encoder_lr_ratio: float | None = arg(NUMBER, "the same, for text encoders only")

    def __post_init__(self) -> None:
        for name in self.unused:
            if getattr(self, name):
                raise UserError(
                    f"--network_args {name}={getattr(self, name)} has no meaning for this network module. Remove it."
                )
        for name in ("dropout", "rank_dropout", "module_dropout"):
            probability = getattr(self, name)
            if probability is not None and not 0 <= probability < 1:
                raise UserError(f"--network_args {name}={probability}: a probability, at least 0 and less than 1.")
        for name in ("loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio"):
            ratio = getattr(self, name)
            if ratio is not None and ratio < 0:
                raise UserError(f"--network_args {name}={ratio}: a factor, at least 0.")
        for name in ("conv_dim", "block_dims", "conv_block_dims"):
            ranks = getattr(self, name)
            if ranks is not None and min([ranks] if isinstance(ranks, int) else ranks) < 0:
                raise UserError(f"--network_args {name}={ranks}: ranks cannot be negative.")

    @property
    def has_block_rates(self) -> bool:
        return not (self.down_lr_weight is None and self.mid_lr_weight is None and self.up_lr_weight is None)

    @property
    def adapts_spatial_convs(self) -> bool:
        """Whether convolutions larger than 1x1 are adapted, and the blocks that hold them searched."""
        return bool(self.conv_dim) or self.conv_block_dims is not None

    def conv_size(self, dim: int, alpha: float) -> tuple[int, float]:
        """Rank and alpha of convolutions larger than 1x1, where those of all else are `dim` and `alpha`."""
        return self.conv_dim or 0, 1.0 if self.conv_alpha is None else self.conv_alpha

    def rank(self, layer: NamedLayer) -> int | None:
        """Of a layer that a pattern gives one; the first that fits."""
        return next((rank for pattern, rank in self.network_reg_dims or () if fits(pattern, layer)), None)

    def rate(self, layer: NamedLayer) -> float | None:
        """The same for its learning rate."""
        return next((rate for pattern, rate in self.network_reg_lrs or () if fits(pattern, layer)), None)

    def plus_ratio(self, is_denoiser: bool) -> float | None:
        own = self.loraplus_unet_lr_ratio if is_denoiser else self.loraplus_text_encoder_lr_ratio
        return own or self.loraplus_lr_ratio or None  # 0 stands for "not given"


@dataclass(frozen=True, kw_only=True)
class ArchArgs:
    """Arguments that a family's table adds: which of its layers learn, at which rank and rate."""

    size_args: ClassVar[tuple[str, ...]] = ()
    """Those without effect where layers and ranks come from a file."""

    def learns(self, part: str) -> bool:
        """Whether a model part is adapted, where its kind (denoiser, text encoders) is."""
        return True

    def extra_modules(self) -> tuple[str, ...]:
        """Paths in the denoiser that are adapted beside the table's containers."""
        return ()

    def rank(self, key: str, default: int) -> int:
        """Rank of the layer with this file key; 0 leaves it out."""
        return default

    def chooses(self, key: str) -> bool:
        """Whether the layer's block is one that learns."""
        return True

    def splits_fused(self) -> bool:
        """Whether each part of a fused layer gets an adapter of its own."""
        return False


def split_args(spec: type[Any], values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(values that `spec` has fields for, the others)."""
    names = {f.name for f in fields(spec)}
    return {k: v for k, v in values.items() if k in names}, {k: v for k, v in values.items() if k not in names}


def parse_network_args(spec: type[ArgsT], values: Mapping[str, Any], *, module: str, also: type[ArchArgs] = ArchArgs) -> ArgsT:
    """`values` (strings from the command line, or typed ones from a file) as a `spec`. None counts as not given.

    `module` is the network module's name, and `also` has the names it knows beside; both are for messages. Raises `UserError`
    with every unknown name or wrong value at once.
    """
    kinds: dict[str, Kind] = {f.name: f.metadata["kind"] for f in fields(spec)}  # type: ignore[arg-type]
    parsed: dict[str, Any] = {}
    unknown = [name for name in values if name not in kinds]
    names = [*kinds, *(f.name for f in fields(also))]
    problems = [f"unknown network argument '{name}'.{suggest(name, names)}" for name in unknown]
    for name, value in values.items():
        if name in unknown or value is None:
            continue
        try:
            parsed[name] = kinds[name].convert(value)
        except (ValueError, TypeError, KeyError):
            problems.append(f"--network_args {name}={value}: expected {kinds[name].expected}.")
    if problems:
        known = f" Known to {module}: {', '.join(names)}." if unknown else ""
        raise UserError(" ".join(problems) + known)
    return spec(**parsed)
