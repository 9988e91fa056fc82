"""A tiny SDXL in the official layouts: a single LDM file, or a diffusers folder."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import tiny
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from library import clip_parts
from library.sdxl_utils import CLIP_L_PREFIX, OPEN_CLIP_PREFIX, VAE_SCALE
from library.strategy_sdxl import CLIP_L, OPEN_CLIP
from library.unet_names import unet_key_map_for
from library.unet_parts import UNET_PREFIX, V_MARKER, ZERO_SNR_MARKER, make_unet
from library.vae_parts import VAE_PREFIX, make_vae, vae_key_map

WIDTH = 64
"""Of the hidden states and the pooled output of each text encoder."""
MARKERS = {V_MARKER: torch.zeros(0), ZERO_SNR_MARKER: torch.zeros(0)}
"""What current v-prediction checkpoints carry."""


def configs() -> dict[str, dict[str, Any]]:
    """Written as diffusers and transformers have them, not told from shapes: the topology is SDXL's, depths 1/2/10 scaled."""
    shared = tiny.sd_configs("v1")
    cross, plain = "CrossAttn{}Block2D", "{}Block2D"
    unet = shared["denoiser"] | {
        "block_out_channels": [32, 64, 128],
        "down_block_types": [plain.format("Down"), cross.format("Down"), cross.format("Down")],
        "up_block_types": [cross.format("Up"), cross.format("Up"), plain.format("Up")],
        "transformer_layers_per_block": [1, 1, 2],
        "attention_head_dim": [1, 1, 2],
        "cross_attention_dim": 2 * WIDTH,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": WIDTH + 6 * 256,
    }
    second = shared["text_encoder"] | {"hidden_act": "gelu", "projection_dim": WIDTH}
    return {
        "denoiser": unet,
        "vae": shared["vae"] | {"scaling_factor": VAE_SCALE},
        CLIP_L: shared["text_encoder"],
        OPEN_CLIP: second,
    }


MAKERS = {"denoiser": make_unet, "vae": make_vae, CLIP_L: clip_parts.make_clip, OPEN_CLIP: clip_parts.make_projected_clip}


def modules(seed: int = 0) -> dict[str, nn.Module]:
    """Tiny parts built directly from diffusers and transformers, with random weights, in eval mode."""
    return {name: tiny.randomised(MAKERS[name](config), f"sdxl/{name}/{seed}") for name, config in configs().items()}


@functools.lru_cache(maxsize=4)
def ldm_tensors(seed: int = 0) -> dict[str, Tensor]:
    """A whole checkpoint in LDM names, with the tensors beside the weights that published files have."""
    parts, made = modules(seed), configs()
    layouts = {
        "denoiser": (UNET_PREFIX, unet_key_map_for(made["denoiser"])),
        "vae": (VAE_PREFIX, vae_key_map(len(made["vae"]["block_out_channels"]))),
        CLIP_L: (CLIP_L_PREFIX, clip_parts.CLIP_NAMES),
        OPEN_CLIP: (OPEN_CLIP_PREFIX, clip_parts.PROJECTED_OPEN_CLIP_NAMES),
    }
    tensors = {
        prefix + key: value.contiguous()
        for name, (prefix, names) in layouts.items()
        for key, value in names.to_theirs(parts[name].state_dict()).items()
    }
    tensors[f"{CLIP_L_PREFIX}text_model.embeddings.position_ids"] = torch.arange(77).unsqueeze(0)
    tensors[f"{OPEN_CLIP_PREFIX}logit_scale"] = torch.tensor(4.6055)
    return tensors


def write_checkpoint(
    path: Path,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    extra: dict[str, Tensor] | None = None,
    metadata: dict[str, str] | None = None,
) -> Path:
    """A single file in LDM names; the suffix of `path` (.safetensors or .ckpt) is its format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.to(dtype) if v.is_floating_point() else v for k, v in ldm_tensors(seed).items()} | (extra or {})
    if path.suffix == ".safetensors":
        save_file(tensors, path, metadata=metadata)
    else:
        torch.save({"state_dict": tensors, "epoch": 0, "global_step": 0}, path)
    return path


def write_folder(path: Path, *, seed: int = 0, scheduler: dict[str, Any] | None = None) -> Path:
    """A diffusers folder, written by diffusers and transformers themselves."""
    folders = {"denoiser": "unet", CLIP_L: "text_encoder", OPEN_CLIP: "text_encoder_2"}
    for name, module in modules(seed).items():
        saved: Any = module
        saved.save_pretrained(str(path / folders.get(name, name)))
    tiny.write_clip_tokenizer(path / "tokenizer")
    tiny.write_clip_tokenizer(path / "tokenizer_2", version="v2")
    config = {"_class_name": "EulerDiscreteScheduler", "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
    config |= {"beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1, "prediction_type": "epsilon"} | (scheduler or {})
    (path / "scheduler").mkdir(exist_ok=True)
    (path / "scheduler" / "scheduler_config.json").write_text(json.dumps(config), encoding="utf-8")
    index = {
        "_class_name": "StableDiffusionXLPipeline",
        "force_zeros_for_empty_prompt": False,
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "image_encoder": [None, None],
        "feature_extractor": [None, None],
    }
    (path / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return path
