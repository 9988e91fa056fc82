"""Writing Stable Diffusion 3 and 3.5: a single file as they are published, or a whole diffusers folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.clip_tokenizer import FIRST_WORD, set_padding
from library.dit_parts import PREFIXES
from library.dit_saving import DitCheckpoint
from library.key_layout import KeyMap
from library.model_io import ScaledEntry, TensorSource
from library.sd3_models import Sd3Params
from library.sd3_names import sd3_key_map
from library.sd3_utils import TEXT_PARTS, Sd3Model
from library.strategy_dit import CLIP_G, CLIP_L, T5XXL
from library.vae_parts import VAE_PREFIX, vae_key_map

_CLIP = ("CLIPTextModelWithProjection", "CLIPTokenizer")
_CLASSES = {CLIP_L: _CLIP, CLIP_G: _CLIP, T5XXL: ("T5EncoderModel", "T5TokenizerFast")}


@dataclass(frozen=True)
class Sd3Checkpoint(DitCheckpoint[Sd3Model]):
    """A single file holds the transformer and the VAE, as sd-scripts writes it, and the text encoders that were in the model's
    own file, that were changed, or that are named by `beside`."""

    beside: frozenset[str] = field(default=frozenset(), kw_only=True)

    def names(self) -> KeyMap:
        return sd3_key_map(self.model.params.num_blocks)

    def transformer_config(self) -> dict[str, Any]:
        return transformer_config(self.model.params)

    def folders(self) -> Mapping[str, str]:
        text = {name: part.folder for name, part in TEXT_PARTS.items() if name in self.model.parts}
        return {"vae": "vae", **text}

    def classes(self) -> Mapping[str, Any]:
        index: dict[str, Any] = {
            "_class_name": "StableDiffusion3Pipeline",
            "transformer": ["diffusers", "SD3Transformer2DModel"],
            "feature_extractor": [None, None],
            "image_encoder": [None, None],
        }
        for name, part in TEXT_PARTS.items():
            encoder, tokenizer = _CLASSES[name]
            there = name in self.model.parts
            index[part.folder] = ["transformers", encoder] if there else [None, None]
            index[part.tokenizer_folder] = ["transformers", tokenizer] if there else [None, None]
        return index

    def scheduler(self) -> dict[str, Any]:
        return {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}

    def write_tokenizer(self, name: str, source: Path, target: Path) -> None:
        super().write_tokenizer(name, source, target)
        if name == CLIP_G:
            set_padding(target, FIRST_WORD)

    # ---- a single file -----------------------------------------------------------------------------------------------

    def single_file(self, dtype: torch.dtype | None) -> dict[str, Tensor]:
        """Parts that are not changed stand there as in the model's own file, and so does what no part uses."""
        tensors = self._unused()
        for name in self._held():
            tensors |= self._part_in_file(name, dtype)
        return tensors

    def _held(self) -> Iterable[str]:
        text = (name for name in TEXT_PARTS if name in self.model.parts)
        return "denoiser", "vae", *(n for n in text if n in self.beside or n in self.modules or self._is_inside(n))

    def _is_inside(self, name: str) -> bool:
        """Whether a part is in the model's own file, beside others."""
        source = self.model.parts[name].source
        return self.model.whole is not None and source.path == self.model.whole.path and bool(source.prefix)

    def _part_in_file(self, name: str, dtype: torch.dtype | None) -> dict[str, Tensor]:
        component = self.model.parts[name]
        if self._is_inside(name) and name not in self.modules:
            source = component.source
            return {f"{source.prefix}{key}": _as_stored(source, key, dtype) for key in source}
        prefix, key_map = PREFIXES[0], component.key_map
        if name == "vae":
            prefix, key_map = VAE_PREFIX, vae_key_map(len(component.config["block_out_channels"]))
        elif name != "denoiser":
            prefix = TEXT_PARTS[name].prefix
        found = key_map.to_theirs(self.part(name, dtype))
        return {f"{prefix}{key}": value.contiguous() for key, value in found.items()}

    def _unused(self) -> dict[str, Tensor]:
        whole = self.model.whole
        if whole is None:
            return {}
        used = tuple(part.source.prefix for part in self.model.parts.values() if part.source.path == whole.path)
        return {key: whole.get(key) for key in whole if not key.startswith(used)}


def _as_stored(source: TensorSource, key: str, dtype: torch.dtype | None) -> Tensor:
    """As the file has it; in bf16 what it has in 8 bits beside a scale."""
    scaled = isinstance(source.entries[key], ScaledEntry)
    return source.get(key, torch.bfloat16 if dtype is None and scaled else dtype)


def transformer_config(params: Sd3Params) -> dict[str, Any]:
    """diffusers' configuration of the transformer."""
    return {
        "_class_name": "SD3Transformer2DModel",
        "sample_size": 128,
        "patch_size": params.patch,
        "in_channels": params.channels,
        "out_channels": params.out_channels,
        "num_layers": params.num_blocks,
        "attention_head_dim": params.head_width,
        "num_attention_heads": params.num_heads,
        "joint_attention_dim": params.context_width,
        "caption_projection_dim": params.width,
        "pooled_projection_dim": params.pooled_width,
        "pos_embed_max_size": params.positions,
        "dual_attention_layers": list(params.dual_blocks),
        "qk_norm": "rms_norm" if params.qk_norm else None,
    }
