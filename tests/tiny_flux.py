"""Tiny FLUX.1 and Chroma models in the official layouts: single files beside each other, one file with all, or a folder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Literal

import tiny
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from library.clip_parts import CLIP_NAMES, make_clip
from library.clip_tokenizer import SD1_TOKENIZER
from library.flux_models import ApproximatorParams, Flux, FluxParams
from library.flux_saving import FluxCheckpoint
from library.flux_utils import VAE_SCALE, VAE_SHIFT, FluxModel
from library.key_layout import IDENTITY
from library.model_io import TensorEntry, TensorSource
from library.model_parts import Component, SaveSettings
from library.strategy_dit import CLIP_L, T5XXL
from library.t5_parts import T5_NAMES, T5_TOKENIZER, make_t5
from library.vae_parts import make_vae, vae_key_map

Kind = Literal["dev", "schnell", "chroma"]
T5_WIDTH = 24
T5_VOCABULARY = 3 + 1 + 94

DEV = FluxParams(
    in_channels=16,
    out_channels=16,
    width=64,
    num_heads=2,
    mlp_width=256,
    context_width=T5_WIDTH,
    pooled_width=64,
    num_double_blocks=2,
    num_single_blocks=2,
    guidance_embed=True,
)
PARAMS: dict[Kind, FluxParams] = {
    "dev": DEV,
    "schnell": replace(DEV, guidance_embed=False),
    "chroma": replace(DEV, guidance_embed=False, pooled_width=0, approximator=ApproximatorParams(16, 48, 2)),
}


def configs() -> dict[str, dict]:
    shared = tiny.sd_configs("v1")
    vae = shared["vae"] | {"use_quant_conv": False, "use_post_quant_conv": False}
    vae |= {"scaling_factor": VAE_SCALE, "shift_factor": VAE_SHIFT}
    t5 = {
        "vocab_size": T5_VOCABULARY,
        "d_model": T5_WIDTH,
        "d_kv": 8,
        "d_ff": 32,
        "num_layers": 2,
        "num_heads": 2,
        "relative_attention_num_buckets": 8,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        "is_encoder_decoder": False,
        "use_cache": False,
    }
    return {"vae": vae, CLIP_L: shared["text_encoder"], T5XXL: t5}


def modules(kind: Kind = "dev", seed: int = 0, blocks: tuple[int, int] | None = None) -> dict[str, nn.Module]:
    """Parts with random weights, those that begin as zeros too, in eval mode. blocks: numbers of double and single ones."""
    made = configs()
    params = PARAMS[kind] if blocks is None else replace(PARAMS[kind], num_double_blocks=blocks[0], num_single_blocks=blocks[1])
    with torch.device("meta"):
        transformer = Flux(params)
    found: dict[str, nn.Module] = {
        "denoiser": transformer,
        "vae": make_vae(made["vae"]),
        CLIP_L: make_clip(made[CLIP_L]),
        T5XXL: make_t5(made[T5XXL]),
    }
    if kind == "chroma":
        del found[CLIP_L]
    return {name: tiny.randomised(module, f"{kind}/{name}/{seed}") for name, module in found.items()}


def tensors(kind: Kind = "dev", seed: int = 0, blocks: tuple[int, int] | None = None) -> dict[str, dict[str, Tensor]]:
    """Part -> its tensors under the names of published files."""
    parts = modules(kind, seed, blocks)
    levels = len(configs()["vae"]["block_out_channels"])
    made = {
        "denoiser": parts["denoiser"].state_dict(),
        "ae": vae_key_map(levels).to_theirs(parts["vae"].state_dict()),
        T5XXL: T5_NAMES.to_theirs(parts[T5XXL].state_dict()),
    }
    if CLIP_L in parts:
        made[CLIP_L] = CLIP_NAMES.to_theirs(parts[CLIP_L].state_dict())
    return {part: {key: value.contiguous() for key, value in found.items()} for part, found in made.items()}


def write_t5_tokenizer(folder: Path) -> Path:
    """A T5 tokenizer that knows single characters."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    vocabulary += [(chr(code), -3.0) for code in range(33, 127)]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "T5TokenizerFast", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"extra_ids": 0}), encoding="utf-8")
    return folder


def write_tokenizers(cache: Path) -> Path:
    """Both tokenizers, where --tokenizer_cache_dir looks for them."""
    tiny.write_clip_tokenizer(cache / SD1_TOKENIZER.replace("/", "_"))
    write_t5_tokenizer(cache / T5_TOKENIZER.replace("/", "_"))
    return cache


def cast(found: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {key: value.to(dtype) for key, value in found.items()}


SWAPPABLE = (3, 4)
"""Numbers of double and single blocks of which `--blocks_to_swap=2` swaps 1 and 2, the most there can be."""


def write_flux_files(
    folder: Path,
    kind: Kind = "dev",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    prefix: str = "",
    blocks: tuple[int, int] | None = None,
) -> Path:
    """`flux.safetensors` (bare or under `prefix`), `clip_l.safetensors`, `t5xxl.safetensors`, `ae.safetensors`."""
    folder.mkdir(parents=True, exist_ok=True)
    found = tensors(kind, seed, blocks)
    transformer = {prefix + key: value for key, value in cast(found.pop("denoiser"), dtype).items()}
    save_file(transformer, folder / "flux.safetensors")
    for name, part in found.items():
        save_file(part, folder / f"{name}.safetensors")
    return folder / "flux.safetensors"


def arguments(folder: Path) -> list[str]:
    """What a command line needs beside the model that `write_flux_files` wrote to `folder`."""
    names = [name for name in (CLIP_L, T5XXL, "ae") if (folder / f"{name}.safetensors").is_file()]
    return [
        *(f"--{name}={folder / name}.safetensors" for name in names),
        f"--tokenizer_cache_dir={write_tokenizers(folder / 'tokenizers')}",
        "--t5xxl_max_token_length=32",
    ]


def write_flux_single(path: Path, kind: Kind = "dev", *, seed: int = 0) -> Path:
    """One file with all parts, as ComfyUI has it."""
    found = tensors(kind, seed)
    prefixes = {
        "denoiser": "model.diffusion_model.",
        "ae": "vae.",
        CLIP_L: "text_encoders.clip_l.transformer.",
        T5XXL: "text_encoders.t5xxl.transformer.",
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({prefixes[name] + key: value for name, part in found.items() for key, value in part.items()}, path)
    return path


def write_flux_folder(path: Path, kind: Kind = "dev", *, seed: int = 0) -> Path:
    """A diffusers folder, its tokenizers in it."""
    parts, made = modules(kind, seed), configs()
    key_maps = {CLIP_L: CLIP_NAMES, T5XXL: T5_NAMES}
    makers = {"vae": make_vae, CLIP_L: make_clip, T5XXL: make_t5}

    def component(name: str) -> Component:
        key_map = key_maps.get(name, IDENTITY)
        theirs = key_map.to_theirs(parts[name].state_dict())
        entries = {key: TensorEntry(path, 0, value.dtype, tuple(value.shape), held=value) for key, value in theirs.items()}
        config = made.get(name, {"params": PARAMS[kind]})
        return Component(TensorSource(path, entries), key_map, config, makers.get(name, lambda c: Flux(c["params"])))

    model = FluxModel(path, "diffusers_safetensors", PARAMS[kind], {name: component(name) for name in parts}, kind)
    tokenizers = {T5XXL: write_t5_tokenizer(path.with_name(f"{path.name}_t5"))}
    if kind != "chroma":
        tokenizers[CLIP_L] = tiny.write_clip_tokenizer(path.with_name(f"{path.name}_clip"))
    FluxCheckpoint(model, {"denoiser": parts["denoiser"]}, tokenizers).write(path, SaveSettings("diffusers_safetensors"))
    return path
