"""Writing the checkpoints of UNet families: one file in the original (LDM) layout, or a diffusers folder."""

from __future__ import annotations

import functools
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from library.clip_tokenizer import copy_tokenizer
from library.errors import UserError
from library.key_layout import IDENTITY, KeyMap
from library.model_parts import Component, SaveSettings, cast, write_config, write_json, write_tensors
from library.quantized_layers import QuantizedLayer
from library.sharding import write_whole
from library.unet_names import unet_key_map_for
from library.unet_parts import UNET_PREFIX, UnetModel, unet_config
from library.vae_parts import VAE_PREFIX, vae_key_map

SINGLE_FILE_FORMATS = ("safetensors", "ckpt")
FOLDER_FORMATS = ("diffusers", "diffusers_safetensors")
_FOLDERS = {"denoiser": "unet"}
"""Part -> its folder in a diffusers model, where the two differ."""
_STEM = "diffusion_pytorch_model"


@dataclass(frozen=True)
class UnetCheckpoint(ABC):
    """What is saved: a model as it was found, with the parts that have been loaded since.

    A part that is not in `modules`, or has not changed, is read from where it came from: it may run in less precision than
    it is stored in. So is the VAE, which is never trained.
    """

    model: UnetModel
    modules: Mapping[str, nn.Module]
    v_prediction: bool
    zero_terminal_snr: bool
    tokenizers: Mapping[str, Path]
    """Folder in a diffusers model -> where the tokenizer is that goes into it."""

    index: ClassVar[Mapping[str, Any]]
    """What a diffusers folder's model_index.json says beside the parts that all UNet families have."""

    @abstractmethod
    def text_layout(self, name: str) -> tuple[str, KeyMap]:
        """(prefix, table) of a text encoder in published files."""

    @abstractmethod
    def folder_text(self, name: str) -> tuple[str, KeyMap]:
        """(folder, table) of a text encoder in a diffusers model."""

    def unused(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors that other programs expect beside the model's own, where there is no single file to take them from."""
        return {}

    def markers(self) -> dict[str, bool]:
        """Empty tensors of a single file that say how the model was trained -> whether they belong there."""
        return {}

    def write(self, path: Path, settings: SaveSettings) -> None:
        """Tensors that no part uses stay as they were."""
        metadata = settings.metadata
        if settings.format == "safetensors":
            tensors = self.ldm_tensors(settings.dtype)
            write_whole(tensors, path, metadata=metadata, max_shard_size=settings.max_shard_size)
        elif settings.format == "ckpt":
            counters = {key: int(metadata.get(f"ss_{name}", 0)) for key, name in (("epoch", "epoch"), ("global_step", "steps"))}
            torch.save({"state_dict": self.ldm_tensors(settings.dtype), **counters}, path)
        elif settings.format in FOLDER_FORMATS:
            self.write_folder(path, settings)
        else:
            raise UserError(f"unknown format '{settings.format}'. Known: {', '.join(SINGLE_FILE_FORMATS + FOLDER_FORMATS)}.")

    def part(self, name: str, dtype: torch.dtype | None) -> dict[str, Tensor]:
        """A part's tensors under our names, on the CPU."""
        component = self.model.parts[name]
        module = self.modules.get(name) if name != "vae" else None
        if module is not None and not _unchanged(component, module):
            tensors = {key: value.detach().to("cpu") for key, value in module.state_dict().items()}
        else:
            tensors = {key: component.tensor(key) for key in component.names()}
        return {key: cast(value, dtype) for key, value in tensors.items()}

    # ---- one file ----------------------------------------------------------------------------------------------------

    def ldm_tensors(self, dtype: torch.dtype | None) -> dict[str, Tensor]:
        """Every tensor under its LDM name; those of the source that no part uses are as they were."""
        tensors: dict[str, Tensor] = {}
        for name, component in self.model.parts.items():
            prefix, key_map = self._layout(name, component)
            made = key_map.to_theirs(self.part(name, dtype))
            tensors.update({prefix + key: value.contiguous() for key, value in made.items()})
        whole = self.model.whole
        if whole is None:
            tensors |= self.unused(tensors)
        else:
            for key in whole:
                if key not in tensors:
                    if self._own("vae") or not key.startswith(VAE_PREFIX):
                        tensors[key] = whole.get(key)
                elif tensors[key].shape != whole.shape(key):  # 1x1 convolutions, which some files hold as matrices
                    tensors[key] = tensors[key].reshape(whole.shape(key))
        for marker, belongs in self.markers().items():
            if belongs:
                tensors.setdefault(marker, torch.zeros(0))
            else:
                tensors.pop(marker, None)
        return tensors

    def _own(self, name: str) -> bool:
        """Whether a part comes from the model's own single file."""
        return self.model.whole is not None and self.model.parts[name].source.path == self.model.whole.path

    def _layout(self, name: str, component: Component) -> tuple[str, KeyMap]:
        """(prefix, table): the source file's own where there is one, else the published one."""
        if self._own(name):
            return component.source.prefix, component.key_map
        if name == "denoiser":
            return UNET_PREFIX, unet_key_map_for(component.config)
        if name == "vae":
            return VAE_PREFIX, vae_key_map(len(component.config["block_out_channels"]))
        return self.text_layout(name)

    # ---- a folder ----------------------------------------------------------------------------------------------------

    def write_folder(self, path: Path, settings: SaveSettings) -> None:
        path.mkdir(parents=True, exist_ok=True)
        write = functools.partial(write_tensors, safe=settings.safe, max_shard_size=settings.max_shard_size)
        for name, component in self.model.parts.items():
            is_text = name not in ("denoiser", "vae")
            folder_name, names = self.folder_text(name) if is_text else (_FOLDERS.get(name, name), IDENTITY)
            folder = path / folder_name
            folder.mkdir(exist_ok=True)
            write_config(component.make(component.config), folder)
            tensors = names.to_theirs(self.part(name, settings.dtype))
            stem = ("model" if settings.safe else "pytorch_model") if is_text else _STEM
            write(tensors, folder / stem, metadata=settings.metadata if name == "denoiser" else {})
        for folder_name, source in self.tokenizers.items():
            self.write_tokenizer(source, path / folder_name)
        scheduler = self._scheduler()
        write_json(path / "scheduler" / "scheduler_config.json", scheduler)
        write_json(path / "model_index.json", _model_index(self.index, scheduler["_class_name"]))

    def write_tokenizer(self, source: Path, target: Path) -> None:
        copy_tokenizer(source, target)

    def _scheduler(self) -> dict[str, Any]:
        """The source folder's scheduler, or DDIM, with what was really trained."""
        own = self.model.path / "scheduler" / "scheduler_config.json"
        config: dict[str, Any] = json.loads(own.read_text(encoding="utf-8")) if own.is_file() else dict(_DDIM)
        config["prediction_type"] = "v_prediction" if self.v_prediction else "epsilon"
        if self.zero_terminal_snr:
            config |= {**_DDIM, "prediction_type": config["prediction_type"], "rescale_betas_zero_snr": True}
            config["timestep_spacing"] = "trailing"
        elif config.get("rescale_betas_zero_snr"):
            config["rescale_betas_zero_snr"] = False
        return {"_class_name": _DDIM["_class_name"], **config}


def _unchanged(component: Component, module: nn.Module) -> bool:
    """Whether a loaded part is still what was read, but for the precision it is held in: then the file is more exact."""
    if any(isinstance(layer, QuantizedLayer) for layer in module.modules()):  # what is in few bits does not learn
        return True
    for key, value in module.state_dict().items():
        if not torch.equal(component.tensor(key).to(value.dtype), value.to("cpu")):
            return False
    return True


_DDIM = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def _model_index(own: Mapping[str, Any], scheduler: str) -> dict[str, Any]:
    import diffusers

    shared = {
        "_diffusers_version": diffusers.__version__,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "scheduler": ["diffusers", scheduler],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    return {**own, **shared}


NORM_GROUPS = 32
"""Of every Stable Diffusion in a single file; the tensors do not tell it."""


def check_single_file(model: UnetModel) -> None:
    """Raise a `UserError` when a single file could not hold what the folder `model` says of its sizes."""
    unet = model.unet
    if model.whole is not None:
        return
    for name, part in (("UNet", unet), ("VAE", model.vae)):
        groups = part.config.get("norm_num_groups", NORM_GROUPS)
        if groups != NORM_GROUPS:
            raise UserError(
                f"{model.path}: its {name} has {groups} norm groups, and a single file is read as having {NORM_GROUPS}. "
                "Save it as a folder: --save_model_as diffusers_safetensors."
            )
    assemblies, _ = unet_key_map_for(unet.config).assemblies(unet.source.keys())
    told = unet_config({key: unet.source.shape(made.keys[0]) for key, made in assemblies.items()})
    heads, expected = unet.config.get("attention_head_dim", 8), told["attention_head_dim"]
    levels = len(told["block_out_channels"])
    if _per_level(heads, levels) != _per_level(expected, levels):
        raise UserError(
            f"{model.path} has {heads} attention heads, and a single file of its shape is read as "
            f"having {expected}. Save it as a folder: --save_model_as diffusers_safetensors."
        )


def _per_level(value: int | list[int], levels: int) -> list[int]:
    return [value] * levels if isinstance(value, int) else list(value)
