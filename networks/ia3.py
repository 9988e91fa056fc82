"""(IA)^3: each output, or input, of a layer is scaled by a learned number (https://arxiv.org/abs/2205.05638, section 3.3).

W' = (1 + w) * W with w [out] for rows, or [in] for columns (`train_on_input`), which starts at 0. Files are LyCORIS'.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from library.errors import UserError
from networks.network_args import BOOLEAN, NO_RANK, NetworkArgs, arg
from networks.network_base import Adapter, Layer, LayerSize, bind
from networks.network_files import check_names


@dataclass(frozen=True, kw_only=True)
class IA3Args(NetworkArgs):
    """(IA)^3 has no rank: the network's has no effect."""

    unused: ClassVar[tuple[str, ...]] = (*NO_RANK, "conv_alpha", "block_alphas", "conv_block_alphas")
    train_on_input: bool | None = arg(BOOLEAN, "scale a layer's input rather than its output (false)")


class IA3(Adapter):
    """`weight` [width], of a convolution [1, width, 1, 1]; `on_input`: 0 or 1, which."""

    arguments = IA3Args
    on_input: Tensor

    def __init__(self, layer: Layer, size: LayerSize, args: NetworkArgs, generator: torch.Generator) -> None:
        super().__init__(layer, size, args, generator)
        base, spatial = layer.module, (1, 1) if isinstance(layer.module, nn.Conv2d) else ()
        self.scales_input = isinstance(args, IA3Args) and bool(args.train_on_input)
        if isinstance(base, nn.Conv2d) and base.groups != 1:
            raise UserError(f"{layer.key}: (IA)^3 cannot adapt a convolution with groups.")
        width = base.weight.shape[1 if self.scales_input else 0]
        self.weight = nn.Parameter(torch.zeros((1, width, *spatial) if spatial else (width,)))
        self.register_buffer("on_input", torch.tensor(int(self.scales_input)))

    def adapted(self, x: Tensor) -> Tensor:
        change = self.multiplier * self.weight
        if self.scales_input:
            return self.base_forward(x + x * change.to(x.dtype))
        out, bias = self.base_forward(x), self.base.bias
        plain = out if bias is None else out - bias.to(out.dtype).view(-1, *self.weight.shape[2:])
        return out + plain * change.to(out.dtype)

    def merged(self, weight: Tensor) -> Tensor:
        other = [1] * (weight.ndim - 2)
        shape = (1, -1, *other) if self.scales_input else (-1, 1, *other)
        return weight * (1 + self.multiplier * self.weight.float().view(shape))

    def weight_norm(self) -> Tensor:
        return self.weight.norm()

    def rescale(self, ratio: Tensor) -> None:
        self.weight.mul_(ratio)

    @classmethod
    def size_in_file(cls, key: str, tensors: Mapping[str, Tensor]) -> LayerSize:
        check_names(key, tensors, required=("weight", "on_input"), known=(), algorithm="(IA)^3")
        return LayerSize(1, 1.0)

    @classmethod
    def like_file(
        cls, layer: Layer, size: LayerSize, args: NetworkArgs, generator: torch.Generator, tensors: Mapping[str, Tensor]
    ) -> Adapter:
        if isinstance(args, IA3Args):
            args = replace(args, train_on_input=bool(tensors["on_input"]))
        return cls(layer, size, args, generator)

    def load_file_tensors(self, tensors: Mapping[str, Tensor], source: str) -> None:
        self.size_in_file(self.key, tensors)
        if bool(tensors["on_input"]) != self.scales_input or tensors["weight"].numel() != self.weight.numel():
            raise UserError(
                f"{self.key} in {source} scales {tensors['weight'].numel()} {'inputs' if tensors['on_input'] else 'outputs'}, "
                f"this network {self.weight.numel()} {'inputs' if self.scales_input else 'outputs'}. Use --dim_from_weights."
            )
        self.load_state_dict({"weight": tensors["weight"].view(self.weight.shape), "on_input": tensors["on_input"]})


factory = bind(IA3)
create_network = factory.create_network
create_network_from_weights = factory.create_network_from_weights
