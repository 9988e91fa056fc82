"""OFT under sd-scripts' name for FLUX.1: q, k, v and the MLP of a fused layer are turned each for itself, and files hold a list
of blocks for every layer, `oft_blocks.0` and so on."""

from __future__ import annotations

from dataclasses import replace

import torch

from networks.lora_flux import ARCH
from networks.network_args import NetworkArgs
from networks.network_base import Layer, LayerSize, bind
from networks.oft import OFT


class SplitOFT(OFT):
    """As OFT, in parts; a layer that is not fused is one."""

    splits_fused = True

    def __init__(self, layer: Layer, size: LayerSize, args: NetworkArgs, generator: torch.Generator) -> None:
        rows = layer.rows or (layer.module.weight.shape[0],)
        super().__init__(replace(layer, rows=rows), size, args, generator)


factory = bind(SplitOFT, ARCH)
create_network = factory.create_network
create_network_from_weights = factory.create_network_from_weights
