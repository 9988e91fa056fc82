"""Writing fine-tuned FLUX.1 and Chroma: the transformer under its original names, or a whole diffusers folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from library.dit_saving import DitCheckpoint
from library.flux_models import FluxParams
from library.flux_names import FLUX_DIFFUSERS
from library.flux_utils import FluxModel
from library.key_layout import KeyMap
from library.strategy_dit import CLIP_L, T5XXL


@dataclass(frozen=True)
class FluxCheckpoint(DitCheckpoint[FluxModel]):
    """See `DitCheckpoint`."""

    def names(self) -> KeyMap:
        return FLUX_DIFFUSERS

    def transformer_config(self) -> dict[str, Any]:
        return transformer_config(self.model.params)

    def folders(self) -> Mapping[str, str]:
        if self.model.kind == "chroma":
            return {"vae": "vae", T5XXL: "text_encoder"}
        return {"vae": "vae", CLIP_L: "text_encoder", T5XXL: "text_encoder_2"}

    def classes(self) -> Mapping[str, Any]:
        chroma = self.model.kind == "chroma"
        index: dict[str, Any] = {
            "_class_name": "ChromaPipeline" if chroma else "FluxPipeline",
            "transformer": ["diffusers", "ChromaTransformer2DModel" if chroma else "FluxTransformer2DModel"],
            "feature_extractor": [None, None],
            "image_encoder": [None, None],
        }
        classes = {CLIP_L: ("CLIPTextModel", "CLIPTokenizer"), T5XXL: ("T5EncoderModel", "T5TokenizerFast")}
        for name, folder in self.folders().items():
            if name in classes:
                encoder, tokenizer = classes[name]
                index[folder] = ["transformers", encoder]
                index[self.tokenizer_folder(name)] = ["transformers", tokenizer]
        return index

    def scheduler(self) -> dict[str, Any]:
        return {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "num_train_timesteps": 1000,
            "base_image_seq_len": 256,
            "max_image_seq_len": 4096,
            "base_shift": 0.5,
            "max_shift": 1.15,
            "shift": 1.0 if self.model.kind == "schnell" else 3.0,
            "use_dynamic_shifting": self.model.kind != "schnell",
        }


def transformer_config(params: FluxParams) -> dict[str, Any]:
    """diffusers' configuration of the transformer."""
    config: dict[str, Any] = {
        "_class_name": "ChromaTransformer2DModel" if params.approximator else "FluxTransformer2DModel",
        "patch_size": 1,
        "in_channels": params.in_channels,
        "num_layers": params.num_double_blocks,
        "num_single_layers": params.num_single_blocks,
        "attention_head_dim": params.head_width,
        "num_attention_heads": params.num_heads,
        "joint_attention_dim": params.context_width,
        "axes_dims_rope": list(params.axes),
    }
    if params.approximator is None:
        return config | {"pooled_projection_dim": params.pooled_width, "guidance_embeds": params.guidance_embed}
    sizes = params.approximator
    return config | {
        "approximator_num_channels": sizes.inputs,
        "approximator_hidden_dim": sizes.hidden,
        "approximator_layers": sizes.num_layers,
    }
