"""Writing Stable Diffusion 1.x/2.x checkpoints: one file in the original (LDM) layout, or a diffusers folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from library import clip_parts, sd_models, vae_parts
from library.errors import UserError
from library.key_layout import KeyMap
from library.model_parts import Component, cast, write_config, write_json, write_tensors
from library.sd_utils import CLIP_PREFIX, OPEN_CLIP_PREFIX, UNET_PREFIX, VAE_PREFIX, SdModel

SINGLE_FILE_FORMATS = ("safetensors", "ckpt")
FOLDER_FORMATS = ("diffusers", "diffusers_safetensors")


@dataclass(frozen=True)
class SdCheckpoint:
    """What is saved: a model as it was found, with the parts that have been loaded since.

    A part that is not in `modules`, or has not changed, is read from where it came from: it may run in less precision than
    it is stored in. So is the VAE, which is never trained.
    """

    model: SdModel
    modules: Mapping[str, nn.Module]
    v_prediction: bool
    zero_terminal_snr: bool
    tokenizer_folder: Path | None

    def write(self, path: Path, *, format: str, dtype: torch.dtype | None, metadata: Mapping[str, str]) -> None:
        """dtype: of the parts' tensors; None keeps what they have. Tensors that no part uses stay as they were."""
        if format == "safetensors":
            save_file(self.ldm_tensors(dtype), path, metadata=dict(metadata))
        elif format == "ckpt":
            counters = {key: int(metadata.get(f"ss_{name}", 0)) for key, name in (("epoch", "epoch"), ("global_step", "steps"))}
            torch.save({"state_dict": self.ldm_tensors(dtype), **counters}, path)
        elif format in FOLDER_FORMATS:
            self.write_folder(path, safe=format == "diffusers_safetensors", dtype=dtype, metadata=metadata)
        else:
            raise UserError(f"unknown format '{format}'. Known: {', '.join(SINGLE_FILE_FORMATS + FOLDER_FORMATS)}.")

    def part(self, name: str, dtype: torch.dtype | None) -> dict[str, Tensor]:
        """A part's tensors under our names, on the CPU."""
        component = self.model.parts[name]
        module = self.modules.get(name) if name != "vae" else None
        if module is not None and not self._unchanged(component, module):
            tensors = {key: value.detach().to("cpu") for key, value in module.state_dict().items()}
        else:
            tensors = {key: component.tensor(key) for key in component.names()}
        return {key: cast(value, dtype) for key, value in tensors.items()}

    def _unchanged(self, component: Component, module: nn.Module) -> bool:
        """Whether a loaded part is still what was read, but for the precision it is held in: then the file is more exact."""
        for key, value in module.state_dict().items():
            if not torch.equal(component.tensor(key).to(value.dtype), value.to("cpu")):
                return False
        return True

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
            return tensors | (_unused_open_clip(tensors) if self.model.version == "v2" else {})
        for key in whole:
            if key not in tensors:
                if self._own("vae") or not key.startswith(VAE_PREFIX):
                    tensors[key] = whole.get(key)
            elif tensors[key].shape != whole.shape(key):  # 1x1 convolutions, which some files hold as matrices
                tensors[key] = tensors[key].reshape(whole.shape(key))
        return tensors

    def _own(self, name: str) -> bool:
        """Whether a part comes from the model's own single file."""
        return self.model.whole is not None and self.model.parts[name].source.path == self.model.whole.path

    def _layout(self, name: str, component: Component) -> tuple[str, KeyMap]:
        """(prefix, table): the source file's own where there is one, else the published one."""
        if self._own(name):
            return component.prefix, component.key_map
        if name == "denoiser":
            return UNET_PREFIX, sd_models.unet_key_map_for(component.config)
        if name == "vae":
            return VAE_PREFIX, vae_parts.vae_key_map(len(component.config["block_out_channels"]))
        if self.model.version == "v2":
            return OPEN_CLIP_PREFIX, sd_models.OPEN_CLIP_NAMES
        return CLIP_PREFIX, clip_parts.CLIP_NAMES

    # ---- a folder ----------------------------------------------------------------------------------------------------

    def write_folder(self, path: Path, *, safe: bool, dtype: torch.dtype | None, metadata: Mapping[str, str]) -> None:
        path.mkdir(parents=True, exist_ok=True)
        parts = {"unet": "denoiser", "vae": "vae", "text_encoder": "text_encoder"}
        for folder_name, name in parts.items():
            folder = path / folder_name
            folder.mkdir(exist_ok=True)
            component = self.model.parts[name]
            write_config(component.make(component.config), folder)
            tensors = self.part(name, dtype)
            stem = "diffusion_pytorch_model"
            if name == "text_encoder":
                tensors, stem = clip_parts.CLIP_NAMES.to_theirs(tensors), "model" if safe else "pytorch_model"
            write_tensors(tensors, folder / stem, safe=safe, metadata=metadata if name == "denoiser" else {})
        if self.tokenizer_folder is not None:
            shutil.copytree(self.tokenizer_folder, path / "tokenizer", dirs_exist_ok=True)
        write_json(path / "scheduler" / "scheduler_config.json", self._scheduler())
        write_json(path / "model_index.json", _model_index())

    def _scheduler(self) -> dict[str, Any]:
        """The source folder's scheduler, or DDIM, with what was really trained."""
        own = self.model.path / "scheduler" / "scheduler_config.json"
        config: dict[str, Any] = json.loads(own.read_text(encoding="utf-8")) if own.is_file() else dict(_DDIM)
        config["prediction_type"] = "v_prediction" if self.v_prediction else "epsilon"
        if self.zero_terminal_snr:
            config |= {**_DDIM, "prediction_type": config["prediction_type"], "rescale_betas_zero_snr": True}
            config["timestep_spacing"] = "trailing"
        return config


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


def _model_index() -> dict[str, Any]:
    import diffusers

    return {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": diffusers.__version__,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", _DDIM["_class_name"]],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def _unused_open_clip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What other programs expect in an SD2 file beyond the layers SD2 runs: the tower's last layer and its projection.

    Nobody reads their values (SD2 takes the last layer but one): the layer repeats the one before, the projection is 1.
    """
    start = f"{OPEN_CLIP_PREFIX}transformer.resblocks."
    last = max(int(key[len(start) :].split(".")[0]) for key in tensors if key.startswith(start))
    layer = {key: value for key, value in tensors.items() if key.startswith(f"{start}{last}.")}
    added = {key.replace(f"{start}{last}.", f"{start}{last + 1}."): value.clone() for key, value in layer.items()}
    embedding = tensors[f"{OPEN_CLIP_PREFIX}positional_embedding"]
    added[f"{OPEN_CLIP_PREFIX}text_projection"] = torch.eye(embedding.shape[1], dtype=embedding.dtype)
    added[f"{OPEN_CLIP_PREFIX}logit_scale"] = torch.tensor(1.0, dtype=embedding.dtype)
    return added


NORM_GROUPS = 32
"""Of every Stable Diffusion in a single file; the tensors do not tell it."""


def check_single_file(model: SdModel) -> None:
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
    assemblies, _ = sd_models.unet_key_map_for(unet.config).assemblies(unet.source.keys())
    told = sd_models.unet_config({key: unet.source.shape(made.keys[0]) for key, made in assemblies.items()})
    heads, expected = unet.config.get("attention_head_dim", 8), told["attention_head_dim"]
    levels = len(told["block_out_channels"])
    if _per_level(heads, levels) != _per_level(expected, levels):
        raise UserError(
            f"{model.path} has {heads} attention heads, and a single file of its shape is read as "
            f"having {expected}. Save it as a folder: --save_model_as diffusers_safetensors."
        )


def _per_level(value: int | list[int], levels: int) -> list[int]:
    return [value] * levels if isinstance(value, int) else list(value)
