"""Tiny models and pictures for tests, in the official layouts. Deterministic; weights that begin as zeros are random, too."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from library import clip_parts, unet_names, unet_parts, vae_parts
from library.family_base import ModelBundle, ModelFamily
from library.key_layout import KeyMap
from library.model_parts import SaveSettings
from library.option_groups import FullTrainOptions, ModelOptions
from library.rng import keyed_generator
from library.sd_train_utils import SdFamily
from library.sd_utils import CLIP_PREFIX, OPEN_CLIP_PREFIX
from library.unet_parts import UNET_PREFIX
from library.vae_parts import VAE_PREFIX

Version = Literal["v1", "v2"]
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
COLOURS = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (40, 70, 220), "yellow": (230, 210, 50)}
SHAPES = ("circle", "square")
MERGES = (
    "r e", "re d</w>", "g re", "gre e", "gree n</w>", "b l", "bl u", "blu e</w>", "y e", "ye l", "yel l", "yell o",
    "yello w</w>", "c i", "ci r", "cir c", "circ l", "circl e</w>", "s q", "sq u", "squ a", "squa r", "squar e</w>",
    "o n</w>",
)  # fmt: skip


def same_tensors(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Equal names, dtypes, shapes and bits."""
    return a.keys() == b.keys() and all(
        a[key].dtype == b[key].dtype and a[key].shape == b[key].shape and torch.equal(a[key], b[key]) for key in a
    )


# ---- tokenizer -------------------------------------------------------------------------------------------------------


def write_clip_tokenizer(folder: Path, *, version: Version = "v1") -> Path:
    """vocab.json and merges.txt of a small CLIP tokenizer. SD1 pads with EOS, SD2 with "!", which is id 0."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = [chr(code) for code in range(33, 127)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), *(merge.replace(" ", "") for merge in MERGES), BOS, EOS]
    vocabulary = {word: index for index, word in enumerate(words)}
    pad = EOS if version == "v1" else "!"
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "bos_token": BOS,
        "eos_token": EOS,
        "unk_token": EOS,
        "pad_token": pad,
        "model_max_length": 77,
    }
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES]) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


VOCABULARY_SIZE = 2 * 94 + len(MERGES) + 2


# ---- Stable Diffusion ------------------------------------------------------------------------------------------------


def sd_configs(version: Version = "v1") -> dict[str, dict[str, Any]]:
    """Configurations of tiny parts, written as diffusers and transformers have them, not told from shapes."""
    channels = [32, 64, 64, 64] if version == "v1" else [64, 64, 128, 128]
    width = 64 if version == "v1" else 128
    cross, plain = "CrossAttn{}Block2D", "{}Block2D"
    unet = {
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": channels,
        "layers_per_block": 2,
        "down_block_types": [cross.format("Down")] * 3 + [plain.format("Down")],
        "up_block_types": [plain.format("Up")] + [cross.format("Up")] * 3,
        "cross_attention_dim": width,
        "attention_head_dim": 8 if version == "v1" else [size // 64 for size in channels],
        "use_linear_projection": version == "v2",
    }
    vae = {
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": [32, 32, 64, 64],
        "layers_per_block": 1,
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "latent_channels": 4,
        "scaling_factor": 0.18215,
    }
    clip = {
        "vocab_size": VOCABULARY_SIZE,
        "hidden_size": width,
        "intermediate_size": width * 2,
        "num_hidden_layers": 2,
        "num_attention_heads": width // 64,
        "max_position_embeddings": 77,
        "hidden_act": "quick_gelu" if version == "v1" else "gelu",
        "projection_dim": width,
        "bos_token_id": VOCABULARY_SIZE - 2,
        "eos_token_id": VOCABULARY_SIZE - 1,
    }
    return {"denoiser": unet, "vae": vae, "text_encoder": clip}


def sd_modules(version: Version = "v1", seed: int = 0) -> dict[str, nn.Module]:
    """Tiny parts built directly from diffusers and transformers, with random weights, in eval mode."""
    makers = {"denoiser": unet_parts.make_unet, "vae": vae_parts.make_vae, "text_encoder": clip_parts.make_clip}
    configs = sd_configs(version)
    return {name: randomised(make(configs[name]), f"{version}/{name}/{seed}") for name, make in makers.items()}


def randomised(module: nn.Module, key: str) -> nn.Module:
    """`module`, whose parameters need no memory yet, with random weights, those that begin as zeros too, in eval mode."""
    shapes = tuple((name, tuple(value.shape)) for name, value in module.state_dict().items())
    tensors = {name: value.clone() for name, value in _random_tensors(shapes, key).items()}
    module.load_state_dict(tensors, strict=True, assign=True)
    return module.requires_grad_(False).eval()


@functools.lru_cache(maxsize=16)
def _random_tensors(shapes: tuple[tuple[str, tuple[int, ...]], ...], key: str) -> dict[str, Tensor]:
    """Weights of a size at which signals neither die nor explode; norms near 1."""
    tensors = {}
    for name, shape in shapes:
        noise = torch.randn(shape, generator=keyed_generator("tiny", key, name))
        if len(shape) >= 2:
            tensors[name] = noise * (0.5 if "embedding" in name else math.prod(shape[1:]) ** -0.5)
        else:
            tensors[name] = noise * 0.1 + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
    return tensors


def sd_ldm_tensors(version: Version = "v1", seed: int = 0, *, bare_clip: bool = False) -> dict[str, Tensor]:
    """A whole checkpoint in LDM names, with the tensors beside the weights that published files have.

    bare_clip: SD1's second key variant, without `text_model.`. SD2 has one OpenCLIP layer more than the model runs.
    """
    return dict(_sd_ldm_tensors(version, seed, bare_clip))


@functools.lru_cache(maxsize=8)
def _sd_ldm_tensors(version: Version, seed: int, bare_clip: bool) -> dict[str, Tensor]:
    modules, configs = sd_modules(version, seed), sd_configs(version)
    clip = (OPEN_CLIP_PREFIX, clip_parts.OPEN_CLIP_NAMES)
    if version == "v1":
        clip = (CLIP_PREFIX, clip_parts.CLIP_BARE_NAMES if bare_clip else clip_parts.CLIP_NAMES)
    layouts: dict[str, tuple[str, KeyMap]] = {
        "denoiser": (UNET_PREFIX, unet_names.unet_key_map_for(configs["denoiser"])),
        "vae": (VAE_PREFIX, vae_parts.vae_key_map(len(configs["vae"]["block_out_channels"]))),
        "text_encoder": clip,
    }
    tensors: dict[str, Tensor] = {}
    for name, (prefix, key_map) in layouts.items():
        tensors |= {prefix + key: value.contiguous() for key, value in key_map.to_theirs(modules[name].state_dict()).items()}
    return tensors | _unused(version, tensors, bare_clip)


def _unused(version: Version, tensors: dict[str, Tensor], bare_clip: bool) -> dict[str, Tensor]:
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    unused = {"betas": betas.float(), "alphas_cumprod": (1 - betas).cumprod(0).float(), "model_ema.decay": torch.tensor(0.9999)}
    if version == "v1":
        middle = "" if bare_clip else "text_model."
        return unused | {f"{CLIP_PREFIX}{middle}embeddings.position_ids": torch.arange(77).unsqueeze(0)}
    first, last = (f"{OPEN_CLIP_PREFIX}transformer.resblocks.{layer}." for layer in (1, 2))
    extra = {key.replace(first, last): value * 2 for key, value in tensors.items() if key.startswith(first)}
    width = tensors[f"{OPEN_CLIP_PREFIX}positional_embedding"].shape[1]
    projection = torch.randn(width, width, generator=keyed_generator("tiny", "projection"))
    return (
        unused | extra | {f"{OPEN_CLIP_PREFIX}text_projection": projection, f"{OPEN_CLIP_PREFIX}logit_scale": torch.tensor(4.6)}
    )


def write_sd_checkpoint(
    path: Path,
    *,
    version: Version = "v1",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    bare_clip: bool = False,
    extra: dict[str, Tensor] | None = None,
    metadata: dict[str, str] | None = None,
) -> Path:
    """A single file in LDM names; the suffix of `path` (.safetensors or .ckpt) is its format. Weights alone take `dtype`."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    prefixes = (UNET_PREFIX, VAE_PREFIX, CLIP_PREFIX, OPEN_CLIP_PREFIX)
    tensors = {
        key: value.to(dtype) if key.startswith(prefixes) and value.is_floating_point() else value
        for key, value in sd_ldm_tensors(version, seed, bare_clip=bare_clip).items()
    } | (extra or {})
    if path.suffix == ".safetensors":
        save_file(tensors, path, metadata=metadata)
    else:
        torch.save({"state_dict": tensors, "epoch": 0, "global_step": 0}, path)
    return path


def write_sd_diffusers(
    path: Path, *, version: Version = "v1", prediction: str | None = "epsilon", seed: int = 0, safe: bool = True
) -> Path:
    """A diffusers folder, written by diffusers and transformers themselves. prediction None: the scheduler does not say."""
    for name, module in sd_modules(version, seed).items():
        saved: Any = module
        saved.save_pretrained(
            str(path / {"denoiser": "unet"}.get(name, name)), **({} if name == "text_encoder" else {"safe_serialization": safe})
        )
    write_clip_tokenizer(path / "tokenizer", version=version)
    scheduler: dict[str, Any] = {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
    scheduler |= {"beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1, "clip_sample": False}
    if prediction is not None:
        scheduler["prediction_type"] = prediction
    (path / "scheduler").mkdir(exist_ok=True)
    (path / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler), encoding="utf-8")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
    }
    (path / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return path


@torch.no_grad()
def overflow_in_fp16(vae: Any) -> None:
    """A sound VAE, some of whose activations are beyond the numbers of fp16, as SDXL's first one has them."""
    vae.encoder.conv_in.weight.mul_(1e4)
    vae.encoder.conv_in.bias.fill_(6e4)


def sd_options(path: Path | str, tokenizer: Path | None = None, **model: Any) -> FullTrainOptions:
    """Options that name a model and nothing else."""
    named = {"pretrained_model_name_or_path": str(path), "tokenizer": str(tokenizer) if tokenizer else None}
    return FullTrainOptions(model=ModelOptions(**(named | model)))


def load_sd(path: Path, tokenizer: Path | None = None, dtype: torch.dtype = torch.float32, **model: Any) -> ModelBundle:
    return SdFamily().load(sd_options(path, tokenizer, **model), device=torch.device("cpu"), dtype=dtype)


def save(family: ModelFamily, bundle: ModelBundle, path: Path, format: str, dtype: torch.dtype | None = None) -> Path:
    """The bundle's model as a file or folder of this format."""
    family.save_checkpoint(bundle, path, SaveSettings(format, dtype, {"ss_epoch": "3", "ss_steps": "12"}))
    return path


# ---- pictures --------------------------------------------------------------------------------------------------------


def write_images(folder: Path, n: int = 4, size: int | tuple[int, int] = 64, *, captions: bool = True) -> Path:
    """`n` pictures of one shape on a plain ground, `{index:03d}.png`, with a caption in a .txt file each.

    size: of all pictures, or (width, height).
    """
    from PIL import Image, ImageDraw

    folder.mkdir(parents=True, exist_ok=True)
    width, height = (size, size) if isinstance(size, int) else size
    names = list(COLOURS)
    for index in range(n):
        colour, ground = names[index % len(names)], names[(index // 2 + 1 + index) % len(names)]
        ground = ground if ground != colour else names[(names.index(colour) + 1) % len(names)]
        shape = SHAPES[index % len(SHAPES)]
        image = Image.new("RGB", (width, height), COLOURS[ground])
        box = (width // 4, height // 4, width * 3 // 4, height * 3 // 4)
        draw = ImageDraw.Draw(image)
        (draw.ellipse if shape == "circle" else draw.rectangle)(box, fill=COLOURS[colour])
        image.save(folder / f"{index:03d}.png")
        if captions:
            (folder / f"{index:03d}.txt").write_text(f"a {colour} {shape} on {ground}\n", encoding="utf-8")
    return folder
