"""Tiny Lumina-Image-2.0 models in the official layouts: single files beside each other, one file with all, or a folder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import tiny
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from library.gemma2_parts import WHOLE_PREFIX, make_gemma2
from library.lumina_models import Lumina, LuminaParams
from library.lumina_options import LuminaOptions
from library.lumina_saving import LuminaCheckpoint
from library.lumina_utils import GEMMA2, VAE_SCALE, VAE_SHIFT, describe
from library.model_parts import SaveSettings
from library.option_groups import NetworkTrainOptions
from library.options import from_flags
from library.vae_parts import make_vae, vae_key_map

SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>")
MERGES = (("r", "e"), ("re", "d"), ("c", "i"), ("\u2581", "a"))
WORDS = (*SPECIAL, "\u2581", *(chr(code) for code in range(33, 127)), *(one + other for one, other in MERGES))
PARAMS = LuminaParams(
    in_channels=4, width=36, num_heads=3, num_kv_heads=1, mlp_width=56, context_width=24, num_layers=2, num_refiners=1
)
SWAPPABLE = 4
"""Layers of which `--blocks_to_swap=2` swaps 2, the most there can be."""
LENGTH = 32


def configs() -> dict[str, dict]:
    """Written as diffusers and transformers have them, not told from shapes."""
    vae = tiny.sd_configs("v1")["vae"] | {"use_quant_conv": False, "use_post_quant_conv": False}
    gemma2 = {
        "vocab_size": len(WORDS),
        "hidden_size": PARAMS.context_width,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
    }
    return {"vae": vae | {"scaling_factor": VAE_SCALE, "shift_factor": VAE_SHIFT}, GEMMA2: gemma2}


def modules(seed: int = 0, layers: int = PARAMS.num_layers) -> dict[str, nn.Module]:
    """Parts with random weights, in eval mode."""
    made = configs()
    with torch.device("meta"):
        transformer = Lumina(replace(PARAMS, num_layers=layers))
    parts = {"denoiser": transformer, "vae": make_vae(made["vae"]), GEMMA2: make_gemma2(made[GEMMA2])}
    return {name: tiny.randomised(module, f"lumina/{name}/{seed}") for name, module in parts.items()}


def tensors(seed: int = 0, layers: int = PARAMS.num_layers) -> dict[str, dict[str, Tensor]]:
    """Part -> its tensors under the names of published files, those that nothing uses among them."""
    parts = modules(seed, layers)
    levels = len(configs()["vae"]["block_out_channels"])
    made = {
        "denoiser": parts["denoiser"].state_dict() | {"norm_final.weight": torch.full((PARAMS.width,), 0.5)},
        "ae": vae_key_map(levels).to_theirs(parts["vae"].state_dict()),
        GEMMA2: parts[GEMMA2].state_dict(),
    }
    return {part: {key: value.contiguous() for key, value in found.items()} for part, found in made.items()}


def write_tokenizer(folder: Path) -> Path:
    """Gemma's tokenizer with a few words."""
    from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors

    vocabulary = {word: number for number, word in enumerate(WORDS)}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=list(MERGES), unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 2)])
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in SPECIAL])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = dict(zip(("pad_token", "eos_token", "bos_token", "unk_token"), SPECIAL, strict=True))
    config = {"tokenizer_class": "GemmaTokenizer", "add_bos_token": True, "add_eos_token": False, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def write_files(
    folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, prefix: str = "", layers: int = PARAMS.num_layers
) -> Path:
    """`lumina.safetensors` (bare or under `prefix`), `gemma2.safetensors`, `ae.safetensors`."""
    folder.mkdir(parents=True, exist_ok=True)
    found = tensors(seed, layers)
    save_file({prefix + key: value.to(dtype) for key, value in found["denoiser"].items()}, folder / "lumina.safetensors")
    save_file({f"model.{key}": value for key, value in found[GEMMA2].items()}, folder / "gemma2.safetensors")
    save_file(found["ae"], folder / "ae.safetensors")
    return folder / "lumina.safetensors"


def arguments(folder: Path) -> list[str]:
    """What a command line needs beside the model that `write_files` wrote to `folder`."""
    return [
        f"--gemma2={folder / 'gemma2.safetensors'}",
        f"--ae={folder / 'ae.safetensors'}",
        f"--tokenizer={write_tokenizer(folder / 'gemma_tokenizer')}",
        f"--gemma2_max_token_length={LENGTH}",
        "--system_prompt=re",
    ]


def options(model: Path, beside: Path | None = None, **flags: object) -> NetworkTrainOptions:
    """beside: the folder with the other parts and the tokenizer, for models that do not hold them."""
    given = dict(argument.removeprefix("--").split("=", 1) for argument in arguments(beside)) if beside else {}
    given = {key: int(value) if key.endswith("length") else value for key, value in given.items()}
    return from_flags(NetworkTrainOptions, LuminaOptions, **{"pretrained_model_name_or_path": str(model), **given, **flags})


def write_single(path: Path, *, seed: int = 0) -> Path:
    """One file with all parts, as ComfyUI has it."""
    prefixes = {"denoiser": "model.diffusion_model.", "ae": "vae.", GEMMA2: WHOLE_PREFIX}
    whole = {prefixes[name] + key: value for name, part in tensors(seed).items() for key, value in part.items()}
    whole["text_encoders.gemma2_2b.logit_scale"] = torch.tensor(4.6)
    whole["text_encoders.spiece_model"] = torch.zeros(8, dtype=torch.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(whole, path)
    return path


def write_folder(path: Path, *, seed: int = 0) -> Path:
    """A diffusers folder, its tokenizer in it."""
    beside = path.with_name(f"{path.name}_files")
    model = describe(options(write_files(beside, seed=seed), beside))
    tokenizers = {GEMMA2: beside / "gemma_tokenizer"}
    LuminaCheckpoint(model, {}, tokenizers).write(path, SaveSettings("diffusers_safetensors"))
    return path
