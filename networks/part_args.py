"""`--network_args` that the transformer families share: ranks of parts of the blocks, and of layers outside of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from library.errors import UserError
from networks.network_args import BOOLEAN, ArchArgs, arg
from networks.network_targets import Layer


@dataclass(frozen=True, kw_only=True)
class PartArgs(ArchArgs):
    """A part's rank 0 leaves it out; without one it has --network_dim."""

    split_qkv: bool | None = arg(BOOLEAN, "an adapter of its own for each part of fused layers (false)")
    verbose: bool | None = arg(BOOLEAN, "no effect: what is adapted is always logged")

    block: ClassVar[re.Pattern[str]]
    """Start of the file keys of layers in blocks."""
    parts: ClassVar[Mapping[str, str]]
    """Argument -> what stands in the file keys of its layers, which are in blocks. The first that fits and is given counts."""
    outside: ClassVar[str]
    """The argument that has a rank for each of `outside_modules`."""
    outside_modules: ClassVar[tuple[str, ...]]

    def __post_init__(self) -> None:
        given = getattr(self, self.outside)
        if given is not None and len(given) != len(self.outside_modules):
            raise UserError(
                f"--network_args {self.outside}={given}: {len(self.outside_modules)} ranks, of "
                f"{', '.join(self.outside_modules)}."
            )

    @property
    def _outside_ranks(self) -> dict[str, int]:
        return dict(zip(self.outside_modules, getattr(self, self.outside) or (), strict=False))

    def extra_modules(self) -> tuple[str, ...]:
        return tuple(name for name, rank in self._outside_ranks.items() if rank)

    def rank(self, key: str, default: int) -> int:
        if self.block.match(key) is None:
            keys = {f"lora_unet_{name.replace('.', '_')}": rank for name, rank in self._outside_ranks.items()}
            return next((rank for start, rank in keys.items() if key.startswith(start)), default)
        own = (getattr(self, name) for name, sign in self.parts.items() if sign in key)
        return next((rank for rank in own if rank is not None), default)

    def splits_fused(self) -> bool:
        return bool(self.split_qkv)


@dataclass(frozen=True, kw_only=True)
class PartArgsWithT5(PartArgs):
    """Of families that have T5 among their text encoders."""

    train_t5xxl: bool | None = arg(BOOLEAN, "train T5, too (false)")

    def learns(self, part: str) -> bool:
        return part != "t5xxl" or bool(self.train_t5xxl)


def fused_qkv(layer: Layer) -> tuple[int, ...]:
    """Rows of q, k and v of `qkv`."""
    return (layer.module.weight.shape[1],) * 3 if layer.key.endswith("_qkv") else ()
