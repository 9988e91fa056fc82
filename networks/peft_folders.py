"""An adapter as peft has it: a folder with `adapter_config.json` and `adapter_model.safetensors` for each part of the model.

`PeftModel.from_pretrained(unet, folder, subfolder="unet")` reads one. peft itself knows nothing of a pipeline's parts.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from library.errors import UserError

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
_RANK = ".lora_A.weight"


def peft_parts(folder: Path) -> list[Path]:
    """The folders with an adapter in them: `folder` itself, or some in it."""
    return [found.parent for found in (*folder.glob(CONFIG), *sorted(folder.glob(f"*/{CONFIG}")))]


def read_peft(folder: Path) -> dict[str, Tensor]:
    """All tensors, with `alpha` of each layer; of an adapter in a folder of its own, names begin with the folder's."""
    parts = peft_parts(folder)
    if not parts:
        raise UserError(f"{folder} is a folder without {CONFIG}, so it is no adapter of peft. Give a file.")
    found: dict[str, Tensor] = {}
    for part in parts:
        config: dict[str, Any] = json.loads((part / CONFIG).read_text(encoding="utf-8"))
        if config.get("peft_type") != "LORA":
            raise UserError(f"{part / CONFIG} describes {config.get('peft_type')}. Only LoRA is read from peft's folders.")
        start = "" if part == folder else f"{part.name}."
        if not (part / WEIGHTS).is_file():
            raise UserError(f"{part} lacks {WEIGHTS}. Copy or download the folder again.")
        for name, tensor in load_file(part / WEIGHTS).items():
            path = name.removeprefix(PREFIX)
            found[start + path] = tensor
            if path.endswith(_RANK):
                layer = path.removesuffix(_RANK)
                found[f"{start}{layer}.alpha"] = torch.tensor(_alpha(config, layer, len(tensor)))
    return found


def _alpha(config: Mapping[str, Any], path: str, rank: int) -> float:
    """What alpha / rank would have to be made of to give peft's scale."""
    alpha = by_pattern(config.get("alpha_pattern"), path, config["lora_alpha"])
    return float(alpha) * (math.sqrt(rank) if config.get("use_rslora") else 1.0)


def by_pattern(patterns: Mapping[str, Any] | None, path: str, usual: Any) -> Any:
    """The value of the first of peft's patterns that fits the end of `path`, or the usual one."""
    return next((value for pattern, value in (patterns or {}).items() if re.fullmatch(rf"(.*\.)?{pattern}", path)), usual)


def write_peft(folder: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """`tensors` in diffusers' names, whose alpha is their rank, as a folder for each part."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        part, _, path = name.partition(".")
        parts.setdefault(part, {})[path] = tensor
    for part, found in parts.items():
        place = folder / part
        place.mkdir(parents=True, exist_ok=True)
        save_file({PREFIX + path: tensor for path, tensor in found.items()}, place / WEIGHTS, {"format": "pt", **metadata})
        (place / CONFIG).write_text(json.dumps(_config(found), indent=2) + "\n", encoding="utf-8")


def _config(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    ranks = {name.removesuffix(_RANK): len(tensor) for name, tensor in tensors.items() if name.endswith(_RANK)}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    own = {path: rank for path, rank in ranks.items() if rank != usual}
    return {
        "peft_type": "LORA",
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": own,
        "alpha_pattern": own,
        "target_modules": sorted(ranks),
        "use_dora": any(name.endswith("lora_magnitude_vector") for name in tensors),
        "bias": "none",
        "inference_mode": True,
    }
