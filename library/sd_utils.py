"""Stable Diffusion 1.x/2.x models on disk: what a file or folder says it is, checked against the flags, and its parts."""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from library import clip_parts, sd_models, unet_parts
from library.errors import UserError
from library.model_io import TensorSource, open_checkpoint
from library.model_parts import Component
from library.model_signatures import detect_family, require_family
from library.strategy_sd import TEXT_ENCODER
from library.unet_parts import UnetModel

if TYPE_CHECKING:
    from library.option_groups import ModelOptions

logger = logging.getLogger(__name__)

SCRIPT = "train_network.py"
TITLE = "Stable Diffusion 1.x/2.x"
VAE_SCALE = 0.18215
CLIP_PREFIX = "cond_stage_model.transformer."
OPEN_CLIP_PREFIX = "cond_stage_model.model."

Version = Literal["v1", "v2"]


@dataclass(frozen=True)
class SdModel(UnetModel):
    """Stable Diffusion 1.x or 2.x on disk."""

    version: Version

    @property
    def text_encoder(self) -> Component:
        return self.parts[TEXT_ENCODER]


# ---- opening ---------------------------------------------------------------------------------------------------------


def describe(options: ModelOptions) -> SdModel:
    """The model that `options` name, from headers and configuration files alone. Cached while the files are unchanged."""
    path, vae = unet_parts.find_models(options, ("unet", "vae", TEXT_ENCODER))
    return _describe(path, vae, unet_parts.models_state(path, vae))


@functools.lru_cache(maxsize=4)
def _describe(path: Path, vae: Path | None, state: object) -> SdModel:
    model = _describe_folder(path, vae) if path.is_dir() else _describe_file(path, vae)
    unet_parts.check_parts(model, title=TITLE, script=SCRIPT, text_width=model.text_encoder.config.get("hidden_size", 0))
    return model


def _describe_file(path: Path, vae: Path | None) -> SdModel:
    whole = open_checkpoint(path)
    detected = detect_family(whole)
    require_family(path, detected, ("sd1", "sd2"), TITLE, SCRIPT)
    assert detected is not None
    version: Version = "v2" if detected.family == "sd2" else "v1"
    parts = {
        "denoiser": unet_parts.file_unet(whole),
        "vae": unet_parts.choose_vae(vae, whole, title=TITLE, scale=VAE_SCALE),
        TEXT_ENCODER: _open_clip(whole) if version == "v2" else clip_parts.file_clip(whole, CLIP_PREFIX),
    }
    return SdModel.of_file(whole, parts, version=version)


def _open_clip(whole: TensorSource) -> Component:
    source = whole.under(OPEN_CLIP_PREFIX)
    shapes = source.shapes()
    used = sd_models.sd2_clip_layers(shapes)
    optional = ("text_projection", "logit_scale", "attn_mask", rf"transformer\.resblocks\.{used}\..*")
    return Component(
        source,
        clip_parts.OPEN_CLIP_NAMES,
        sd_models.sd2_clip_config(shapes),
        clip_parts.make_clip,
        optional,
    )


def _describe_folder(path: Path, vae: Path | None) -> SdModel:
    unet_parts.require_folder(path, ("sd1", "sd2"), TITLE, SCRIPT)
    unet = unet_parts.folder_unet(path / "unet")
    parts = {
        "denoiser": unet,
        "vae": unet_parts.choose_vae(vae, path, title=TITLE, scale=VAE_SCALE),
        TEXT_ENCODER: clip_parts.folder_clip(path / TEXT_ENCODER),
    }
    return SdModel.of_folder(path, parts, version="v2" if unet.config.get("use_linear_projection") else "v1")


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
