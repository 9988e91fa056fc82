"""FLUX.1 and Chroma on disk: names, what a file says it is, and its parts."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from library.dit_parts import DitLayout, DitModel, TextPart, check_channels, check_width, files_now, format_of, given_files
from library.dit_text import clip_part, t5_part
from library.errors import UserError
from library.flux_models import Flux, FluxParams
from library.flux_names import FLUX_DIFFUSERS
from library.model_parts import Component
from library.quantization import LayerTable
from library.strategy_dit import CLIP_L, T5XXL

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

Kind = Literal["dev", "schnell", "chroma"]


def _text_parts(params: FluxParams) -> dict[str, TextPart]:
    if params.approximator is not None:
        return {T5XXL: t5_part("text_encoder")}
    return {CLIP_L: clip_part(CLIP_L, "text_encoder"), T5XXL: t5_part("text_encoder_2")}


LAYOUT = DitLayout(
    title=TITLE,
    script=SCRIPT,
    families=("flux", "chroma"),
    first_key="img_in.weight",
    folder_names=lambda source: FLUX_DIFFUSERS,
    network=Flux,
    sizes=FluxParams.of,
    text_parts=_text_parts,
    vae_scale=VAE_SCALE,
    vae_shift=VAE_SHIFT,
    hub_files=(
        "*.json", "*/*.json", "*/*.txt", "*/*.model", "transformer/*.safetensors", "vae/*.safetensors",
        "text_encoder/*.safetensors", "text_encoder_2/*.safetensors",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class FluxModel(DitModel[FluxParams]):
    """Chroma has no clip_l among its parts."""

    kind: Kind

    @property
    def spare_tokens(self) -> int:
        """Tokens of padding that are attended to where padding is hidden: Chroma was trained with one."""
        return 1 if self.kind == "chroma" else 0


def describe(options: TrainOptions) -> FluxModel:
    """The model that `options` name, from headers and configuration files alone. Cached while the files are unchanged."""
    path = LAYOUT.find(options.model.pretrained_model_name_or_path)
    flags: FluxOptions = options.family
    given = given_files(flags, (CLIP_L, T5XXL, "ae"))
    model = _describe(*files_now(path, given))
    if flags.model_type is not None and (flags.model_type == "chroma") != (model.kind == "chroma"):
        raise UserError(
            f"{path} is {'Chroma' if model.kind == 'chroma' else 'FLUX.1 ' + model.kind}, and --model_type says "
            f"{flags.model_type}. Remove --model_type: the file tells."
        )
    return model


@functools.lru_cache(maxsize=4)
def _describe(path: Path, given: tuple[tuple[str, Path], ...], state: object) -> FluxModel:
    parts, _ = LAYOUT.all_parts(path, dict(given))
    params: FluxParams = parts["denoiser"].config["params"]
    if params.in_channels != params.out_channels:
        raise UserError(
            f"{path} takes {params.in_channels} channels and gives {params.out_channels}: a fill, depth or canny model, which "
            f"needs a picture beside the caption. {SCRIPT} trains text-to-image models."
        )
    kind: Kind = "chroma" if params.approximator else "dev" if params.guidance_embed else "schnell"
    _check_sizes(path, params, parts)
    return FluxModel(path=path, format=format_of(path), kind=kind, params=params, parts=parts)


def _check_sizes(path: Path, params: FluxParams, parts: Mapping[str, Component]) -> None:
    """Raise a `UserError` for parts that are not of one model."""
    widths = {T5XXL: ("d_model", params.context_width), CLIP_L: ("hidden_size", params.pooled_width)}
    for name, (key, expected) in widths.items():
        if name in parts:
            check_width(parts[name], f"--{name}", parts[name].config[key], expected, path)
    check_channels(parts["vae"], "--ae", params.in_channels // 4, path)
