"""DyLoRA: a LoRA that can be cut to any smaller rank afterwards (https://arxiv.org/abs/2210.07558, algorithm 1).

Every training step draws a rank b for each layer, a multiple of `unit`, and computes with the first b ranks alone. Of these the
last `unit` learn ("frozen" updates, section 4.2). The scale is that of sd-scripts, alpha / sqrt(rank b), which its tool that
cuts files writes into them as well; b is the whole rank in evaluation and in files, which are those of LoRA.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from library.errors import UserError
from networks.lora import LoRA, LoRAArgs
from networks.network_args import INTEGER, NetworkArgs, arg
from networks.network_base import Layer, LayerSize, bind


@dataclass(frozen=True, kw_only=True)
class DyLoRAArgs(LoRAArgs):
    """Arguments of LoRA, and DyLoRA's own."""

    unit: int | None = arg(INTEGER, "ranks that learn at once; it divides the rank (1)")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.unit is not None and self.unit < 1:
            raise UserError(f"--network_args unit={self.unit}: at least 1.")
        if self.init == "pissa" or self.ggpo_sigma is not None:
            raise UserError(
                "DyLoRA draws which ranks it uses: remove init=pissa, ggpo_sigma and ggpo_beta from --network_args."
            )


class DyLoRA(LoRA):
    """As LoRA, with a rank drawn for every forward pass in training."""

    arguments = DyLoRAArgs

    def __init__(self, layer: Layer, size: LayerSize, args: NetworkArgs, generator: torch.Generator) -> None:
        super().__init__(layer, size, args, generator)
        self.unit = (args.unit if isinstance(args, DyLoRAArgs) else None) or 1
        if size.rank % self.unit:
            raise UserError(f"{layer.key}: --network_args unit={self.unit} does not divide the rank {size.rank}.")

    def factors(self) -> tuple[Tensor, Tensor]:
        """Drawn on the device, without waiting for it, from the default generator, which gradient checkpointing replays."""
        down, up = super().factors()
        if not self.training:
            return down, up
        drawn = torch.rand((), device=down.device) * (self.rank // self.unit)
        used = (drawn.floor() + 1) * self.unit
        index = torch.arange(self.rank, device=down.device)
        learns, is_used = (index < used) & (index >= used - self.unit), index < used
        rows = learns.repeat(self.num_parts).view(-1, *[1] * (down.ndim - 1))
        columns = learns.view(1, -1, *[1] * (up.ndim - 2))
        strength = is_used * (self.rank / used).sqrt()
        down = torch.where(rows, down, down.detach()) * strength.repeat(self.num_parts).view(rows.shape)
        return down, torch.where(columns, up, up.detach())


factory = bind(DyLoRA)
create_network = factory.create_network
create_network_from_weights = factory.create_network_from_weights
