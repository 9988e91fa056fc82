"""Writing fine-tuned Lumina-Image-2.0: the transformer under its original names, or a whole diffusers folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from library.dit_saving import DitCheckpoint
from library.key_layout import KeyMap
from library.lumina_models import NORM_EPS, PATCH, LuminaParams
from library.lumina_names import lumina_key_map
from library.lumina_utils import GEMMA2, LuminaModel


@dataclass(frozen=True)
class LuminaCheckpoint(DitCheckpoint[LuminaModel]):
    """See `DitCheckpoint`."""

    def names(self) -> KeyMap:
        return lumina_key_map(self.model.params.num_heads // self.model.params.num_kv_heads)

    def transformer_config(self) -> dict[str, Any]:
        return transformer_config(self.model.params)

    def folders(self) -> Mapping[str, str]:
        return {"vae": "vae", GEMMA2: "text_encoder"}

    def classes(self) -> Mapping[str, Any]:
        return {
            "_class_name": "Lumina2Pipeline",
            "transformer": ["diffusers", "Lumina2Transformer2DModel"],
            "text_encoder": ["transformers", "Gemma2Model"],
            "tokenizer": ["transformers", "GemmaTokenizerFast"],
        }

    def scheduler(self) -> dict[str, Any]:
        return {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 6.0}


def transformer_config(params: LuminaParams) -> dict[str, Any]:
    """diffusers' configuration of the transformer."""
    return {
        "_class_name": "Lumina2Transformer2DModel",
        "sample_size": 128,
        "patch_size": PATCH,
        "in_channels": params.in_channels,
        "hidden_size": params.width,
        "num_layers": params.num_layers,
        "num_refiner_layers": params.num_refiners,
        "num_attention_heads": params.num_heads,
        "num_kv_heads": params.num_kv_heads,
        **_feed_forward(params),
        "norm_eps": NORM_EPS,
        "scaling_factor": 1.0,
        "axes_dim_rope": list(params.axes),
        "axes_lens": [300, 512, 512],
        "cap_feat_dim": params.context_width,
    }


def _feed_forward(params: LuminaParams) -> dict[str, Any]:
    """The numbers from which diffusers makes `mlp_width`: 4 widths times one of them, rounded up to a multiple of the other."""
    usual = 256
    if params.mlp_width == -(-4 * params.width // usual) * usual:
        return {"multiple_of": usual, "ffn_dim_multiplier": None}
    return {"multiple_of": params.mlp_width, "ffn_dim_multiplier": min(1.0, params.mlp_width / (4 * params.width))}
