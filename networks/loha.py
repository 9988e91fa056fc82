"""LoHa: the elementwise product of two low-rank weights (FedPara, https://arxiv.org/abs/2108.06098, proposition 1).

dW = (w1_a @ w1_b) * (w2_a @ w2_b) * alpha / rank has a rank of up to rank^2. It is not built where that is more work: it equals
up [out, rank^2] @ down [rank^2, in] with Khatri-Rao products for factors, so that a layer of rank r computes as a LoRA of r^2.
Files are LyCORIS': a convolution's kernel is folded into the columns of `*_b`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.low_rank import LENGTHS, LowRankAdapter, without_core
from networks.network_args import NetworkArgs
from networks.network_base import Layer, LayerSize, bind
from networks.network_files import check_names

NAMES = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
CORES = ("hada_t1", "hada_t2")


class LoHa(LowRankAdapter):
    """`hada_w1_a`, `hada_w2_a` [out, rank]; `hada_w1_b`, `hada_w2_b` [rank, in * kernel]."""

    plus_parameters = frozenset({"hada_w1_a", "hada_w2_a"})
    hada_w1_a: nn.Parameter
    hada_w1_b: nn.Parameter
    hada_w2_a: nn.Parameter
    hada_w2_b: nn.Parameter

    def __init__(self, layer: Layer, size: LayerSize, args: NetworkArgs, generator: torch.Generator) -> None:
        super().__init__(layer, size, args, generator)
        out, width = layer.module.weight.flatten(1).shape
        for name, deviation in zip(NAMES, (0.1, 1.0, 0.0, 1.0), strict=True):
            shape = (out, size.rank) if name.endswith("_a") else (size.rank, width)
            self.register_parameter(name, nn.Parameter(torch.zeros(shape).normal_(0.0, deviation, generator=generator)))
        self._spread = size.rank**2 * (out + width) <= out * width

    def delta(self, x: Tensor, multiplier: float = 1.0) -> Tensor:
        if not self._spread and not self._drops:
            weight = self.delta_weight(multiplier).to(x.dtype)
            return self._convolve(x, weight) if isinstance(self.base, nn.Conv2d) else F.linear(x, weight)
        up = (self.hada_w1_a[:, :, None] * self.hada_w2_a[:, None, :]).flatten(1)
        down = (self.hada_w1_b[:, None] * self.hada_w2_b[None]).flatten(0, 1)
        if isinstance(self.base, nn.Conv2d):
            up, down = up[:, :, None, None], down.view(-1, *self.base.weight.shape[1:])
        return self._through(x, down, up, self.scale * multiplier)

    def delta_weight(self, multiplier: float = 1.0) -> Tensor:
        first, second = self.hada_w1_a.float() @ self.hada_w1_b.float(), self.hada_w2_a.float() @ self.hada_w2_b.float()
        return (first * second * (self.scale * multiplier)).view(self.base.weight.shape)

    def rescale(self, ratio: Tensor) -> None:
        for name in NAMES:
            getattr(self, name).mul_(ratio**0.25)

    @classmethod
    def size_in_file(cls, key: str, tensors: Mapping[str, Tensor]) -> LayerSize:
        check_names(key, tensors, required=NAMES, known=(*CORES, LENGTHS, "alpha"), algorithm="LoHa")
        rank = tensors["hada_w1_b"].shape[0]
        return LayerSize(rank, float(tensors["alpha"]) if "alpha" in tensors else float(rank))

    def load_file_tensors(self, tensors: Mapping[str, Tensor], source: str) -> None:
        size = self.size_in_file(self.key, tensors)
        self._take({"alpha": torch.tensor(size.alpha or size.rank), **_without_cores(tensors)}, source)


def _without_cores(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = dict(tensors)
    for core in CORES:
        found = without_core(found, core, f"hada_w{core[-1]}_a", f"hada_w{core[-1]}_b")
    return found


factory = bind(LoHa)
create_network = factory.create_network
create_network_from_weights = factory.create_network_from_weights
