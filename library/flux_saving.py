"""Writing fine-tuned FLUX.1 and Chroma: the transformer under its original names, or a whole diffusers folder."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.clip_tokenizer import copy_tokenizer
from library.errors import UserError
from library.flux_models import FluxParams
from library.flux_names import FLUX_DIFFUSERS
from library.flux_utils import CLIP_L, T5XXL, FluxModel
from library.model_io import read_json
from library.model_parts import SaveSettings, cast, write_config, write_json, write_tensors
from library.sharding import write_whole

FORMATS = ("safetensors", "ckpt", "diffusers", "diffusers_safetensors")


@dataclass(frozen=True)
class FluxCheckpoint:
    """What is saved: the trained transformer, and in a folder the parts as they were found. transformer None: unchanged."""

    model: FluxModel
    transformer: nn.Module | None
    tokenizers: Mapping[str, Path]

    def write(self, path: Path, settings: SaveSettings) -> None:
        """A single file holds the transformer alone, as sd-scripts writes it."""
        if settings.format == "safetensors":
            tensors = self.part("denoiser", settings.dtype)
            write_whole(tensors, path, metadata=settings.metadata, max_shard_size=settings.max_shard_size)
        elif settings.format == "ckpt":
            torch.save({"state_dict": self.part("denoiser", settings.dtype)}, path)
        elif settings.format in FORMATS:
            self.write_folder(path, settings)
        else:
            raise UserError(f"unknown format '{settings.format}'. Known: {', '.join(FORMATS)}.")

    def part(self, name: str, dtype: torch.dtype | None) -> dict[str, Tensor]:
        """A part's tensors under our names (the transformer's are the original ones), on the CPU."""
        component = self.model.parts[name]
        if name == "denoiser" and self.transformer is not None:
            tensors = {key: value.detach().to("cpu") for key, value in self.transformer.state_dict().items()}
        else:
            tensors = {key: component.tensor(key) for key in component.names()}
        return {key: cast(value, dtype).contiguous() for key, value in tensors.items()}

    def write_folder(self, path: Path, settings: SaveSettings) -> None:
        path.mkdir(parents=True, exist_ok=True)
        write = functools.partial(write_tensors, safe=settings.safe, max_shard_size=settings.max_shard_size)
        transformer = FLUX_DIFFUSERS.to_ours(self.part("denoiser", settings.dtype))
        (path / "transformer").mkdir(exist_ok=True)
        write_json(path / "transformer" / "config.json", transformer_config(self.model.params))
        write(transformer, path / "transformer" / "diffusion_pytorch_model", metadata=settings.metadata)
        for name, folder in _folders(self.model).items():
            (path / folder).mkdir(exist_ok=True)
            component = self.model.parts[name]
            write_config(component.make(component.config), path / folder)
            tensors = self.part(name, settings.dtype)
            stem = "diffusion_pytorch_model"
            if name != "vae":
                tensors, stem = component.key_map.to_theirs(tensors), "model" if settings.safe else "pytorch_model"
            write(tensors, path / folder / stem, metadata={})
        for name, source in self.tokenizers.items():
            copy_tokenizer(source, path / _tokenizer_folder(self.model, name))
        scheduler = "scheduler/scheduler_config.json"
        write_json(path / scheduler, self._found(scheduler) or self._scheduler())
        own_class = {key: value for key, value in self._found("model_index.json").items() if key == "_class_name"}
        write_json(path / "model_index.json", _model_index(self.model) | own_class)  # Kontext's is not FLUX.1's

    def _found(self, name: str) -> dict[str, Any]:
        """A JSON file of the diffusers folder that the model came from; empty where there is none."""
        path = self.model.path / name
        return read_json(path) if path.is_file() else {}

    def _scheduler(self) -> dict[str, Any]:
        """As the published model has it."""
        return {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "num_train_timesteps": 1000,
            "base_image_seq_len": 256,
            "max_image_seq_len": 4096,
            "base_shift": 0.5,
            "max_shift": 1.15,
            "shift": 1.0 if self.model.kind == "schnell" else 3.0,
            "use_dynamic_shifting": self.model.kind != "schnell",
        }


def _folders(model: FluxModel) -> dict[str, str]:
    """Part -> its folder in a diffusers model."""
    if model.kind == "chroma":
        return {"vae": "vae", T5XXL: "text_encoder"}
    return {"vae": "vae", CLIP_L: "text_encoder", T5XXL: "text_encoder_2"}


def _tokenizer_folder(model: FluxModel, name: str) -> str:
    return _folders(model)[name].replace("text_encoder", "tokenizer")


def transformer_config(params: FluxParams) -> dict[str, Any]:
    """diffusers' configuration of the transformer."""
    config: dict[str, Any] = {
        "_class_name": "ChromaTransformer2DModel" if params.approximator else "FluxTransformer2DModel",
        "patch_size": 1,
        "in_channels": params.in_channels,
        "num_layers": params.num_double_blocks,
        "num_single_layers": params.num_single_blocks,
        "attention_head_dim": params.head_width,
        "num_attention_heads": params.num_heads,
        "joint_attention_dim": params.context_width,
        "axes_dims_rope": list(params.axes),
    }
    if params.approximator is None:
        return config | {"pooled_projection_dim": params.pooled_width, "guidance_embeds": params.guidance_embed}
    sizes = params.approximator
    return config | {
        "approximator_num_channels": sizes.inputs,
        "approximator_hidden_dim": sizes.hidden,
        "approximator_layers": sizes.num_layers,
    }


def _model_index(model: FluxModel) -> dict[str, Any]:
    import diffusers

    chroma = model.kind == "chroma"
    index: dict[str, Any] = {
        "_class_name": "ChromaPipeline" if chroma else "FluxPipeline",
        "_diffusers_version": diffusers.__version__,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "transformer": ["diffusers", "ChromaTransformer2DModel" if chroma else "FluxTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
    }
    classes = {CLIP_L: ("CLIPTextModel", "CLIPTokenizer"), T5XXL: ("T5EncoderModel", "T5TokenizerFast")}
    for name, folder in _folders(model).items():
        if name in classes:
            encoder, tokenizer = classes[name]
            index[folder] = ["transformers", encoder]
            index[_tokenizer_folder(model, name)] = ["transformers", tokenizer]
    return index
