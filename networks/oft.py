"""OFT: a layer's outputs are turned, block by block (https://arxiv.org/abs/2306.07280, section 3.3).

W' = R^T W with a block-diagonal R = (I + Q)(I - Q)^-1 (Cayley) of a skew-symmetric Q = B - B^T. What is turned here is the
output, which is the same and needs no weight. `--network_dim` is the number of blocks, `--network_alpha` times the width limits
||Q|| (0: no limit), the multiplier leads in a straight line from I to R. Files are sd-scripts': `oft_unet_...oft_blocks`.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from library.errors import UserError
from networks.exact_alpha import ExactAlpha
from networks.network_args import BOOLEAN, NO_RANK, NetworkArgs, arg
from networks.network_base import Adapter, Layer, LayerSize, bind
from networks.network_files import check_names, turned_name
from networks.network_targets import DENOISER
from networks.rotations import ALPHA, BLOCKS, NO_LIMIT, cayley, limit_in_file, limited_skew, listed_blocks

_ATTENTION = re.compile(r"attn|attention_")
_TRANSFORMER = re.compile(r"_transformer_blocks_|_proj_(in|out)$")


class OutputTurner(ExactAlpha, Adapter):
    """An adapter that turns what its layer gives, without the bias."""

    @abstractmethod
    def change(self, values: Tensor, multiplier: float) -> Tensor:
        """What turning adds to vectors [..., out]: outputs, or a weight's columns."""

    def adapted(self, x: Tensor) -> Tensor:
        out, bias, dim = self.base_forward(x), self.base.bias, 1 if isinstance(self.base, nn.Conv2d) else -1
        plain = out.movedim(dim, -1) if bias is None else out.movedim(dim, -1) - bias.to(out.dtype)
        return out + self.change(plain, self.multiplier).to(out.dtype).movedim(-1, dim)

    def merged(self, weight: Tensor) -> Tensor:
        return weight + self.change(weight.movedim(0, -1), self.multiplier).movedim(-1, 0)

    def weight_norm(self) -> Tensor:
        """||Q||."""
        squares = [limited_skew(parameter, 0.0).square().sum() for parameter in self.parameters()]
        return torch.stack(squares).sum().sqrt()

    def rescale(self, ratio: Tensor) -> None:
        for parameter in self.parameters():
            parameter.mul_(ratio)


@dataclass(frozen=True, kw_only=True)
class OFTArgs(NetworkArgs):
    """Arguments of every network but those of a rank, and OFT's own, under sd-scripts' names."""

    unused: ClassVar[tuple[str, ...]] = NO_RANK
    enable_all_linear: bool | None = arg(BOOLEAN, "every linear layer and 1x1 convolution, not attention alone (false)")
    enable_conv: bool | None = arg(BOOLEAN, "larger convolutions, and the blocks that hold them, too (false)")

    @property
    def adapts_spatial_convs(self) -> bool:
        return bool(self.enable_conv) or super().adapts_spatial_convs

    def conv_size(self, dim: int, alpha: float) -> tuple[int, float]:
        return (dim, alpha) if self.enable_conv and self.conv_dim is None else super().conv_size(dim, alpha)


class OFT(OutputTurner):
    """`oft_blocks` [blocks, size, size]; of a layer in parts a list of such, each part's rows for itself."""

    arguments = OFTArgs
    denoiser_only = True
    default_alpha = 1e-3
    oft_blocks: nn.Parameter | nn.ParameterList

    def __init__(self, layer: Layer, size: LayerSize, args: NetworkArgs, generator: torch.Generator) -> None:
        super().__init__(layer, size, args, generator)
        out = layer.module.weight.shape[0]
        self.rows = layer.rows or (out,)
        if wrong := [rows for rows in self.rows if rows % size.rank]:
            raise UserError(f"{layer.key}: {wrong[0]} outputs do not divide into {size.rank} blocks (--network_dim).")
        made = [nn.Parameter(torch.zeros(size.rank, rows // size.rank, rows // size.rank)) for rows in self.rows]
        self.oft_blocks = nn.ParameterList(made) if layer.rows else made[0]
        self._set_alpha(size.alpha)

    @property
    def _listed(self) -> Sequence[Tensor]:
        return list(self.oft_blocks) if isinstance(self.oft_blocks, nn.ParameterList) else [self.oft_blocks]

    def change(self, values: Tensor, multiplier: float) -> Tensor:
        changes = []
        for blocks, part in zip(self._listed, values.split(self.rows, -1), strict=True):
            with torch.autocast(values.device.type, enabled=False):
                turn = cayley(limited_skew(blocks, self._alpha * part.shape[-1]))
                turn = multiplier * (turn - torch.eye(turn.shape[-1], device=turn.device))
            grouped = part.unflatten(-1, turn.shape[:2])
            changes.append(torch.einsum("...kn,knm->...km", grouped, turn.to(values.dtype)).flatten(-2))
        return torch.cat(changes, -1)

    @classmethod
    def adapts(cls, layer: Layer, args: NetworkArgs) -> bool:
        """sd-scripts': of the denoiser alone, and there the attention's projections unless asked for more."""
        if layer.part != DENOISER:
            return False
        assert isinstance(args, OFTArgs)
        chosen = args.enable_all_linear or _ATTENTION.search(layer.key) is not None
        return chosen or bool(args.enable_conv and not _TRANSFORMER.search(layer.key))

    @property
    def file_key(self) -> str:
        return turned_name(self.key)

    @classmethod
    def size_in_file(cls, key: str, tensors: Mapping[str, Tensor]) -> LayerSize:
        names = [name for name in tensors if name.partition(".")[0] == BLOCKS]
        check_names(key, tensors, required=names or (BLOCKS,), known=("alpha",), algorithm="OFT")
        if tensors[names[0]].ndim != 3:
            raise UserError(f"{key}: the file was made by BOFT, not by OFT. Use --network_module networks.boft.")
        return LayerSize(tensors[names[0]].shape[0], limit_in_file(tensors))

    @classmethod
    def like_file(
        cls, layer: Layer, size: LayerSize, args: NetworkArgs, generator: torch.Generator, tensors: Mapping[str, Tensor]
    ) -> Adapter:
        """In the parts that the file has."""
        listed = listed_blocks(tensors)
        return cls(replace(layer, rows=tuple(one.shape[0] * one.shape[1] for one in listed)), size, args, generator)

    def file_tensors(self) -> dict[str, Tensor]:
        tensors = super().file_tensors()
        return tensors if self._alpha else {**tensors, ALPHA: torch.tensor(NO_LIMIT)}

    def load_file_tensors(self, tensors: Mapping[str, Tensor], source: str) -> None:
        size = self.size_in_file(self.key, tensors)
        given = {**tensors, ALPHA: torch.tensor(size.alpha)}
        if isinstance(self.oft_blocks, nn.ParameterList) and BLOCKS in given:
            given[f"{BLOCKS}.0"] = given.pop(BLOCKS)
        own = self.state_dict()
        if {k: v.shape for k, v in own.items()} != {k: v.shape for k, v in given.items()}:
            shapes = [", ".join(str(tuple(v.shape)) for k, v in one.items() if k != "alpha") for one in (given, own)]
            raise UserError(f"{self.key} in {source} has blocks {shapes[0]}, this network {shapes[1]}. Use --dim_from_weights.")
        self.load_state_dict(given)


factory = bind(OFT)
create_network = factory.create_network
create_network_from_weights = factory.create_network_from_weights
