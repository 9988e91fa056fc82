"""Stable Diffusion 1.x/2.x models on disk: what a file or folder says it is, checked against the flags, and its parts."""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from library import clip_parts, sd_models
from library.errors import UserError
from library.key_layout import IDENTITY, KeyMap
from library.model_io import (
    TensorSource,
    download_snapshot,
    find_model,
    looks_like_hub_id,
    open_checkpoint,
    open_component,
    read_json,
)
from library.model_parts import Component, stamp
from library.model_signatures import detect_family, detect_folder, require_family
from library.vae_parts import file_vae, open_vae

if TYPE_CHECKING:
    from library.option_groups import ModelOptions

logger = logging.getLogger(__name__)

SCRIPT = "train_network.py"
TITLE = "Stable Diffusion 1.x/2.x"
VAE_SCALE = 0.18215
UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
CLIP_PREFIX = "cond_stage_model.transformer."
OPEN_CLIP_PREFIX = "cond_stage_model.model."
_VAE: dict[str, Any] = {"flag": "--vae", "title": TITLE, "scale": VAE_SCALE}
"""What `open_vae` has to be told."""

Version = Literal["v1", "v2"]
Prediction = Literal["epsilon", "v_prediction"]

SPECIAL_INPUTS = {
    5: "a depth-to-image model",
    7: "an upscaler",
    8: "an instruction-editing (pix2pix) model",
    9: "an inpainting model",
}
"""UNet input channels -> what takes more than a latent."""

_HUB_SMALL = ("*.json", "*/*.json", "*/*.txt")
_HUB_SAFE = ("unet/*.safetensors", "vae/*.safetensors", "text_encoder/*.safetensors")
_HUB_PICKLED = ("unet/*.bin", "vae/*.bin", "text_encoder/*.bin")
_HUB_VAE = ("config.json", "diffusion_pytorch_model*", "vae/config.json", "vae/diffusion_pytorch_model*")
_HUB_VARIANTS = ("*.fp16.*", "*.non_ema.*", "*.fp32.*")


@dataclass(frozen=True)
class SdModel:
    """A model on disk, before anything is loaded, and what it says of itself."""

    path: Path
    format: str
    """safetensors, ckpt, diffusers or diffusers_safetensors: also the format it is saved in unless told otherwise."""
    version: Version
    unet: Component
    vae: Component
    text_encoder: Component
    prediction: Prediction | None
    """None when the file does not say."""
    prediction_from: str
    """Where it says so, for messages."""
    zero_terminal_snr: bool
    whole: TensorSource | None
    """Every tensor of a single file, those no part uses too; None for a folder."""

    @property
    def parts(self) -> dict[str, Component]:
        return {"denoiser": self.unet, "vae": self.vae, "text_encoder": self.text_encoder}


# ---- opening ---------------------------------------------------------------------------------------------------------


def describe(options: ModelOptions) -> SdModel:
    """The model that `options` name, from headers and configuration files alone. Cached while the files are unchanged."""
    name = options.pretrained_model_name_or_path
    if not name:
        raise UserError(
            "no base model: give --pretrained_model_name_or_path a checkpoint file, a diffusers folder or a hub id."
        )
    path = _find_base(name)
    vae = find_model(options.vae, "--vae", allow_patterns=_HUB_VAE) if options.vae else None
    return _describe(path, vae, (stamp(path), stamp(vae)))


def _find_base(name: str) -> Path:
    path = Path(name).expanduser()
    if path.exists() or not looks_like_hub_id(name):
        return find_model(name, "--pretrained_model_name_or_path")
    flag = "--pretrained_model_name_or_path"
    folder = download_snapshot(name, flag, allow_patterns=_HUB_SMALL + _HUB_SAFE, ignore_patterns=_HUB_VARIANTS)
    if not list(folder.glob("unet/*.safetensors")):
        folder = download_snapshot(name, flag, allow_patterns=_HUB_SMALL + _HUB_PICKLED, ignore_patterns=_HUB_VARIANTS)
    return folder


@functools.lru_cache(maxsize=4)
def _describe(path: Path, vae: Path | None, state: object) -> SdModel:
    model = _describe_folder(path, vae) if path.is_dir() else _describe_file(path, vae)
    channels = model.unet.config.get("in_channels", 4)
    if channels in SPECIAL_INPUTS:
        raise UserError(
            f"{path} is {SPECIAL_INPUTS[channels]} (its UNet takes {channels} channels, not 4), and {SCRIPT} trains "
            "text-to-image models. Give the model it was made from."
        )
    width, expected = model.text_encoder.config.get("hidden_size"), model.unet.config.get("cross_attention_dim")
    if width != expected:
        raise UserError(f"{path}: the text encoder is {width} wide and the UNet takes {expected}. They are not of one model.")
    if model.vae.config.get("latent_channels", 4) != channels:
        raise UserError(
            f"the VAE at {model.vae.source.path} makes {model.vae.config.get('latent_channels', 4)} latent channels, and the "
            f"UNet of {path} takes {channels}. Give a VAE of {TITLE} as --vae."
        )
    return model


def _describe_file(path: Path, vae: Path | None) -> SdModel:
    whole = open_checkpoint(path)
    detected = detect_family(whole)
    require_family(path, detected, ("sd1", "sd2"), TITLE, SCRIPT)
    assert detected is not None
    version: Version = "v2" if detected.family == "sd2" else "v1"
    shapes = (unet := whole.under(UNET_PREFIX)).shapes()
    config = sd_models.unet_config(shapes)
    prediction, prediction_from = _file_prediction(whole)
    return SdModel(
        path=path,
        format="safetensors" if path.suffix == ".safetensors" else "ckpt",
        version=version,
        unet=Component(unet, sd_models.unet_key_map_for(config), config, sd_models.make_unet, UNET_PREFIX),
        vae=open_vae(vae, **_VAE) if vae else _file_vae(whole),
        text_encoder=_open_clip(whole) if version == "v2" else _clip(whole),
        prediction=prediction,
        prediction_from=prediction_from,
        zero_terminal_snr="ztsnr" in whole,
        whole=whole,
    )


def _file_prediction(whole: TensorSource) -> tuple[Prediction | None, str]:
    """What a single file says about its prediction: marker keys, then model-spec metadata. Most say nothing."""
    if "v_pred" in whole:
        return "v_prediction", "its marker key 'v_pred'"
    said = whole.metadata.get("modelspec.prediction_type", "")
    if said in ("v", "v_prediction", "epsilon"):
        return ("epsilon" if said == "epsilon" else "v_prediction"), f"its metadata modelspec.prediction_type = {said}"
    architecture = whole.metadata.get("modelspec.architecture", "")
    if architecture.startswith(("stable-diffusion-v2-768-v", "stable-diffusion-v2-512")):
        is_v = architecture.startswith("stable-diffusion-v2-768-v")
        return ("v_prediction" if is_v else "epsilon"), f"its metadata modelspec.architecture = {architecture}"
    return None, ""


def _clip(whole: TensorSource) -> Component:
    source = whole.under(CLIP_PREFIX)
    key_map = clip_parts.CLIP_NAMES if "text_model.final_layer_norm.weight" in source else clip_parts.CLIP_BARE_NAMES
    config = clip_parts.clip_config(_our_shapes(source, key_map))
    optional = (r"(text_model\.)?embeddings\.position_ids", r"logit_scale", r"text_projection(\.weight)?")
    return Component(source, key_map, config, clip_parts.make_clip, CLIP_PREFIX, optional)


def _open_clip(whole: TensorSource) -> Component:
    source = whole.under(OPEN_CLIP_PREFIX)
    shapes = source.shapes()
    used = sd_models.open_clip_layers(shapes)
    optional = ("text_projection", "logit_scale", "attn_mask", rf"transformer\.resblocks\.{used}\..*")
    return Component(
        source,
        sd_models.OPEN_CLIP_NAMES,
        sd_models.open_clip_config(shapes),
        clip_parts.make_clip,
        OPEN_CLIP_PREFIX,
        optional,
    )


def _our_shapes(source: TensorSource, key_map: KeyMap) -> dict[str, tuple[int, ...]]:
    origins, _ = key_map.origins(source.keys())
    return {name: source.shape(origin.key) for name, origin in origins.items()}


def _file_vae(whole: TensorSource) -> Component:
    if f"{VAE_PREFIX}encoder.conv_in.weight" not in whole:
        raise UserError(f"{whole.path} has no VAE. Give one as --vae (a file, a diffusers folder or a hub id).")
    return file_vae(whole, VAE_PREFIX, VAE_SCALE)


def _describe_folder(path: Path, vae: Path | None) -> SdModel:
    if not (path / "model_index.json").is_file():
        raise UserError(
            f"{path} is a folder without model_index.json, so it is not a diffusers model. Give a file or such a folder."
        )
    require_family(path, detect_folder(path), ("sd1", "sd2"), TITLE, SCRIPT)
    config = read_json(path / "unet" / "config.json")
    text_config = read_json(path / "text_encoder" / "config.json")
    scheduler = read_json(scheduler_path) if (scheduler_path := path / "scheduler" / "scheduler_config.json").is_file() else {}
    said = scheduler.get("prediction_type")
    unet = Component(open_component(path / "unet"), IDENTITY, config, sd_models.make_unet, folder=path / "unet")
    text_encoder = Component(
        open_component(path / "text_encoder"),
        clip_parts.CLIP_FOLDER_NAMES,
        text_config,
        clip_parts.make_clip,
        optional=(r"(text_model\.)?embeddings\.position_ids",),
        folder=path / "text_encoder",
    )
    return SdModel(
        path=path,
        format="diffusers_safetensors" if unet.source.path.suffix == ".safetensors" else "diffusers",
        version="v2" if config.get("use_linear_projection") else "v1",
        unet=unet,
        vae=open_vae(vae or path / "vae", **_VAE),
        text_encoder=text_encoder,
        prediction=said if said in ("epsilon", "v_prediction") else None,
        prediction_from=f"{scheduler_path} (prediction_type = {said})" if said else "",
        zero_terminal_snr=bool(scheduler.get("rescale_betas_zero_snr", False)),
        whole=None,
    )


# ---- what the files say against what the flags say -------------------------------------------------------------------


def check_flags(model: SdModel, options: ModelOptions, *, zero_terminal_snr: bool) -> None:
    """Raise one `UserError` for all contradictions between file and flags. A file that is silent contradicts nothing."""
    problems = []
    if (model.version == "v2") != options.v2:
        told = "its text encoder and projections" if model.whole is not None else "unet/config.json"
        problems.append(
            f"{model.path} is Stable Diffusion {model.version[1]}.x (told from {told}), and "
            + ("--v2 says 2.x. Remove --v2." if options.v2 else "--v2 is not set. Add --v2.")
        )
    if model.prediction is not None and (model.prediction == "v_prediction") != options.v_parameterization:
        predicts = "v" if model.prediction == "v_prediction" else "noise (epsilon)"
        flag = (
            "--v_parameterization says v. Remove --v_parameterization."
            if options.v_parameterization
            else "--v_parameterization is not set. Add --v_parameterization."
        )
        problems.append(f"{model.path} predicts {predicts} according to {model.prediction_from}, and {flag}")
    if problems:
        raise UserError("\n".join(problems))
    if model.zero_terminal_snr and not zero_terminal_snr:
        logger.warning("%s was trained with a zero terminal SNR; --zero_terminal_snr is not set.", model.path)
