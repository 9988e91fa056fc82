"""Lumina-Image-2.0 on disk: its parts, and what their sizes say of each other."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from library.dit_parts import DitLayout, DitModel, TextPart, check_channels, check_width, files_now, format_of, given_files
from library.gemma2_parts import WHOLE_PREFIX, open_gemma2
from library.key_layout import KeyMap
from library.lumina_models import Lumina, LuminaParams
from library.lumina_names import lumina_key_map
from library.model_io import TensorSource
from library.model_parts import Component
from library.quantization import LayerTable

if TYPE_CHECKING:
    from library.lumina_options import LuminaOptions
    from library.option_groups import TrainOptions

GEMMA2 = "gemma2"
TITLE = "Lumina-Image-2.0"
VAE_SCALE, VAE_SHIFT = 0.3611, 0.1159
"""Of FLUX.1's autoencoder, which it has."""

LUMINA_LAYERS = LayerTable(
    quantized=(r"(layers|context_refiner|noise_refiner)\..*",),
    sensitive=(r".*adaLN_modulation\.1",),
)
"""Embeddings and the last layer stay as they are."""

UNUSED = (r"norm_final\.weight",)
"""A norm that the network was made with and never uses."""


def _folder_names(source: TensorSource) -> KeyMap:
    shapes = source.shapes()
    return lumina_key_map(shapes["layers.0.attn.to_q.weight"][0] // shapes["layers.0.attn.to_k.weight"][0])


_TEXT = {GEMMA2: TextPart(open_gemma2, "text_encoder", WHOLE_PREFIX)}

LAYOUT = DitLayout(
    title=TITLE,
    script="lumina_train_network.py",
    families=("lumina",),
    first_key="x_embedder.weight",
    folder_names=_folder_names,
    network=Lumina,
    sizes=LuminaParams.of,
    text_parts=lambda params: _TEXT,
    unused=UNUSED,
    vae_scale=VAE_SCALE,
    vae_shift=VAE_SHIFT,
    hub_files=(
        "*.json", "*/*.json", "*/*.model", "transformer/*.safetensors", "vae/*.safetensors", "text_encoder/*.safetensors",
    ),
)  # fmt: skip


LuminaModel = DitModel[LuminaParams]


def describe(options: TrainOptions) -> LuminaModel:
    """The model that `options` name, from headers and configuration files alone. Cached while the files are unchanged."""
    path = LAYOUT.find(options.model.pretrained_model_name_or_path)
    flags: LuminaOptions = options.family
    given = given_files(flags, (GEMMA2, "ae"))
    return _describe(*files_now(path, given))


@functools.lru_cache(maxsize=4)
def _describe(path: Path, given: tuple[tuple[str, Path], ...], state: object) -> LuminaModel:
    parts, _ = LAYOUT.all_parts(path, dict(given))
    params: LuminaParams = parts["denoiser"].config["params"]
    _check_sizes(path, params, parts)
    return LuminaModel(path, format_of(path), params, parts)


def _check_sizes(path: Path, params: LuminaParams, parts: Mapping[str, Component]) -> None:
    """Raise a `UserError` for parts that are not of one model."""
    check_width(parts[GEMMA2], f"--{GEMMA2}", parts[GEMMA2].config["hidden_size"], params.context_width, path)
    check_channels(parts["vae"], "--ae", params.in_channels, path)
