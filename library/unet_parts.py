"""What the UNet families (Stable Diffusion 1.x/2.x, SDXL) share of models on disk: sizes, and what a file says of itself.

The network is diffusers' class; files of the original (LDM) layout carry no configuration, so it is told from their shapes.
That way a tiny model in the official layout runs through the real scripts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from torch import nn

from library.clip_parts import HEAD_WIDTH
from library.errors import UserError
from library.key_layout import IDENTITY
from library.lean_imports import diffusers_class
from library.model_io import (
    Shapes,
    TensorSource,
    count_indices,
    download_snapshot,
    empty_module,
    find_model,
    has_weights,
    looks_like_hub_id,
    open_component,
    read_json,
)
from library.model_parts import Component, stamp
from library.model_signatures import detect_folder, require_family
from library.unet_names import unet_key_map_for
from library.vae_parts import VAE_PREFIX, file_vae, open_vae

if TYPE_CHECKING:
    from library.option_groups import ModelOptions

SD1_HEADS = 8
UNET_PREFIX = "model.diffusion_model."
V_MARKER, ZERO_SNR_MARKER = "v_pred", "ztsnr"
"""Empty tensors beside the weights of a single file that say what it was trained with."""

Prediction = Literal["epsilon", "v_prediction"]

SPECIAL_INPUTS = {
    5: "a depth-to-image model",
    7: "an upscaler",
    8: "an instruction-editing (pix2pix) model",
    9: "an inpainting model",
}
"""UNet input channels -> what takes more than a latent."""

_HUB_SMALL = ("*.json", "*/*.json", "*/*.txt")
_HUB_VAE = ("config.json", "diffusion_pytorch_model*", "vae/config.json", "vae/diffusion_pytorch_model*")
_VARIANTS = ("*.fp16*", "*.bf16*", "*.non_ema*", "*.fp32*")
_HUB_WEIGHTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("*.safetensors", _VARIANTS),
    ("*pytorch_model*.bin", _VARIANTS),
    ("*.fp16*.safetensors", ()),
    ("*.fp16*.bin", ()),
    ("*.safetensors", ()),
    ("*.bin", ()),
)
"""(files of a part, but for those), the first choice first; the next is for parts of which there are none of these."""


UnetModelT = TypeVar("UnetModelT", bound="UnetModel")


@dataclass(frozen=True)
class UnetModel:
    """A model on disk, before anything is loaded, and what it says of itself."""

    path: Path
    format: str
    """safetensors, ckpt, diffusers or diffusers_safetensors: also the format it is saved in unless told otherwise."""
    parts: Mapping[str, Component]
    """denoiser, vae, and the text encoders by name."""
    prediction: Prediction | None
    """None when the file does not say."""
    prediction_from: str
    """Where it says so, for messages."""
    zero_terminal_snr: bool
    whole: TensorSource | None
    """Every tensor of a single file, those no part uses too; None for a folder."""

    @classmethod
    def of_file(cls: type[UnetModelT], whole: TensorSource, parts: Mapping[str, Component], **own: Any) -> UnetModelT:
        """A single file. own: what a family knows of it beside that."""
        prediction, prediction_from = file_prediction(whole)
        return cls(
            path=whole.path,
            format=file_format(whole.path),
            parts=parts,
            prediction=prediction,
            prediction_from=prediction_from,
            zero_terminal_snr=ZERO_SNR_MARKER in whole,
            whole=whole,
            **own,
        )

    @classmethod
    def of_folder(cls: type[UnetModelT], path: Path, parts: Mapping[str, Component], **own: Any) -> UnetModelT:
        """A diffusers folder."""
        prediction, prediction_from, zero_terminal_snr = folder_prediction(path)
        return cls(
            path=path,
            format=folder_format(parts["denoiser"]),
            parts=parts,
            prediction=prediction,
            prediction_from=prediction_from,
            zero_terminal_snr=zero_terminal_snr,
            whole=None,
            **own,
        )

    @property
    def unet(self) -> Component:
        return self.parts["denoiser"]

    @property
    def vae(self) -> Component:
        return self.parts["vae"]


# ---- the UNet --------------------------------------------------------------------------------------------------------


def unet_config(shapes: Shapes) -> dict[str, Any]:
    """UNet2DConditionModel's configuration, from an LDM UNet.

    Head counts are the one thing shapes do not tell: a UNet with convolutional projections is SD1 and has 8 heads at every
    level; one with linear projections is SD2 or SDXL and has heads 64 wide (one head in a level narrower than that).
    """
    channels: list[int] = []
    depths: list[int] = []  # transformer blocks of each level; 0 = none
    layers = 0
    for block in range(1, count_indices(shapes, r"input_blocks\.(\d+)\.")):
        if f"input_blocks.{block}.0.op.weight" in shapes:
            layers = 0
            continue
        if layers == 0:
            channels.append(shapes[f"input_blocks.{block}.0.out_layers.3.weight"][0])
            depths.append(count_indices(shapes, rf"input_blocks\.{block}\.1\.transformer_blocks\.(\d+)\."))
        layers += 1
    linear = len(shapes["middle_block.1.proj_in.weight"]) == 2
    attends = [depth > 0 for depth in depths]
    config: dict[str, Any] = {
        "in_channels": shapes["input_blocks.0.0.weight"][1],
        "out_channels": shapes["out.2.weight"][0],
        "block_out_channels": channels,
        "layers_per_block": layers,
        "down_block_types": ["CrossAttnDownBlock2D" if attend else "DownBlock2D" for attend in attends],
        "up_block_types": ["CrossAttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends)],
        "cross_attention_dim": shapes["middle_block.1.transformer_blocks.0.attn2.to_k.weight"][1],
        "attention_head_dim": [max(1, width // HEAD_WIDTH) for width in channels] if linear else SD1_HEADS,
        "use_linear_projection": linear,
    }
    if set(depths) - {0, 1}:
        config["transformer_layers_per_block"] = [max(1, depth) for depth in depths]
    if "label_emb.0.0.weight" in shapes:
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": shapes["label_emb.0.0.weight"][1],
        }
    return config


def make_unet(config: Mapping[str, Any]) -> nn.Module:
    """A UNet2DConditionModel without weights (parameters on the meta device)."""
    unet = diffusers_class("UNet2DConditionModel")
    return empty_module(lambda: unet.from_config(dict(config)))


def file_unet(whole: TensorSource) -> Component:
    unet = whole.under(UNET_PREFIX)
    config = unet_config(unet.shapes())
    return Component(unet, unet_key_map_for(config), config, make_unet)


def folder_unet(folder: Path) -> Component:
    return Component(open_component(folder), IDENTITY, read_json(folder / "config.json"), make_unet, folder=folder)


# ---- where a model is, and what it says ------------------------------------------------------------------------------


def find_models(options: ModelOptions, parts: tuple[str, ...]) -> tuple[Path, Path | None]:
    """(base model, --vae if given), downloaded where they are hub ids. parts: folders of a diffusers model that are needed."""
    name = options.pretrained_model_name_or_path
    if not name:
        raise UserError(
            "no base model: give --pretrained_model_name_or_path a checkpoint file, a diffusers folder or a hub id."
        )
    vae = find_model(options.vae, "--vae", allow_patterns=_HUB_VAE) if options.vae else None
    return _find_base(name, tuple(part for part in parts if part != "vae" or vae is None)), vae


def models_state(path: Path, vae: Path | None) -> object:
    """Changes when the files do."""
    return stamp(path), stamp(vae)


def _find_base(name: str, parts: tuple[str, ...]) -> Path:
    path = Path(name).expanduser()
    flag = "--pretrained_model_name_or_path"
    if path.exists() or not looks_like_hub_id(name):
        return find_model(name, flag)

    lacking = parts
    for pattern, but_for in _HUB_WEIGHTS:
        wanted = tuple(f"{part}/{pattern}" for part in lacking)
        folder = download_snapshot(name, flag, allow_patterns=_HUB_SMALL + wanted, ignore_patterns=but_for or None)
        lacking = tuple(part for part in parts if not has_weights(folder / part))
        if not lacking:
            break
    return folder


def require_folder(path: Path, families: tuple[str, ...], title: str, script: str) -> None:
    """Raise `UserError` unless the folder is a diffusers model of one of `families`."""
    if not (path / "model_index.json").is_file():
        raise UserError(
            f"{path} is a folder without model_index.json, so it is not a diffusers model. Give a file or such a folder."
        )
    require_family(path, detect_folder(path), families, title, script)


def choose_vae(given: Path | None, own: TensorSource | Path, *, title: str, scale: float) -> Component:
    """That of --vae where it is given, else the model's own. own: a single file or a diffusers folder."""
    folder = own / "vae" if isinstance(own, Path) else None
    if (path := given or folder) is not None:
        return open_vae(path, flag="--vae", title=title, scale=scale)
    assert isinstance(own, TensorSource)
    if f"{VAE_PREFIX}encoder.conv_in.weight" not in own:
        raise UserError(f"{own.path} has no VAE. Give one as --vae (a file, a diffusers folder or a hub id).")
    return file_vae(own, VAE_PREFIX, scale)


def file_format(path: Path) -> str:
    return "safetensors" if path.suffix == ".safetensors" else "ckpt"


def folder_format(unet: Component) -> str:
    return "diffusers_safetensors" if unet.source.path.suffix == ".safetensors" else "diffusers"


def file_prediction(whole: TensorSource) -> tuple[Prediction | None, str]:
    """What a single file says about its prediction: marker keys, then model-spec metadata. Most say nothing."""
    if V_MARKER in whole:
        return "v_prediction", f"its marker key '{V_MARKER}'"
    said = whole.metadata.get("modelspec.prediction_type", "")
    if said in ("v", "v_prediction", "epsilon"):
        return ("epsilon" if said == "epsilon" else "v_prediction"), f"its metadata modelspec.prediction_type = {said}"
    architecture = whole.metadata.get("modelspec.architecture", "")
    if architecture.startswith(("stable-diffusion-v2-768-v", "stable-diffusion-v2-512")):
        is_v = architecture.startswith("stable-diffusion-v2-768-v")
        return ("v_prediction" if is_v else "epsilon"), f"its metadata modelspec.architecture = {architecture}"
    return None, ""


def folder_prediction(path: Path) -> tuple[Prediction | None, str, bool]:
    """What a diffusers folder's scheduler says: its prediction, where it says so, whether its schedule ends in pure noise."""
    file = path / "scheduler" / "scheduler_config.json"
    scheduler = read_json(file) if file.is_file() else {}
    said = scheduler.get("prediction_type")
    prediction: Prediction | None = said if said in ("epsilon", "v_prediction") else None
    where = f"{file} (prediction_type = {said})" if said else ""
    return prediction, where, bool(scheduler.get("rescale_betas_zero_snr", False))


def check_parts(model: UnetModel, *, title: str, script: str, text_width: int) -> None:
    """Raise `UserError` for a model that takes more than a latent, and for parts that are not of one model.

    text_width: of the hidden states that its text encoders give.
    """
    channels = model.unet.config.get("in_channels", 4)
    if channels in SPECIAL_INPUTS:
        raise UserError(
            f"{model.path} is {SPECIAL_INPUTS[channels]} (its UNet takes {channels} channels, not 4), and {script} trains "
            "text-to-image models. Give the model it was made from."
        )
    expected = model.unet.config.get("cross_attention_dim")
    if text_width != expected:
        raise UserError(
            f"{model.path}: the text encoder is {text_width} wide and the UNet takes {expected}. They are not of one model."
        )
    own = model.vae.config.get("latent_channels", 4)
    if own != channels:
        raise UserError(
            f"the VAE at {model.vae.source.path} makes {own} latent channels, and the UNet of {model.path} takes {channels}. "
            f"Give a VAE of {title} as --vae."
        )
