"""The autoencoder of SD1/2, SDXL, SD3 and FLUX.1 (AutoencoderKL): its names in files, and its sizes from shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.errors import UserError
from library.key_layout import CONV_TO_LINEAR, IDENTITY, KeyMap, Rule, key_map, nested
from library.lean_imports import diffusers_class
from library.model_io import (
    Shapes,
    TensorSource,
    count_indices,
    empty_module,
    open_checkpoint,
    open_component,
    read_json,
)
from library.model_parts import Component
from library.model_signatures import detect_family
from library.rng import keyed_generator

_VAE_RESNET = (
    Rule("norm1", "norm1"),
    Rule("conv1", "conv1"),
    Rule("norm2", "norm2"),
    Rule("conv2", "conv2"),
    Rule("nin_shortcut", "conv_shortcut"),
)
_VAE_ATTENTION = (
    Rule("norm", "group_norm"),
    Rule("q", "to_q", CONV_TO_LINEAR),
    Rule("k", "to_k", CONV_TO_LINEAR),
    Rule("v", "to_v", CONV_TO_LINEAR),
    Rule("proj_out", "to_out.0", CONV_TO_LINEAR),
)


def vae_key_map(num_levels: int) -> KeyMap:
    """LDM autoencoder <-> AutoencoderKL. LDM numbers the decoder's levels from the finest, diffusers from the coarsest."""
    rules: list[Rule] = [Rule("quant_conv", "quant_conv"), Rule("post_quant_conv", "post_quant_conv")]
    for half in ("encoder", "decoder"):
        rules += [Rule(f"{half}.{name}", f"{half}.{name}") for name in ("conv_in", "conv_out")]
        rules.append(Rule(f"{half}.norm_out", f"{half}.conv_norm_out"))
        rules += nested(f"{half}.mid.block_1", f"{half}.mid_block.resnets.0", _VAE_RESNET)
        rules += nested(f"{half}.mid.attn_1", f"{half}.mid_block.attentions.0", _VAE_ATTENTION)
        rules += nested(f"{half}.mid.block_2", f"{half}.mid_block.resnets.1", _VAE_RESNET)
    rules += nested("encoder.down.{i}.block.{j}", "encoder.down_blocks.{i}.resnets.{j}", _VAE_RESNET)
    rules.append(Rule("encoder.down.{i}.downsample.conv", "encoder.down_blocks.{i}.downsamplers.0.conv"))
    for level in range(num_levels):
        theirs, ours = f"decoder.up.{level}", f"decoder.up_blocks.{num_levels - 1 - level}"
        rules += nested(f"{theirs}.block.{{j}}", f"{ours}.resnets.{{j}}", _VAE_RESNET)
        rules.append(Rule(f"{theirs}.upsample.conv", f"{ours}.upsamplers.0.conv"))
    return key_map(rules)


_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

VAE_FOLDER_NAMES = key_map(
    (
        Rule(f"{half}.mid_block.attentions.0.{old}", f"{half}.mid_block.attentions.0.{new}", CONV_TO_LINEAR)
        for half in ("encoder", "decoder")
        for old, new in _OLD_ATTENTION.items()
    ),
    IDENTITY.rules,
)
"""A diffusers VAE, its attention named as before diffusers 0.15 or as now."""


def vae_config(shapes: Shapes, scale: float, shift: float | None = None) -> dict[str, Any]:
    """AutoencoderKL's configuration, from an LDM autoencoder. `scale` and `shift` of the latents are not in the file."""
    levels = count_indices(shapes, r"encoder\.down\.(\d+)\.")
    return {
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "block_out_channels": [shapes[f"encoder.down.{level}.block.0.conv2.weight"][0] for level in range(levels)],
        "layers_per_block": count_indices(shapes, r"encoder\.down\.0\.block\.(\d+)\."),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "latent_channels": shapes["encoder.conv_out.weight"][0] // 2,
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
        "scaling_factor": scale,
        "shift_factor": shift,
    }


def make_vae(config: Mapping[str, Any]) -> nn.Module:
    """An AutoencoderKL without weights."""
    autoencoder = diffusers_class("AutoencoderKL")
    return empty_module(lambda: autoencoder.from_config(dict(config)))


# ---- files -----------------------------------------------------------------------------------------------------------

VAE_PREFIX = "first_stage_model."
"""Where whole checkpoints have it."""
_PREFIXES = (VAE_PREFIX, "vae.", "")


def file_vae(whole: TensorSource, prefix: str, scale: float, shift: float | None = None) -> Component:
    """The VAE in LDM names under `prefix`."""
    source = whole.under(prefix)
    config = vae_config(source.shapes(), scale, shift)
    key_map = vae_key_map(len(config["block_out_channels"]))
    return Component(source, key_map, config, make_vae, (r"loss\..*", r"model_ema\..*"))


def open_vae(path: Path, *, flag: str, title: str, scale: float, shift: float | None = None) -> Component:
    """A VAE: a single file in LDM or diffusers names, with or without prefix, or a diffusers folder (or its parent).

    flag and title: the option and the family that `path` was given for. scale and shift: the family's, where no
    configuration says otherwise.
    """
    if path.is_dir():
        folder = path / "vae" if (path / "vae" / "config.json").is_file() else path
        config = read_json(folder / "config.json")
        if config.get("_class_name", "AutoencoderKL") != "AutoencoderKL":
            raise UserError(f"{flag} {folder} is a {config['_class_name']}, and {title} needs an AutoencoderKL.")
        return Component(open_component(folder), VAE_FOLDER_NAMES, config, make_vae, folder=folder)
    whole = open_checkpoint(path)
    for prefix in _PREFIXES:
        if f"{prefix}encoder.down.0.block.0.conv1.weight" in whole:
            return file_vae(whole, prefix, scale, shift)
        if f"{prefix}encoder.down_blocks.0.resnets.0.conv1.weight" in whole:
            source = whole.under(prefix)
            config = _beside(path) or _diffusers_vae_config(source, scale, shift)
            return Component(source, VAE_FOLDER_NAMES, config, make_vae)
    detected = detect_family(whole)
    raise UserError(f"{flag} {path} has no VAE in it" + (f": it is {detected.title}." if detected else "."))


def _beside(path: Path) -> dict[str, Any] | None:
    config = path.with_name("config.json")
    return read_json(config) if config.is_file() else None


def _diffusers_vae_config(source: TensorSource, scale: float, shift: float | None) -> dict[str, Any]:
    """Configuration of a diffusers VAE file that stands alone, through its LDM names."""
    key_map = vae_key_map(count_indices(source.shapes(), r"encoder\.down_blocks\.(\d+)\."))
    shapes = {name: source.shape(key) for key in source if (name := key_map.their_name(key)) is not None}
    return vae_config(shapes, scale, shift)


# ---- images ----------------------------------------------------------------------------------------------------------


def sample_posterior(mean: Tensor, std: Tensor, seeds: Sequence[int]) -> Tensor:
    """mean + std * noise, [B, C, h, w] float32; row i's noise depends on seeds[i] and the shape alone."""
    noise = torch.stack(
        [torch.randn(mean.shape[1:], generator=keyed_generator("vae", seed), dtype=torch.float32) for seed in seeds]
    )
    return mean.float() + std.float() * noise.to(mean.device)


def encode_images(vae: nn.Module, images: Tensor, seeds: Sequence[int]) -> Tensor:
    """[B, 3, H, W] in [-1, 1] -> samples of the posterior, [B, C, h, w] float32, not scaled."""
    weight = next(vae.parameters())
    module: Any = vae
    with torch.autocast(weight.device.type, enabled=False):
        posterior = module.encode(images.to(weight.device, weight.dtype)).latent_dist
    return sample_posterior(posterior.mean, posterior.std, seeds)


def decode_latents(vae: nn.Module, stored: Tensor) -> Tensor:
    """Latents as the VAE gives them [B, C, h, w] -> pictures [B, 3, H, W] in [-1, 1], float32, on the VAE's device."""
    weight = next(vae.parameters())
    module: Any = vae
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        images: Tensor = module.decode(stored.to(weight.device, weight.dtype), return_dict=False)[0]
    return images.float().clamp(-1, 1)
