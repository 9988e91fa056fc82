"""A LoRA under the names that diffusers and peft give its layers.

diffusers reads sd-scripts' names of FLUX.1's blocks and of CLIP, at the published widths, and drops all else without an error:
the layers before and after the blocks, and other sizes. Under its own names it reads everything that it has a place for.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from library.errors import UserError
from library.key_layout import Origin
from networks.lora import DOWN, UP, LoRA
from networks.network_files import by_layer, shorten
from networks.network_targets import NetworkArch


def in_diffusers_names(tensors: Mapping[str, Tensor], arch: NetworkArch, source: str) -> dict[str, Tensor]:
    """`tensors` of a LoRA file in sd-scripts' names as `transformer.x.lora_A.weight` and `.lora_B.weight`, in their dtypes.

    alpha / rank is multiplied into lora_B, as not every reader looks for it elsewhere. The parts of a fused layer share lora_A.
    Raises `UserError` naming `source` for layers that diffusers has no place for, and for other algorithms.
    """
    found: dict[str, Tensor] = {}
    unknown = []
    for key, layer in by_layer(tensors).items():
        size = LoRA.size_in_file(key, layer)
        places = _places(key, arch)
        if not places:
            unknown.append(key)
        up = layer[UP].float() * (size.alpha / size.rank)
        for path, origin in places.items():
            found[f"{path}.lora_A.weight"] = layer[DOWN].clone()
            found[f"{path}.lora_B.weight"] = origin.take(up).to(layer[UP].dtype).contiguous()
    if unknown:
        raise UserError(
            f"{source} has {len(unknown)} layers that diffusers has no place for or no name here ({shorten(unknown)}). "
            "It can be used in sd-scripts' names."
        )
    return found


def _places(key: str, arch: NetworkArch) -> dict[str, Origin]:
    """Dotted paths of the layers that `key` is in diffusers, and what of it each is."""
    for group in arch.groups:
        if group.diffusers is not None and key.startswith(f"{group.prefix}_"):
            origins = group.diffusers.layers.flat_origins(key.removeprefix(f"{group.prefix}_"))
            return {f"{group.diffusers.part}.{path}": origin for path, origin in origins.items()}
    return {}
