"""Writing fine-tuned transformers: under their original names in one file, or a whole diffusers folder."""

from __future__ import annotations

import functools
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from library.clip_tokenizer import copy_tokenizer
from library.errors import UserError
from library.key_layout import KeyMap
from library.model_io import read_json
from library.model_loading import ModelOnDisk
from library.model_parts import SaveSettings, cast, write_config, write_json, write_tensors
from library.sharding import write_whole

FORMATS = ("safetensors", "ckpt", "diffusers", "diffusers_safetensors")
STEM = "diffusion_pytorch_model"

ModelT = TypeVar("ModelT", bound=ModelOnDisk)


@dataclass(frozen=True)
class DitCheckpoint(ABC, Generic[ModelT]):
    """What is saved: parts that were changed, the others as they were found."""

    model: ModelT
    modules: Mapping[str, nn.Module]
    """Those that were changed, by part."""
    tokenizers: Mapping[str, Path]
    """By text encoder, where each is now."""

    # ---- what a family says ------------------------------------------------------------------------------------------

    @abstractmethod
    def names(self) -> KeyMap:
        """Original names <-> those of the transformer in a diffusers folder."""

    @abstractmethod
    def transformer_config(self) -> dict[str, Any]:
        """diffusers' configuration of the transformer."""

    @abstractmethod
    def folders(self) -> Mapping[str, str]:
        """Part -> its folder in a diffusers model, but for the transformer's."""

    @abstractmethod
    def classes(self) -> Mapping[str, Any]:
        """What model_index.json says: the pipeline's class, and of each folder library and class."""

    @abstractmethod
    def scheduler(self) -> dict[str, Any]:
        """As the published model has it."""

    # ---- writing -----------------------------------------------------------------------------------------------------

    def write(self, path: Path, settings: SaveSettings) -> None:
        """Raises `UserError` for a format that is not known."""
        if settings.format == "safetensors":
            write_whole(
                self.single_file(settings.dtype), path, metadata=settings.metadata, max_shard_size=settings.max_shard_size
            )
        elif settings.format == "ckpt":
            torch.save({"state_dict": self.single_file(settings.dtype)}, path)
        elif settings.format in FORMATS:
            self.write_folder(path, settings)
        else:
            raise UserError(f"unknown format '{settings.format}'. Known: {', '.join(FORMATS)}.")

    def single_file(self, dtype: torch.dtype | None) -> dict[str, Tensor]:
        """The transformer; tensors of its file that it does not use stay as they were."""
        component = self.model.parts["denoiser"]
        unused = {
            key: component.source.get(key)
            for key in component.source
            if any(re.fullmatch(pattern, key) for pattern in component.optional)
        }
        return unused | self.part("denoiser", dtype)

    def part(self, name: str, dtype: torch.dtype | None) -> dict[str, Tensor]:
        """A part's tensors under our names (the transformer's are the original ones), on the CPU."""
        component = self.model.parts[name]
        if name in self.modules:
            module = self.modules[name]
            tensors = {key: value.detach().to("cpu") for key, value in module.state_dict().items()}
            tensors |= {key: component.tensor(key) for key, _ in module.named_buffers() if key in tensors}  # never learn
        else:
            tensors = {key: component.tensor(key) for key in component.names()}
        return {key: cast(value, dtype).contiguous() for key, value in tensors.items()}

    def write_folder(self, path: Path, settings: SaveSettings) -> None:
        path.mkdir(parents=True, exist_ok=True)
        write = functools.partial(write_tensors, safe=settings.safe, max_shard_size=settings.max_shard_size)
        transformer = self.names().to_ours(self.part("denoiser", settings.dtype))
        (path / "transformer").mkdir(exist_ok=True)
        write_json(path / "transformer" / "config.json", self.transformer_config())
        write(transformer, path / "transformer" / STEM, metadata=settings.metadata)
        for name, folder in self.folders().items():
            (path / folder).mkdir(exist_ok=True)
            component = self.model.parts[name]
            write_config(component.make(component.config), path / folder)
            tensors, stem = self.part(name, settings.dtype), STEM
            if name != "vae":
                tensors, stem = component.key_map.to_theirs(tensors), "model" if settings.safe else "pytorch_model"
            write(tensors, path / folder / stem, metadata={})
        for name, source in self.tokenizers.items():
            self.write_tokenizer(name, source, path / self.tokenizer_folder(name))
        scheduler = "scheduler/scheduler_config.json"
        write_json(path / scheduler, self._found(scheduler) or self.scheduler())
        own_class = {key: value for key, value in self._found("model_index.json").items() if key == "_class_name"}
        write_json(path / "model_index.json", self._index() | own_class)  # Kontext's is not FLUX.1's

    def write_tokenizer(self, name: str, source: Path, target: Path) -> None:
        """That of the text encoder `name`."""
        copy_tokenizer(source, target)

    def tokenizer_folder(self, name: str) -> str:
        return self.folders()[name].replace("text_encoder", "tokenizer")

    def _found(self, name: str) -> dict[str, Any]:
        """A JSON file of the diffusers folder that the model came from; empty where there is none."""
        path = self.model.path / name
        return read_json(path) if path.is_file() else {}

    def _index(self) -> dict[str, Any]:
        import diffusers

        shared = {
            "_diffusers_version": diffusers.__version__,
            "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
            "vae": ["diffusers", "AutoencoderKL"],
        }
        return {**shared, **self.classes()}
