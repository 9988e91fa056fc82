"""Which model family a checkpoint belongs to, told from its key names, and which script trains it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from library.errors import UserError
from library.model_io import TensorSource, read_json

PREFIXES = ("model.diffusion_model.", "net.", "transformer.", "unet.")
"""Prefixes under which other programs put the denoiser; signatures are written without them."""


class Detected(NamedTuple):
    """What a file is. `script` is empty for what cannot be a base model (an adapter, a VAE alone)."""

    family: str
    title: str
    script: str


@dataclass(frozen=True)
class Signature:
    """A family, and the keys (as regular expressions, all of them present) by which it is known."""

    family: str
    title: str
    script: str
    keys: tuple[str, ...]
    absent: tuple[str, ...] = ()

    def fits(self, keys: str) -> bool:
        """`keys`: all key names, one per line."""
        return all(_has(pattern, keys) for pattern in self.keys) and not any(_has(pattern, keys) for pattern in self.absent)


def _has(pattern: str, keys: str) -> bool:
    return re.search(rf"^{pattern}", keys, flags=re.MULTILINE) is not None


_LDM_UNET = r"input_blocks\.0\.0\.weight$"

SIGNATURES: tuple[Signature, ...] = (
    Signature(
        "lora", "a LoRA or other adapter", "", (r".*\.(lora_down|lora_A|lora\.down|hada_w1_a|lokr_w1|lokr_w1_a|oft_blocks)\b",)
    ),
    Signature("embedding", "a textual inversion embedding", "", (r"(emb_params|string_to_param|clip_[lg])$",)),
    Signature("controlnet", "a ControlNet", "", (r"(control_model\.|controlnet_cond_embedding|input_hint_block)",)),
    Signature("chroma", "Chroma", "flux_train_network.py", (r"double_blocks\.0\.img_attn\.qkv", r"distilled_guidance_layer\.")),
    Signature("flux", "FLUX.1", "flux_train_network.py", (r"double_blocks\.0\.img_attn\.norm\.key_norm\.",)),
    Signature(
        "hunyuan_image",
        "HunyuanImage-2.1",
        "hunyuan_image_train_network.py",
        (r"double_blocks\.0\.img_attn_", r"byt5_in\."),
    ),
    Signature("sd3", "Stable Diffusion 3/3.5", "sd3_train_network.py", (r"joint_blocks\.0\.context_block\.",)),
    Signature("z_image", "Z-Image", "", (r"cap_embedder\.0\.", r"context_refiner\.0\.", r"cap_pad_token$")),
    Signature("lumina", "Lumina-Image-2.0", "lumina_train_network.py", (r"cap_embedder\.0\.", r"context_refiner\.0\.")),
    Signature("anima", "Anima", "anima_train_network.py", (r"llm_adapter\.", r"blocks\.0\.")),
    Signature("cascade", "Stable Cascade", "stable_cascade_train_stage_c.py", (r"clip_txt_mapper\.",)),
    Signature("sdxl_refiner", "the SDXL refiner", "", (r"conditioner\.embedders\.0\.model\.", _LDM_UNET)),
    Signature("sdxl", "SDXL", "sdxl_train_network.py", (_LDM_UNET, r"label_emb\.0\.0\.weight$")),
    Signature("sd2", "Stable Diffusion 2.x", "train_network.py", (_LDM_UNET, r"cond_stage_model\.model\.")),
    Signature("sd1", "Stable Diffusion 1.x", "train_network.py", (_LDM_UNET, r"cond_stage_model\.transformer\.")),
    Signature("unet", "a UNet alone, without text encoder and VAE", "", (_LDM_UNET,)),
    Signature(
        "diffusers_part", "one part of a diffusers model; give its folder", "", (r"(down_blocks|transformer_blocks)\.0\.",)
    ),
    Signature("vae", "a VAE", "", (r"(first_stage_model\.|vae\.)?(encoder\.down|encoder\.down_blocks)\.0\.",)),
    Signature("clip", "a CLIP text encoder", "", (r"(text_model\.|transformer\.)?(encoder\.layers|resblocks)\.0\.",)),
    Signature("gemma2", "a Gemma-2 text encoder", "", (r"(model\.)?layers\.0\.pre_feedforward_layernorm\.",)),
    Signature("t5", "a T5 text encoder", "", (r"encoder\.block\.0\.layer\.0\.SelfAttention\.",)),
)
"""The first that fits wins, so special cases stand before what they would be taken for."""

PIPELINES: dict[str, str] = {
    "StableDiffusionXLPipeline": "sdxl",
    "StableDiffusionXLInpaintPipeline": "sdxl",
    "StableDiffusionXLInstructPix2PixPipeline": "sdxl",
    "StableDiffusionXLImg2ImgPipeline": "sdxl_refiner",
    "StableDiffusionPipeline": "sd1",
    "StableDiffusion3Pipeline": "sd3",
    "FluxPipeline": "flux",
    "FluxKontextPipeline": "flux",
    "ChromaPipeline": "chroma",
    "Lumina2Pipeline": "lumina",
    "Lumina2Text2ImgPipeline": "lumina",
    "HunyuanImagePipeline": "hunyuan_image",
    "AnimaPipeline": "anima",
    "StableCascadeCombinedPipeline": "cascade",
    "StableCascadePriorPipeline": "cascade",
}
"""`_class_name` in a diffusers folder's model_index.json -> family."""

_BY_FAMILY = {signature.family: signature for signature in SIGNATURES}


def detect_family(source: TensorSource) -> Detected | None:
    """What the tensors of `source` are, or None when no signature fits."""
    return detect_keys(source.keys())


def detect_keys(keys: Iterable[str]) -> Detected | None:
    stripped = "\n".join(_without_prefix(key) for key in keys)
    for signature in SIGNATURES:
        if signature.fits(stripped):
            return Detected(signature.family, signature.title, signature.script)
    return None


def _without_prefix(key: str) -> str:
    for prefix in PREFIXES:
        if key.startswith(prefix):
            return key[len(prefix) :]
    return key


def detect_folder(folder: Path) -> Detected | None:
    """What a diffusers folder is, from its model_index.json; None for a pipeline class that is not in `PIPELINES`."""
    name = read_json(folder / "model_index.json").get("_class_name", "")
    family = PIPELINES.get(name)
    if family == "sdxl_refiner" and (folder / "text_encoder").is_dir():
        family = "sdxl"  # the base model, saved from its image-to-image pipeline: the refiner has the second encoder alone
    if family is None:
        return None
    signature = _BY_FAMILY[family]
    return Detected(family, signature.title, signature.script)


def require_family(path: Path, detected: Detected | None, wanted: tuple[str, ...], wanted_title: str, script: str) -> None:
    """Raise a `UserError` that says what `path` is and which script trains it, unless it is one of `wanted`."""
    if detected is not None and detected.family in wanted:
        return
    if detected is None:
        raise UserError(f"{path} is not a model this program knows; {script} needs {wanted_title}.")
    remedy = f"Train it with {detected.script}, or give" if detected.script else "Give"
    raise UserError(f"{path} is {detected.title}, and {script} needs {wanted_title}. {remedy} another model.")
