"""Strength of an adapter by block of the denoiser: one list of numbers, counted as the family counts its blocks.

A list has one number for each block, or another one before them ("base") for all that is in no block and for the text encoders.
Stable Diffusion and SDXL also know the shorter lists that interfaces pass around, which leave out blocks without attention
(`BlockTable.short_lists`): base first; a block that such a list does not name has 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import nn

from library.errors import UserError
from networks.network_targets import DENOISER, BlockTable, NetworkArch, every_layer


def parse_weights(text: str, flag: str = "--lbw") -> tuple[float, ...]:
    """`1,0,0.5*12`: numbers with commas between, `x*n` for n times x; brackets around them are taken off.

    Raises `UserError` naming `flag` for anything else.
    """
    found: list[float] = []
    for item in text.strip().strip("[]").split(","):
        number, star, times = item.partition("*")
        try:
            value, count = float(number), int(times) if star else 1
        except ValueError:
            value, count = math.nan, 1
        if not math.isfinite(value) or count < 1:
            raise UserError(f"{flag} {text}: '{item.strip()}' is not a number, or number*times.")
        found += [value] * count
    return tuple(found)


def layer_weights(weights: Sequence[float], arch: NetworkArch, parts: Mapping[str, nn.Module]) -> dict[str, float]:
    """Strength by layer key, of every layer in the model's `parts`, which may be without memory.

    Raises `UserError` for a list of a length that this model has no meaning for.
    """
    layers = every_layer(arch, parts)
    if arch.blocks is not None:
        blocks = {key: arch.blocks.index(key) if layer.part == DENOISER else None for key, layer in layers.items()}
        base, by_block = _by_table(weights, arch.blocks)
    else:
        paths = _block_paths(arch, parts[DENOISER])
        blocks = {
            key: next((number for number, path in enumerate(paths) if layer.path.startswith(path)), None)
            for key, layer in layers.items()
        }
        base, by_block = _by_count(weights, len(paths), {})
    return {key: base if block is None else by_block.get(block, base) for key, block in blocks.items()}


def _by_table(weights: Sequence[float], table: BlockTable) -> tuple[float, dict[int, float]]:
    """(base, strength by block). The blocks before and after those that can be named follow the base in a short list."""
    named = table.short_lists.get(len(weights))
    if named is None:
        return _by_count(weights, table.count, table.short_lists)
    found = dict.fromkeys(range(table.lead, table.count - table.tail), 0.0)
    for weight, numbers in zip(weights[1:], named, strict=True):
        found |= dict.fromkeys(numbers, weight)
    return weights[0], found


def _by_count(weights: Sequence[float], count: int, others: Mapping[int, object]) -> tuple[float, dict[int, float]]:
    if len(weights) not in (count, count + 1):
        known = ", ".join(str(number) for number in sorted([*others, count]))
        raise UserError(
            f"{len(weights)} block weights: this model takes {known} or {count + 1}: one for each of its {count} blocks, "
            "in a list of one more the first for all else. `0.5*12` stands for twelve numbers."
        )
    base, own = (1.0, weights) if len(weights) == count else (weights[0], weights[1:])
    return base, dict(enumerate(own))


def _block_paths(arch: NetworkArch, denoiser: nn.Module) -> list[str]:
    """What the paths of each block's layers begin with ("double_blocks.0."), in the order of the model's definition."""
    return [
        f"{group.canonical(path)}."
        for group in arch.groups
        if group.part == DENOISER
        for path, module in denoiser.named_modules()
        if type(module).__name__ in group.containers
    ]


def table_weights(weights: Sequence[float], arch: NetworkArch, keys: Sequence[str]) -> dict[str, float]:
    """Strength by layer key without a model. Raises `UserError` for families whose blocks only a model tells."""
    if arch.blocks is None:
        raise UserError(f"block weights of adapters for {arch.name} need the model, which tells its blocks. Give --model.")
    base, by_block = _by_table(weights, arch.blocks)
    blocks = {key: arch.blocks.index(key) for key in keys}
    return {key: base if block is None else by_block.get(block, base) for key, block in blocks.items()}
