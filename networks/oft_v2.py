"""OFTv2: a layer's inputs are turned, block by block (https://arxiv.org/abs/2506.19847, sections 4.1 and 4.2).

y = W R^T x: an input is turned, which is cheaper than a weight, and the inverse in R = (I + Q)(I - Q)^-1 is a Neumann series of
a few terms, R ~ (I + Q)(I + Q + Q^2 + Q^3), so nothing is inverted. Files are those of peft and of OneTrainer: the upper
triangle of each Q, `oft_R.weight` [blocks, b (b - 1) / 2]. `--network_dim` is the largest size of a block; there is no alpha.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from library.errors import UserError
from networks.network_args import NO_RANK, NetworkArgs
from networks.network_base import Adapter, Layer, LayerSize, bind
from networks.network_files import check_names

NAME = "oft_R.weight"
TERMS = 5
"""Of the series, as peft's default: powers of Q up to the fourth."""


@dataclass(frozen=True, kw_only=True)
class OFTv2Args(NetworkArgs):
    """Arguments of every network but those of a rank and of alpha."""

    unused: ClassVar[tuple[str, ...]] = (*NO_RANK, "conv_alpha", "block_alphas", "conv_block_alphas")


class _Rotation(nn.Module):
    """Holds `weight`, so that it is called `oft_R.weight`."""

    def __init__(self, count: int, numbers: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(count, numbers))


class OFTv2(Adapter):
    """A convolution's inputs are all that its kernel sees; where that is more than one place, the weight is turned."""

    arguments = OFTv2Args

    def __init__(self, layer: Layer, size: LayerSize, args: NetworkArgs, generator: torch.Generator) -> None:
        super().__init__(layer, size, args, generator)
        if isinstance(layer.module, nn.Conv2d) and layer.module.groups != 1:
            raise UserError(f"{layer.key}: OFTv2 cannot adapt a convolution with groups.")
        width = layer.module.weight[0].numel()
        self.block = next(size for size in range(min(size.rank, width), 0, -1) if width % size == 0)
        if self.block < 2:
            raise UserError(f"{layer.key} has {width} inputs, which no block of 2 to {size.rank} (--network_dim) divides.")
        self.oft_R = _Rotation(width // self.block, self.block * (self.block - 1) // 2)
        self.is_spatial = layer.is_spatial

    def turns(self) -> Tensor:
        """multiplier * (R - I), float32, [blocks, b, b]."""
        with torch.autocast(self.oft_R.weight.device.type, enabled=False):
            packed = self.oft_R.weight.float()
            rows, columns = torch.triu_indices(self.block, self.block, 1, device=packed.device)
            upper = packed.new_zeros(len(packed), self.block, self.block).index_put(
                (torch.arange(len(packed), device=packed.device)[:, None], rows, columns), packed
            )
            skew = upper - upper.transpose(-1, -2)
            change = power = skew
            for _ in range(TERMS - 2):
                power = power @ skew
                change = change + power  # Q + Q^2 + ... of (I + Q)(I + Q + ...), whose last power counts once
            return self.multiplier * (2 * change - power)

    def adapted(self, x: Tensor) -> Tensor:
        if self.is_spatial:
            base = self.base
            weight = self._change(base.weight.float()).to(x.dtype)
            added = nn.functional.conv2d(x, weight, None, base.stride, base.padding, base.dilation)  # type: ignore[arg-type]
            out = self.base_forward(x)
            return out + added.to(out.dtype)
        dim = 1 if isinstance(self.base, nn.Conv2d) else -1
        turns = self.turns().to(x.dtype)
        grouped = x.movedim(dim, -1).unflatten(-1, (-1, self.block))
        turned = torch.einsum("...kn,knm->...km", grouped, turns).flatten(-2).movedim(-1, dim)
        return self.base_forward(x + turned.to(x.dtype))

    def _change(self, weight: Tensor) -> Tensor:
        """W R^T - W, at the multiplier."""
        grouped = weight.flatten(1).unflatten(-1, (-1, self.block))
        return torch.einsum("okm,knm->okn", grouped, self.turns()).reshape(weight.shape)

    def merged(self, weight: Tensor) -> Tensor:
        return weight + self._change(weight)

    def weight_norm(self) -> Tensor:
        """||Q||: every number stands in it twice."""
        return self.oft_R.weight.float().norm() * math.sqrt(2)

    def rescale(self, ratio: Tensor) -> None:
        self.oft_R.weight.mul_(ratio)

    @classmethod
    def size_in_file(cls, key: str, tensors: Mapping[str, Tensor]) -> LayerSize:
        check_names(key, tensors, required=(NAME,), known=(), algorithm="OFTv2")
        return LayerSize((1 + math.isqrt(1 + 8 * tensors[NAME].shape[1])) // 2, 1.0)

    def load_file_tensors(self, tensors: Mapping[str, Tensor], source: str) -> None:
        self.size_in_file(self.key, tensors)
        if tensors[NAME].shape != self.oft_R.weight.shape:
            shapes = f"{tuple(tensors[NAME].shape)} in {source}, {tuple(self.oft_R.weight.shape)} here"
            raise UserError(f"{self.key}.{NAME} is {shapes}. Use --dim_from_weights.")
        self.load_state_dict(dict(tensors))


factory = bind(OFTv2)
create_network = factory.create_network
create_network_from_weights = factory.create_network_from_weights
