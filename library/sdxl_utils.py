"""SDXL models on disk: what a file or folder says it is, checked against the flags, and its parts."""

from __future__ import annotations

import functools
import logging
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from library import clip_parts, unet_parts
from library.errors import UserError
from library.model_io import open_checkpoint, read_json
from library.model_signatures import detect_family, require_family
from library.sdxl_models import added_width
from library.strategy_sdxl import CLIP_L, OPEN_CLIP
from library.unet_parts import UnetModel

if TYPE_CHECKING:
    from library.option_groups import ModelOptions

logger = logging.getLogger(__name__)

SCRIPT = "sdxl_train_network.py"
TITLE = "SDXL"
VAE_SCALE = 0.13025
CLIP_L_PREFIX = "conditioner.embedders.0.transformer."
OPEN_CLIP_PREFIX = "conditioner.embedders.1.model."
FOLDERS = {CLIP_L: "text_encoder", OPEN_CLIP: "text_encoder_2"}
"""Text encoder -> its folder in a diffusers model."""


# ---- opening ---------------------------------------------------------------------------------------------------------


def describe(options: ModelOptions) -> UnetModel:
    """The model that `options` name, from headers and configuration files alone. Cached while the files are unchanged."""
    path, vae = unet_parts.find_models(options, ("unet", "vae", *FOLDERS.values()))
    return _describe(path, vae, unet_parts.models_state(path, vae))


@functools.lru_cache(maxsize=4)
def _describe(path: Path, vae: Path | None, state: object) -> UnetModel:
    model = _describe_folder(path, vae) if path.is_dir() else _describe_file(path, vae)
    first, second = (model.parts[name].config for name in (CLIP_L, OPEN_CLIP))
    unet_parts.check_parts(model, title=TITLE, script=SCRIPT, text_width=first["hidden_size"] + second["hidden_size"])
    pooled, expected = second["projection_dim"], added_width(model.unet.config)
    if pooled != expected:
        raise UserError(
            f"{path}: the second text encoder's projection is {pooled} wide and the UNet takes {expected}. They are not of "
            "one model."
        )
    return model


def _describe_file(path: Path, vae: Path | None) -> UnetModel:
    whole = open_checkpoint(path)
    require_family(path, detect_family(whole), ("sdxl",), TITLE, SCRIPT)
    for prefix, name in ((CLIP_L_PREFIX, "CLIP-L"), (OPEN_CLIP_PREFIX, "OpenCLIP bigG")):
        if not whole.under(prefix).entries:
            raise UserError(f"{path} has no text encoder {name} ({prefix}...). Give a whole SDXL checkpoint.")
    if marks := [key for key in ("edm_vpred.sigma_max", "edm_mean", "edm_std") if key in whole]:
        _refuse_edm(path, marks[0])
    parts = {
        "denoiser": unet_parts.file_unet(whole),
        "vae": unet_parts.choose_vae(vae, whole, title=TITLE, scale=VAE_SCALE),
        CLIP_L: clip_parts.file_clip(whole, CLIP_L_PREFIX),
        OPEN_CLIP: clip_parts.file_projected_clip(whole, OPEN_CLIP_PREFIX),
    }
    return UnetModel.of_file(whole, parts)


def _refuse_edm(path: Path, sign: str) -> NoReturn:
    """Models such as CosXL and Playground 2.5 have SDXL's shapes, and noise and scaling of their own (Karras et al. 2022)."""
    raise UserError(
        f"{path} was trained with EDM's noise ({sign}), which {SCRIPT} does not do. Give a model of SDXL's own noise."
    )


def _describe_folder(path: Path, vae: Path | None) -> UnetModel:
    unet_parts.require_folder(path, ("sdxl",), TITLE, SCRIPT)
    scheduler = path / "scheduler" / "scheduler_config.json"
    name = read_json(scheduler).get("_class_name", "") if scheduler.is_file() else ""
    if name.startswith("EDM"):
        _refuse_edm(path, name)
    parts = {
        "denoiser": unet_parts.folder_unet(path / "unet"),
        "vae": unet_parts.choose_vae(vae, path, title=TITLE, scale=VAE_SCALE),
        CLIP_L: clip_parts.folder_clip(path / FOLDERS[CLIP_L]),
        OPEN_CLIP: clip_parts.folder_clip(path / FOLDERS[OPEN_CLIP], projected=True),
    }
    return UnetModel.of_folder(path, parts)


# ---- what the files say against what the flags say -------------------------------------------------------------------


def predicts_v(model: UnetModel, options: ModelOptions, explicit: Collection[str]) -> bool:
    """What the flag says where it is given, else what the model says of itself."""
    return options.v_parameterization if "v_parameterization" in explicit else model.prediction == "v_prediction"


def ends_in_noise(model: UnetModel, flag: bool, explicit: Collection[str]) -> bool:
    """The same for `--zero_terminal_snr`."""
    return flag if "zero_terminal_snr" in explicit else model.zero_terminal_snr


def check_flags(model: UnetModel, options: ModelOptions, explicit: Collection[str], *, zero_terminal_snr: bool) -> None:
    """Tell what is taken from the model, and warn where a flag says otherwise. Raises `UserError` for v trained as noise."""
    says_v = model.prediction == "v_prediction"
    if "v_parameterization" in explicit and model.prediction is not None and says_v != options.v_parameterization:
        if says_v:
            raise UserError(
                f"{model.path} predicts v according to {model.prediction_from}, and --no-v_parameterization says noise. "
                "Remove --no-v_parameterization."
            )
        logger.warning(
            "%s predicts noise (epsilon) according to %s; --v_parameterization teaches it v anew.",
            model.path,
            model.prediction_from,
        )
    elif says_v:
        logger.info("%s predicts v according to %s", model.path, model.prediction_from)
    if model.zero_terminal_snr and zero_terminal_snr:
        logger.info("%s was trained with a zero terminal SNR, and so it is now", model.path)
    elif model.zero_terminal_snr:
        logger.warning("%s was trained with a zero terminal SNR; --no-zero_terminal_snr trains it without.", model.path)
