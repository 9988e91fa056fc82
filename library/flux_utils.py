"""FLUX.1 and Chroma on disk: names, what a file says it is, and its parts."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from library.clip_parts import CLIP_FOLDER_NAMES, clip_config, make_clip
from library.dit_parts import TEXT, DitLayout, TextPart, format_of, given_files, latent_scale, text_tensors, what_it_is
from library.errors import UserError
from library.flux_models import Flux, FluxParams
from library.flux_names import FLUX_DIFFUSERS
from library.key_layout import IDENTITY
from library.model_io import TensorSource, empty_module, open_component, read_json
from library.model_parts import Component, stamp
from library.quantization import LayerTable
from library.t5_parts import T5_NAMES, T5_OPTIONAL, T5_STACK_NAMES, make_t5, t5_config

if TYPE_CHECKING:
    from library.flux_options import FluxOptions
    from library.option_groups import TrainOptions

FLUX_LAYERS = LayerTable(
    quantized=(r"(double|single)_blocks\..*",),
    sensitive=(r".*(_mod|modulation)\.lin",),
)
"""Embeddings, the last layer and Chroma's approximator stay as they are. Modulation, a quarter of FLUX.1's weights, is left out
by others (musubi-tuner), or is fp8 like the rest (sd-scripts)."""


# ---- a model on disk -------------------------------------------------------------------------------------------------

SCRIPT = "flux_train_network.py"
TITLE = "FLUX.1 or Chroma"
VAE_SCALE, VAE_SHIFT = 0.3611, 0.1159
CLIP_L, T5XXL = "clip_l", "t5xxl"
_PREFIXES = {CLIP_L: f"{TEXT}clip_l.transformer.", T5XXL: f"{TEXT}t5xxl.transformer."}

Kind = Literal["dev", "schnell", "chroma"]

LAYOUT = DitLayout(
    title=TITLE,
    script=SCRIPT,
    families=("flux", "chroma"),
    first_key="img_in.weight",
    folder_names=lambda source: FLUX_DIFFUSERS,
    vae_scale=VAE_SCALE,
    vae_shift=VAE_SHIFT,
    hub_files=(
        "*.json", "*/*.json", "*/*.txt", "*/*.model", "transformer/*.safetensors", "vae/*.safetensors",
        "text_encoder/*.safetensors", "text_encoder_2/*.safetensors",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class FluxModel:
    """A model on disk, before anything is loaded."""

    path: Path
    format: str
    """safetensors, ckpt or diffusers_safetensors: also the format it is saved in unless told otherwise."""
    kind: Kind
    params: FluxParams
    parts: Mapping[str, Component]
    """denoiser, vae, t5xxl, and clip_l but for Chroma."""

    @property
    def spare_tokens(self) -> int:
        """Tokens of padding that are attended to where padding is hidden: Chroma was trained with one."""
        return 1 if self.kind == "chroma" else 0

    @property
    def latent_scale(self) -> tuple[float, float]:
        return latent_scale(self.parts["vae"], VAE_SCALE, VAE_SHIFT)


def describe(options: TrainOptions) -> FluxModel:
    """The model that `options` name, from headers and configuration files alone. Cached while the files are unchanged."""
    path = LAYOUT.find(options.model.pretrained_model_name_or_path)
    flags: FluxOptions = options.family
    given = given_files(flags, (CLIP_L, T5XXL, "ae"))
    model = _describe(path, tuple(given.items()), tuple(stamp(file) for file in (path, *given.values())))
    if flags.model_type is not None and (flags.model_type == "chroma") != (model.kind == "chroma"):
        raise UserError(
            f"{path} is {'Chroma' if model.kind == 'chroma' else 'FLUX.1 ' + model.kind}, and --model_type says "
            f"{flags.model_type}. Remove --model_type: the file tells."
        )
    return model


@functools.lru_cache(maxsize=4)
def _describe(path: Path, given: tuple[tuple[str, Path], ...], state: object) -> FluxModel:
    source, whole = LAYOUT.open_transformer(path)
    denoiser = _transformer(source)
    params: FluxParams = denoiser.config["params"]
    if params.in_channels != params.out_channels:
        raise UserError(
            f"{path} takes {params.in_channels} channels and gives {params.out_channels}: a fill, depth or canny model, which "
            f"needs a picture beside the caption. {SCRIPT} trains text-to-image models."
        )
    kind: Kind = "chroma" if params.approximator else "dev" if params.guidance_embed else "schnell"
    parts = {"denoiser": denoiser, **LAYOUT.other_parts(path, whole, dict(given), _text_parts(kind))}
    _check_sizes(path, params, parts)
    return FluxModel(path=path, format=format_of(path), kind=kind, params=params, parts=parts)


def open_denoiser(path: Path) -> Component:
    """The transformer of a file or a diffusers folder."""
    return _transformer(LAYOUT.open_transformer(path)[0])


def _transformer(source: TensorSource) -> Component:
    return Component(source, IDENTITY, {"params": FluxParams.of(source.shapes())}, _make_flux)


def _make_flux(config: Mapping[str, Any]) -> nn.Module:
    return empty_module(lambda: Flux(config["params"]))


def _text_parts(kind: Kind) -> dict[str, TextPart]:
    if kind == "chroma":
        return {T5XXL: TextPart(open_t5, "text_encoder", _PREFIXES[T5XXL])}
    clip = TextPart(open_clip, "text_encoder", _PREFIXES[CLIP_L])
    return {CLIP_L: clip, T5XXL: TextPart(open_t5, "text_encoder_2", _PREFIXES[T5XXL])}


def open_parts(path: Path, others: Mapping[str, Path]) -> dict[str, Component]:
    """The transformer, and the text encoders that are in the same file or folder or in the files `others`."""
    source, whole = LAYOUT.open_transformer(path)
    denoiser = _transformer(source)
    params: FluxParams = denoiser.config["params"]
    found, _ = LAYOUT.text_encoders(path, whole, others, _text_parts("chroma" if params.approximator else "dev"))
    if unknown := others.keys() - found.keys():
        raise UserError(f"{path} has no part {min(unknown)}. Its text encoders: {CLIP_L}, {T5XXL}; Chroma has {T5XXL} alone.")
    return {"denoiser": denoiser, **found}


def _check_sizes(path: Path, params: FluxParams, parts: Mapping[str, Component]) -> None:
    """Raise a `UserError` for parts that are not of one model."""
    widths = {T5XXL: ("d_model", params.context_width), CLIP_L: ("hidden_size", params.pooled_width)}
    for name, (key, expected) in widths.items():
        if name in parts and parts[name].config[key] != expected:
            raise UserError(
                f"--{name} {parts[name].source.path} is {parts[name].config[key]} wide, and the transformer {path} takes "
                f"{expected}. Give the text encoder that the model was made with."
            )
    channels = parts["vae"].config.get("latent_channels", 4)
    if channels * 4 != params.in_channels:
        raise UserError(
            f"--ae {parts['vae'].source.path} makes {channels} latent channels, and the transformer {path} takes "
            f"{params.in_channels // 4}. Give FLUX.1's autoencoder."
        )


def open_clip(path: Path, flag: str) -> Component:
    """CLIP-L: a file with or without prefix, or a transformers folder."""
    optional = (r"(text_model\.)?embeddings\.position_ids", r"logit_scale", r"text_projection(\.weight)?")
    if path.is_dir():
        config = read_json(path / "config.json")
        return Component(open_component(path), CLIP_FOLDER_NAMES, config, make_clip, optional=optional, folder=path)
    source = text_tensors(path, _PREFIXES[CLIP_L])
    shapes = source.shapes(CLIP_FOLDER_NAMES)
    if "embeddings.token_embedding.weight" not in shapes:
        raise UserError(f"{flag} {path} has no CLIP-L in it{what_it_is(source)}.")
    return Component(source, CLIP_FOLDER_NAMES, clip_config(shapes), make_clip, optional=optional)


def open_t5(path: Path, flag: str) -> Component:
    """T5: a file with or without prefix, or a transformers folder."""
    source = open_component(path) if path.is_dir() else text_tensors(path, _PREFIXES[T5XXL])
    names = T5_NAMES if "shared.weight" in source else T5_STACK_NAMES
    if "encoder.block.0.layer.0.SelfAttention.q.weight" not in source:
        raise UserError(f"{flag} {path} has no T5 encoder in it{what_it_is(source)}.")
    config = read_json(path / "config.json") if path.is_dir() else t5_config(source.shapes())
    optional = T5_OPTIONAL if names is T5_NAMES else ()
    return Component(source, names, config, make_t5, optional=optional, folder=path if path.is_dir() else None)
