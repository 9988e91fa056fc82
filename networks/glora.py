"""GLoRA: a low-rank change of what a layer is given and one of what it gives (https://arxiv.org/abs/2306.07967, equation 10).

W' = W + (W a1 a2 + b1 b2) * alpha / rank, computed as W (x + a1 a2 x) + b1 b2 x. Files are LyCORIS'.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.errors import UserError
from networks.exact_alpha import ExactAlpha
from networks.network_args import NO_RANK, NetworkArgs
from networks.network_base import Adapter, Layer, LayerSize, bind
from networks.network_files import check_names

NAMES = ("a1.weight", "a2.weight", "b1.weight", "b2.weight")


@dataclass(frozen=True, kw_only=True)
class GLoRAArgs(NetworkArgs):
    """Arguments of every network but dropout at the rank."""

    unused: ClassVar[tuple[str, ...]] = NO_RANK


class GLoRA(ExactAlpha, Adapter):
    """`a2` [rank, in], `a1` [in, rank], `b2` [rank, in], `b1` [out, rank]; a convolution's kernel belongs to `b2`."""

    arguments = GLoRAArgs
    plus_parameters = frozenset({"a2.weight", "b2.weight"})
    a1: nn.Module
    a2: nn.Module
    b1: nn.Module
    b2: nn.Module

    def __init__(self, layer: Layer, size: LayerSize, args: NetworkArgs, generator: torch.Generator) -> None:
        super().__init__(layer, size, args, generator)
        base, rank = layer.module, size.rank
        if isinstance(base, nn.Conv2d) and (base.groups != 1 or base.padding_mode != "zeros"):
            raise UserError(f"{layer.key}: GLoRA cannot adapt a convolution with groups or a padding mode other than zeros.")
        self.rank = rank
        out, width, *kernel = base.weight.shape
        one = [1] * len(kernel)
        shapes = ((width, rank, *one), (rank, width, *one), (out, rank, *one), (rank, width, *kernel))
        for name, shape in zip(NAMES, shapes, strict=True):
            holder = nn.Module()
            holder.weight = nn.Parameter(torch.zeros(shape))
            if "1" in name:
                nn.init.kaiming_uniform_(holder.weight, a=math.sqrt(5), generator=generator)
            self.add_module(name.partition(".")[0], holder)
        self._set_alpha(size.alpha or rank)

    def _weights(self) -> list[Tensor]:
        return [self.get_parameter(name) for name in NAMES]

    def adapted(self, x: Tensor) -> Tensor:
        strength, base = self._alpha / self.rank * self.multiplier, self.base
        a1, a2, b1, b2 = (weight.to(x.dtype) for weight in self._weights())
        if not isinstance(base, nn.Conv2d):
            out = self.base_forward(x + F.linear(F.linear(x, a2) * strength, a1).to(x.dtype))
            return out + F.linear(F.linear(x, b2) * strength, b1).to(out.dtype)
        out = self.base_forward(x + F.conv2d(F.conv2d(x, a2) * strength, a1).to(x.dtype))
        hidden = F.conv2d(x, b2, None, base.stride, base.padding, base.dilation)  # type: ignore[arg-type]
        return out + F.conv2d(hidden * strength, b1).to(out.dtype)

    def merged(self, weight: Tensor) -> Tensor:
        a1, a2, b1, b2 = (one.float().flatten(1) for one in self._weights())
        turned = torch.einsum("oi...,ir,rj->oj...", weight, a1, a2)
        return weight + (turned + (b1 @ b2).view(weight.shape)) * (self._alpha / self.rank * self.multiplier)

    def weight_norm(self) -> Tensor:
        """Of b1 b2 and of a1 a2, the relative change, together."""
        a1, a2, b1, b2 = (one.float().flatten(1) for one in self._weights())
        return torch.stack([(a1 @ a2).norm(), (b1 @ b2).norm()]).norm() * abs(self._alpha / self.rank)

    def rescale(self, ratio: Tensor) -> None:
        for weight in self._weights():
            weight.mul_(ratio.sqrt())

    @classmethod
    def size_in_file(cls, key: str, tensors: Mapping[str, Tensor]) -> LayerSize:
        check_names(key, tensors, required=NAMES, known=("alpha",), algorithm="GLoRA")
        rank = tensors["a2.weight"].shape[0]
        return LayerSize(rank, float(tensors["alpha"]) if "alpha" in tensors else float(rank))

    def load_file_tensors(self, tensors: Mapping[str, Tensor], source: str) -> None:
        size, own = self.size_in_file(self.key, tensors), self.state_dict()
        for name in NAMES:
            if tensors[name].numel() != own[name].numel() or tensors[name].shape[:2] != own[name].shape[:2]:
                shapes = f"{tuple(tensors[name].shape)} in {source}, {tuple(own[name].shape)} here"
                raise UserError(f"{self.key}.{name} is {shapes}. Use --dim_from_weights.")
        given = {name: tensors[name].view(own[name].shape) for name in NAMES}
        self.load_state_dict({**given, "alpha": torch.tensor(size.alpha or size.rank)})


factory = bind(GLoRA)
create_network = factory.create_network
create_network_from_weights = factory.create_network_from_weights
