"""Tiny Stable Diffusion 3 models in the official layouts: files beside each other, one file with all, or a folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import tiny
import tiny_flux
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from library.clip_parts import PROJECTED_FOLDER_NAMES, make_projected_clip
from library.dit_parts import PREFIXES
from library.key_layout import IDENTITY
from library.model_io import TensorEntry, TensorSource
from library.model_parts import Component, SaveSettings
from library.sd3_models import Kind, Sd3, Sd3Params
from library.sd3_saving import Sd3Checkpoint
from library.sd3_utils import TEXT_PARTS, VAE_SCALE, VAE_SHIFT, Sd3Model
from library.strategy_dit import CLIP_G, CLIP_L, T5XXL
from library.t5_parts import T5_NAMES, make_t5
from library.vae_parts import VAE_PREFIX, make_vae, vae_key_map

CLIP_L_WIDTH, CLIP_G_WIDTH, T5_WIDTH = 32, 64, 104

MEDIUM = Sd3Params(
    channels=4,
    out_channels=4,
    width=128,  # 64 for each block
    mlp_width=512,
    context_width=T5_WIDTH,
    pooled_width=CLIP_L_WIDTH + CLIP_G_WIDTH,
    num_blocks=2,
    positions=64,
)
PARAMS: dict[Kind, Sd3Params] = {
    "m": MEDIUM,
    "5-medium": replace(MEDIUM, qk_norm=True, dual_blocks=(0,)),
    "5-large": replace(MEDIUM, qk_norm=True),
}
SWAPPABLE = 5
"""Blocks of which `--blocks_to_swap=2` swaps two."""


def configs() -> dict[str, dict[str, Any]]:
    shared = tiny.sd_configs("v1")
    vae = shared["vae"] | {"use_quant_conv": False, "use_post_quant_conv": False}
    clip_l = {"hidden_size": CLIP_L_WIDTH, "intermediate_size": 2 * CLIP_L_WIDTH, "projection_dim": CLIP_L_WIDTH}
    return {
        "vae": vae | {"scaling_factor": VAE_SCALE, "shift_factor": VAE_SHIFT},
        CLIP_L: shared["text_encoder"] | clip_l,
        CLIP_G: shared["text_encoder"] | {"hidden_act": "gelu"},
        T5XXL: tiny_flux.configs()[T5XXL] | {"d_model": T5_WIDTH},
    }


MAKERS = {"vae": make_vae, CLIP_L: make_projected_clip, CLIP_G: make_projected_clip, T5XXL: make_t5}
NAMES = {CLIP_L: PROJECTED_FOLDER_NAMES, CLIP_G: PROJECTED_FOLDER_NAMES, T5XXL: T5_NAMES}


def sinusoids(side: int, width: int) -> Tensor:
    """A table of positions as it is published: columns first, [1, side * side, width]."""
    frequencies = 10_000 ** -(torch.arange(width // 4) / (width // 4))
    angles = torch.arange(side)[:, None] / 6 * frequencies
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # [side, width / 2]
    columns, rows = axis.expand(side, -1, -1), axis[:, None].expand(-1, side, -1)
    return torch.cat([columns, rows], dim=-1).reshape(1, side * side, width)


def modules(kind: Kind = "5-medium", seed: int = 0, blocks: int = 2) -> dict[str, nn.Module]:
    """Parts with random weights, those that begin as zeros too, in eval mode."""
    params, made = replace(PARAMS[kind], num_blocks=blocks), configs()
    with torch.device("meta"):
        transformer = Sd3(params)
    found: dict[str, nn.Module] = {"denoiser": transformer, **{name: make(made[name]) for name, make in MAKERS.items()}}
    for name, module in found.items():
        shapes = tuple((key, tuple(value.shape)) for key, value in module.state_dict().items() if key != "pos_embed")
        tensors = {key: value.clone() for key, value in tiny._random_tensors(shapes, f"{kind}/{name}/{seed}").items()}
        for key in tensors:
            if ".ln_" in key:
                tensors[key] += 1
        if name == "denoiser":
            tensors["pos_embed"] = sinusoids(params.positions, params.width)
        module.load_state_dict(tensors, strict=True, assign=True)
        module.requires_grad_(False).eval()
    return found


def tensors(kind: Kind = "5-medium", seed: int = 0, blocks: int = 2) -> dict[str, dict[str, Tensor]]:
    """Part -> its tensors under the names of published files."""
    parts = modules(kind, seed, blocks)
    names = {"denoiser": IDENTITY, "vae": vae_key_map(len(configs()["vae"]["block_out_channels"])), **NAMES}
    made = {name: names[name].to_theirs(dict(module.state_dict())) for name, module in parts.items()}
    return {part: {key: value.contiguous() for key, value in found.items()} for part, found in made.items()}


def write_files(folder: Path, kind: Kind = "5-medium", *, seed: int = 0, blocks: int = 2, prefix: str = PREFIXES[0]) -> Path:
    """`sd3.safetensors`, as published without text encoders: transformer and VAE; `clip_l`, `clip_g`, `t5xxl` beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    found = tensors(kind, seed, blocks)
    model = {prefix + key: value for key, value in found.pop("denoiser").items()}
    model |= {VAE_PREFIX + key: value for key, value in found.pop("vae").items()}
    save_file(model, folder / "sd3.safetensors")
    for name, part in found.items():
        save_file(part, folder / f"{name}.safetensors")
    return folder / "sd3.safetensors"


def arguments(folder: Path) -> list[str]:
    """What a command line needs beside the model that `write_files` wrote to `folder`."""
    names = [name for name in TEXT_PARTS if (folder / f"{name}.safetensors").is_file()]
    return [
        *(f"--{name}={folder / name}.safetensors" for name in names),
        f"--tokenizer_cache_dir={tiny_flux.write_tokenizers(folder / 'tokenizers')}",
        "--t5xxl_max_token_length=16",
    ]


def write_whole(path: Path, kind: Kind = "5-medium", *, seed: int = 0, extra: dict[str, Tensor] | None = None) -> Path:
    """One file with all parts, as published with text encoders."""
    prefixes = {"denoiser": PREFIXES[0], "vae": VAE_PREFIX, **{name: part.prefix for name, part in TEXT_PARTS.items()}}
    path.parent.mkdir(parents=True, exist_ok=True)
    found = tensors(kind, seed)
    save_file(
        {prefixes[name] + key: value for name, part in found.items() for key, value in part.items()} | (extra or {}), path
    )
    return path


def write_folder(path: Path, kind: Kind = "5-medium", *, seed: int = 0, without_t5: bool = False) -> Path:
    """A diffusers folder, its tokenizers in it."""
    parts, made = modules(kind, seed), configs()
    if without_t5:
        del parts[T5XXL]

    def component(name: str) -> Component:
        key_map = NAMES.get(name, IDENTITY)
        theirs = key_map.to_theirs(dict(parts[name].state_dict()))
        entries = {key: TensorEntry(path, 0, value.dtype, tuple(value.shape), held=value) for key, value in theirs.items()}
        config = made.get(name, {"params": PARAMS[kind]})
        return Component(TensorSource(path, entries), key_map, config, MAKERS.get(name, lambda c: Sd3(c["params"])))

    model = Sd3Model(path, "diffusers_safetensors", PARAMS[kind], {name: component(name) for name in parts}, None)
    clip = tiny.write_clip_tokenizer(path.with_name(f"{path.name}_clip"))
    tokenizers = {CLIP_L: clip, CLIP_G: clip}
    if not without_t5:
        tokenizers[T5XXL] = tiny_flux.write_t5_tokenizer(path.with_name(f"{path.name}_t5"))
    checkpoint = Sd3Checkpoint(model, {"denoiser": parts["denoiser"]}, tokenizers)
    checkpoint.write(path, SaveSettings("diffusers_safetensors"))
    return path
