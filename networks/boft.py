"""BOFT: outputs turned in several stages of blocks that mix farther and farther (https://arxiv.org/abs/2311.06243, section 4).

Stage i of a layer with 2^p blocks of size b takes its blocks from outputs that stand b 2^i / 2 apart, so that p + 1 stages join
every output with every other one (a butterfly). `--network_dim` is the largest size of a block that is allowed, and
`--network_alpha` is as of OFT. The multiplier is every stage's own. Files are LyCORIS': `oft_blocks` [stages, blocks, b, b].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from library.errors import UserError
from networks.network_args import NO_RANK, NetworkArgs
from networks.network_base import Layer, LayerSize, bind
from networks.network_files import check_names
from networks.oft import OutputTurner
from networks.rotations import ALPHA, BLOCKS, cayley, limit_in_file, limited_skew


@dataclass(frozen=True, kw_only=True)
class BOFTArgs(NetworkArgs):
    """Arguments of every network but those of a rank."""

    unused: ClassVar[tuple[str, ...]] = NO_RANK


def butterfly(width: int, most: int) -> tuple[int, int] | None:
    """(blocks, size): the largest even size of at most `most` whose number is a power of 2. None where there is none."""
    odd = width // (width & -width)
    sizes = [odd << step for step in range(1, width.bit_length()) if width % (odd << step) == 0 and odd << step <= most]
    return (width // sizes[-1], sizes[-1]) if sizes else None


class BOFT(OutputTurner):
    """`oft_blocks` [stages, blocks, size, size]."""

    arguments = BOFTArgs
    default_alpha = 0.0

    def __init__(self, layer: Layer, size: LayerSize, args: NetworkArgs, generator: torch.Generator) -> None:
        super().__init__(layer, size, args, generator)
        width = layer.module.weight.shape[0]
        found = butterfly(width, size.rank)
        if found is None:
            least = 2 * (width // (width & -width))
            raise UserError(
                f"{layer.key} has {width} outputs: BOFT needs 1, 2, 4, 8 ... blocks of an even size. "
                f"--network_dim {size.rank} is too small for it; at least {least}, or leave the layer out (exclude_patterns)."
            )
        count, block = found
        self.oft_blocks = nn.Parameter(torch.zeros(count.bit_length(), count, block, block))
        self._set_alpha(size.alpha)

    def change(self, values: Tensor, multiplier: float) -> Tensor:
        block = self.oft_blocks.shape[-1]
        with torch.autocast(values.device.type, enabled=False):
            turns = cayley(limited_skew(self.oft_blocks, self._alpha * values.shape[-1]))
            turns = multiplier * (turns - torch.eye(block, device=turns.device))
        turned = values
        for stage, turn in enumerate(turns.to(values.dtype)):
            apart = block // 2 << stage
            pairs = turned.unflatten(-1, (-1, 2, apart)).transpose(-1, -2)  # [..., groups, apart, 2]
            grouped = pairs.flatten(-3).unflatten(-1, (-1, block))
            added = torch.einsum("kij,...kj->...ki", turn, grouped).flatten(-2)
            turned = turned + added.unflatten(-1, pairs.shape[-3:]).transpose(-1, -2).flatten(-3)
        return turned - values

    @classmethod
    def size_in_file(cls, key: str, tensors: Mapping[str, Tensor]) -> LayerSize:
        check_names(key, tensors, required=(BLOCKS,), known=("alpha",), algorithm="BOFT")
        if tensors[BLOCKS].ndim != 4:
            raise UserError(f"{key}: the file was made by OFT, not by BOFT. Use --network_module networks.oft.")
        return LayerSize(tensors[BLOCKS].shape[-1], limit_in_file(tensors))

    def load_file_tensors(self, tensors: Mapping[str, Tensor], source: str) -> None:
        size, given = self.size_in_file(self.key, tensors), tensors[BLOCKS]
        if given.shape != self.oft_blocks.shape:
            shapes = f"{tuple(given.shape)} in {source}, {tuple(self.oft_blocks.shape)} here"
            raise UserError(f"{self.key}.{BLOCKS} is {shapes}. Use --dim_from_weights.")
        self.load_state_dict({BLOCKS: given, ALPHA: torch.tensor(size.alpha)})


factory = bind(BOFT)
create_network = factory.create_network
create_network_from_weights = factory.create_network_from_weights
