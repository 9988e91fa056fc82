"""Stable Diffusion 3 and 3.5 on disk: what a file says it is, and its parts."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from library.dit_parts import DitLayout, DitModel, TextPart, check_channels, check_width, files_now, format_of, given_files
from library.dit_text import clip_part, t5_part
from library.errors import UserError
from library.key_layout import KeyMap
from library.model_io import TensorSource, count_indices, find_model
from library.model_parts import Component
from library.quantization import LayerTable
from library.sd3_models import Kind, Sd3, Sd3Params
from library.sd3_names import sd3_key_map
from library.strategy_dit import CLIP_G, CLIP_L, T5XXL

if TYPE_CHECKING:
    from library.option_groups import TrainOptions

SD3_LAYERS = LayerTable(quantized=(r"joint_blocks\..*",), sensitive=(r".*adaLN_modulation\.1",))
"""Embeddings, the table of positions and the last layer stay as they are."""

SCRIPT = "sd3_train_network.py"
TITLE = "Stable Diffusion 3 or 3.5"
VAE_SCALE, VAE_SHIFT = 1.5305, 0.0609

TEXT_PARTS: Mapping[str, TextPart] = {
    CLIP_L: clip_part(CLIP_L, "text_encoder", projected=True),
    CLIP_G: clip_part(CLIP_G, "text_encoder_2", projected=True),
    T5XXL: replace(t5_part("text_encoder_3"), optional=True),
}


def _folder_names(transformer: TensorSource) -> KeyMap:
    return sd3_key_map(count_indices(transformer.shapes(), r"transformer_blocks\.(\d+)\."))


LAYOUT = DitLayout(
    title=TITLE,
    script=SCRIPT,
    families=("sd3",),
    first_key="x_embedder.proj.weight",
    folder_names=_folder_names,
    network=Sd3,
    sizes=Sd3Params.of,
    text_parts=lambda params: TEXT_PARTS,
    vae_scale=VAE_SCALE,
    vae_shift=VAE_SHIFT,
    vae_flag="vae",
    hub_files=(
        "*.json", "*/*.json", "*/*.txt", "*/*.model", "transformer/*.safetensors", "vae/*.safetensors",
        "text_encoder/*.safetensors", "text_encoder_2/*.safetensors", "text_encoder_3/*.safetensors",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Sd3Model(DitModel[Sd3Params]):
    """Not every one has t5xxl among its parts."""

    whole: TensorSource | None
    """Every tensor of a single file, those no part uses too; None for a folder."""

    @property
    def kind(self) -> Kind:
        return self.params.kind

    @property
    def is_turbo(self) -> bool:
        """Whether the file's metadata says so: its tensors are those of any SD3.5 large."""
        said = {} if self.whole is None else self.whole.metadata
        return any("turbo" in said.get(f"modelspec.{key}", "").lower() for key in ("title", "architecture"))


def describe(options: TrainOptions) -> Sd3Model:
    """The model that `options` name, from headers and configuration files alone. Cached while the files are unchanged."""
    path = LAYOUT.find(options.model.pretrained_model_name_or_path)
    given = given_files(options.family, tuple(TEXT_PARTS))
    if options.model.vae is not None:
        given["vae"] = find_model(options.model.vae, "--vae")
    return _describe(*files_now(path, given))


@functools.lru_cache(maxsize=4)
def _describe(path: Path, given: tuple[tuple[str, Path], ...], state: object) -> Sd3Model:
    parts, whole = LAYOUT.all_parts(path, dict(given))
    params: Sd3Params = parts["denoiser"].config["params"]
    _check_sizes(path, params, parts)
    return Sd3Model(path, format_of(path), params, parts, whole)


def _check_sizes(path: Path, params: Sd3Params, parts: Mapping[str, Component]) -> None:
    """Raise a `UserError` for a transformer that takes more than a latent, and for parts that are not of one model."""
    if params.channels != params.out_channels:
        raise UserError(
            f"{path} takes {params.channels} channels and gives {params.out_channels}: a model that needs a picture beside the "
            f"caption. {SCRIPT} trains text-to-image models."
        )
    left, right = (parts[name].config for name in (CLIP_L, CLIP_G))
    if left["hidden_size"] > right["hidden_size"]:
        raise UserError(
            f"--clip_l {parts[CLIP_L].source.path} is {left['hidden_size']} wide and --clip_g {parts[CLIP_G].source.path} "
            f"{right['hidden_size']}. They are exchanged: CLIP-G is the wider one."
        )
    pooled = left["projection_dim"] + right["projection_dim"]
    if pooled != params.pooled_width or left["hidden_size"] + right["hidden_size"] > params.context_width:
        raise UserError(
            f"--clip_l {parts[CLIP_L].source.path} and --clip_g {parts[CLIP_G].source.path} give {pooled} numbers together, "
            f"and the transformer {path} takes {params.pooled_width}. Give the text encoders that the model was made with."
        )
    if T5XXL in parts:
        check_width(parts[T5XXL], f"--{T5XXL}", parts[T5XXL].config["d_model"], params.context_width, path)
    check_channels(parts["vae"], "--vae", params.channels, path)
