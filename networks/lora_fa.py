"""LoRA-FA (https://arxiv.org/abs/2308.03303) under sd-scripts' name: LoRA with `freeze_down=true`."""

from __future__ import annotations

from networks.lora import DOWN, LoRA
from networks.network_base import bind


class LoRAFA(LoRA):
    """As LoRA, whose files it reads and writes."""

    @property
    def frozen_parameters(self) -> frozenset[str]:
        return frozenset({DOWN})


factory = bind(LoRAFA)
create_network = factory.create_network
create_network_from_weights = factory.create_network_from_weights
