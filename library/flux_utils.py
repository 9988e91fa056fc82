"""FLUX.1 and Chroma on disk: names, what a file says it is, and its parts."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from library.clip_parts import CLIP_FOLDER_NAMES, clip_config, make_clip
from library.errors import UserError
from library.flux_models import Flux, FluxParams
from library.flux_names import FLUX_DIFFUSERS
from library.key_layout import IDENTITY
from library.model_io import TensorSource, empty_module, find_model, open_checkpoint, open_component, read_json
from library.model_parts import Component, stamp
from library.model_signatures import detect_family, detect_folder, require_family
from library.quantization import LayerTable
from library.t5_parts import T5_NAMES, T5_OPTIONAL, T5_STACK_NAMES, make_t5, t5_config
from library.vae_parts import open_vae

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
PREFIXES = ("model.diffusion_model.", "")
CLIP_L, T5XXL = "clip_l", "t5xxl"

Kind = Literal["dev", "schnell", "chroma"]

_HUB_FILES = (
    "*.json", "*/*.json", "*/*.txt", "*/*.model", "transformer/*.safetensors", "vae/*.safetensors",
    "text_encoder/*.safetensors", "text_encoder_2/*.safetensors",
)  # fmt: skip
_WHOLE_PREFIX = {CLIP_L: "text_encoders.clip_l.transformer.", T5XXL: "text_encoders.t5xxl.transformer."}
"""Where single files that hold everything have their text encoders."""


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
        """(scale, shift) of the autoencoder's latents."""
        config = self.parts["vae"].config
        shift = config.get("shift_factor")
        return config.get("scaling_factor", VAE_SCALE), VAE_SHIFT if shift is None else shift


def describe(options: TrainOptions) -> FluxModel:
    """The model that `options` name, from headers and configuration files alone. Cached while the files are unchanged."""
    name = options.model.pretrained_model_name_or_path
    if not name:
        raise UserError(
            "no base model: give --pretrained_model_name_or_path a checkpoint file, a diffusers folder or a hub id."
        )
    path = find_model(name, "--pretrained_model_name_or_path", allow_patterns=_HUB_FILES)
    flags: FluxOptions = options.family
    given = {
        part: find_model(value, f"--{part}") for part in (CLIP_L, T5XXL, "ae") if (value := getattr(flags, part)) is not None
    }
    model = _describe(path, tuple(given.items()), tuple(stamp(file) for file in (path, *given.values())))
    if flags.model_type is not None and (flags.model_type == "chroma") != (model.kind == "chroma"):
        raise UserError(
            f"{path} is {'Chroma' if model.kind == 'chroma' else 'FLUX.1 ' + model.kind}, and --model_type says "
            f"{flags.model_type}. Remove --model_type: the file tells."
        )
    return model


@functools.lru_cache(maxsize=4)
def _describe(path: Path, given: tuple[tuple[str, Path], ...], state: object) -> FluxModel:
    source, whole = _open_transformer(path)
    denoiser = _transformer(source)
    params: FluxParams = denoiser.config["params"]
    if params.in_channels != params.out_channels:
        raise UserError(
            f"{path} takes {params.in_channels} channels and gives {params.out_channels}: a fill, depth or canny model, which "
            f"needs a picture beside the caption. {SCRIPT} trains text-to-image models."
        )
    kind: Kind = "chroma" if params.approximator else "dev" if params.guidance_embed else "schnell"
    parts = {"denoiser": denoiser}
    parts |= _other_parts(path, whole, dict(given), kind)
    _check_sizes(path, params, parts)
    folder = path.is_dir()
    return FluxModel(
        path=path,
        format="diffusers_safetensors" if folder else "safetensors" if path.suffix == ".safetensors" else "ckpt",
        kind=kind,
        params=params,
        parts=parts,
    )


def open_denoiser(path: Path) -> Component:
    """The transformer of a file or a diffusers folder."""
    return _transformer(_open_transformer(path)[0])


def _transformer(source: TensorSource) -> Component:
    return Component(source, IDENTITY, {"params": FluxParams.of(source.shapes())}, _make_flux)


def _make_flux(config: Mapping[str, Any]) -> nn.Module:
    return empty_module(lambda: Flux(config["params"]))


def _open_transformer(path: Path) -> tuple[TensorSource, TensorSource | None]:
    """(the transformer under its original names, the whole file or None for a folder)."""
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise UserError(f"{path} is a folder without model_index.json, so it is not a diffusers model. Give a file.")
        require_family(path, detect_folder(path), ("flux", "chroma"), TITLE, SCRIPT)
        return open_component(path / "transformer").under_their_names(FLUX_DIFFUSERS), None
    whole = open_checkpoint(path)
    detected = detect_family(whole)
    require_family(path, detected, ("flux", "chroma"), TITLE, SCRIPT)
    for prefix in PREFIXES:
        if f"{prefix}img_in.weight" in whole:
            source = whole.under(prefix)
            if not prefix:
                source = source.only(key for key in source if not key.startswith(("text_encoders.", "vae.")))
            return source, whole
    raise UserError(f"{path} lacks img_in.weight: it is not a whole {TITLE} transformer. Download it again.")


def _other_parts(path: Path, whole: TensorSource | None, given: Mapping[str, Path], kind: Kind) -> dict[str, Component]:
    """Text encoders and autoencoder: from their own files, else from the model's. One `UserError` lists all that lack."""
    found, missing = _text_encoders(path, whole, given, kind)
    if "ae" in given or whole is None or "vae.encoder.conv_in.weight" in whole:
        flag = "--ae" if "ae" in given else "--pretrained_model_name_or_path"
        found["vae"] = open_vae(given.get("ae", path), flag=flag, title=TITLE, scale=VAE_SCALE, shift=VAE_SHIFT)
    else:
        missing.append("--ae")
    if missing:
        raise UserError(
            f"{path} holds the transformer alone. Give {', '.join(missing)}, each a file or a folder, or give a diffusers "
            "folder that has all parts."
        )
    return found


def _text_encoders(
    path: Path, whole: TensorSource | None, given: Mapping[str, Path], kind: Kind
) -> tuple[dict[str, Component], list[str]]:
    """(those that there are, the flags of those that there are not)."""
    found: dict[str, Component] = {}
    missing = []
    openers = {CLIP_L: open_clip, T5XXL: open_t5}
    if kind == "chroma":
        del openers[CLIP_L]
    folders = {CLIP_L: "text_encoder", T5XXL: "text_encoder" if kind == "chroma" else "text_encoder_2"}
    for name, opener in openers.items():
        if name in given:
            found[name] = opener(given[name], f"--{name}")
        elif whole is None:
            found[name] = opener(path / folders[name], str(path))
        elif any(key.startswith(_WHOLE_PREFIX[name]) for key in whole):
            found[name] = opener(path, str(path))
        else:
            missing.append(f"--{name}")
    return found, missing


def open_parts(path: Path, others: Mapping[str, Path]) -> dict[str, Component]:
    """The transformer, and the text encoders that are in the same file or folder or in the files `others`."""
    source, whole = _open_transformer(path)
    denoiser = _transformer(source)
    params: FluxParams = denoiser.config["params"]
    found, _ = _text_encoders(path, whole, others, "chroma" if params.approximator else "dev")
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
    source = _text_tensors(path, CLIP_L)
    shapes = source.shapes(CLIP_FOLDER_NAMES)
    if "embeddings.token_embedding.weight" not in shapes:
        raise UserError(f"{flag} {path} has no CLIP-L in it{_is(source)}.")
    return Component(source, CLIP_FOLDER_NAMES, clip_config(shapes), make_clip, optional=optional)


def open_t5(path: Path, flag: str) -> Component:
    """T5: a file with or without prefix, or a transformers folder."""
    source = open_component(path) if path.is_dir() else _text_tensors(path, T5XXL)
    names = T5_NAMES if "shared.weight" in source else T5_STACK_NAMES
    if "encoder.block.0.layer.0.SelfAttention.q.weight" not in source:
        raise UserError(f"{flag} {path} has no T5 encoder in it{_is(source)}.")
    config = read_json(path / "config.json") if path.is_dir() else t5_config(source.shapes())
    optional = T5_OPTIONAL if names is T5_NAMES else ()
    return Component(source, names, config, make_t5, optional=optional, folder=path if path.is_dir() else None)


def _text_tensors(path: Path, name: str) -> TensorSource:
    whole = open_checkpoint(path)
    inner = whole.under(_WHOLE_PREFIX[name])
    return inner if inner.entries else whole


def _is(source: TensorSource) -> str:
    detected = detect_family(source)
    return f": it is {detected.title}" if detected else ""
