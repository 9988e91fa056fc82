"""What a model family is: facts and pure steps. The loop, the datasets and the tools know families only through this."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from library.errors import UserError, suggest
from library.model_io import find_model, open_checkpoint
from library.model_signatures import detect_family, detect_folder
from library.offload_plan import SwapDivision
from library.quantization import LayerTable
from library.quantized_layers import Quantizer
from library.strategy_base import Conditioning, Strategies

if TYPE_CHECKING:
    from library.batch import TrainBatch
    from library.model_parts import Component, SaveSettings
    from library.objectives import Objective
    from library.option_groups import TrainOptions
    from networks.network_base import NetworkArch


@dataclass(frozen=True)
class LatentSpec:
    """Facts about the latent space. A bucket's sides are multiples of `stride * patch`, typed nowhere else.

    `scale` and `shift` map a *stored* latent z to a training one, (z - shift) * scale; the identity for families whose
    sd-scripts cache files are already scaled.
    """

    channels: int
    stride: int
    patch: int = 1
    scale: float = 1.0
    shift: float = 0.0

    @property
    def bucket_step(self) -> int:
        return self.stride * self.patch

    def normalize(self, stored: Tensor) -> Tensor:
        return (stored - self.shift) * self.scale

    def denormalize(self, latents: Tensor) -> Tensor:
        return latents / self.scale + self.shift


@dataclass
class ModelBundle:
    """The parts of one model. A part is read from disk when first used, and can be dropped to free its memory.

    Loaders are called once, with nothing; they return the module on `device` in `dtype`, in eval mode, frozen.
    `identity` names each part for cache fingerprints (path, size, time or content hash of what it was read from).
    """

    loaders: Mapping[str, Callable[[], nn.Module]]
    text_encoder_names: tuple[str, ...]
    device: torch.device
    dtype: torch.dtype
    """Of the frozen parts."""
    identity: Mapping[str, str] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What the loader found out and saving or metadata needs: source path, format, version, prediction type, unused tensors."""
    changed: set[str] = field(default_factory=set)
    """Parts that are no longer what is on disk (weights were merged into them)."""
    _parts: dict[str, nn.Module] = field(default_factory=dict)
    _aside: dict[str, nn.Module] = field(default_factory=dict)

    def part(self, name: str) -> nn.Module:
        if name not in self._parts:
            aside = self._aside.pop(name, None)
            self._parts[name] = self.loaders[name]() if aside is None else aside.to(self.device)
        return self._parts[name]

    def loaded(self, name: str) -> bool:
        return name in self._parts

    def release(self, name: str) -> None:
        """Free the device of a part. The next use reads it again; a changed one waits in main memory."""
        part = self._parts.pop(name, None)
        if part is not None and name in self.changed:
            self._aside[name] = part.to("cpu")

    @property
    def denoiser(self) -> nn.Module:
        return self.part("denoiser")

    @property
    def vae(self) -> nn.Module:
        return self.part("vae")

    @property
    def text_encoders(self) -> dict[str, nn.Module]:
        return {name: self.part(name) for name in self.text_encoder_names}


@dataclass(frozen=True)
class SampleStart:
    """Pictures that sampling begins from."""

    latents: Tensor
    """Normalized, [B, C, h, w]."""
    strength: float
    """Share of the steps that are made, more than 0: they are noised as much as the first of these begins at. 1: all."""

    def skipped(self, steps: int) -> int:
        """How many of `steps` are left out; one at least is made."""
        return steps - max(1, int(steps * self.strength))


@dataclass(frozen=True)
class SampleRequest:
    """Pictures of one size, made together: their encoded prompts, a row for each, and what all of them share."""

    positive: Conditioning
    negative: Conditioning
    width: int
    height: int
    steps: int
    guidance: float
    sampler: str
    seeds: tuple[int, ...]
    """Of each picture: its noise is that of its seed, whatever pictures are made with it."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """The prompt line's family options (`flow_shift`, `renorm_cfg`, ...)."""
    start: SampleStart | None = None
    """None: noise alone."""

    @property
    def count(self) -> int:
        return len(self.seeds)

    def both(self, device: torch.device | str) -> Any:
        """All positive rows, then all negative ones: what `sampling.guided_pair` asks for, of which an unguided model is shown
        the first half."""
        rows = [side.rows(index) for side in (self.positive, self.negative) for index in range(self.count)]
        return type(self.positive).collate(rows).to(device)


class ModelFamily(ABC):
    """One model family. Owns no weights and no run state, so one process can hold several."""

    name: ClassVar[str]
    """Key in `FAMILIES`."""
    title: ClassVar[str]
    """For people: "Stable Diffusion 1.x/2.x"."""
    scripts: ClassVar[Mapping[str, str]]
    """What is trained -> the script that does it: {"network": "train_network.py", ...}."""
    arch: ClassVar[NetworkArch]
    quantized_layers: ClassVar[LayerTable | None] = None
    """Which layers of a frozen denoiser can be kept in 8 or 4 bits; None where nobody has chosen them yet."""
    usual_side: ClassVar[int] = 1024
    """Width and height, in pixels, of pictures for which nobody says any."""

    @abstractmethod
    def latent(self, options: TrainOptions) -> LatentSpec:
        """Facts about the latent space of the model `options` names."""

    @abstractmethod
    def check(self, options: TrainOptions) -> None:
        """Look at the files' headers only; raise `UserError` for a contradiction or a missing file. Nothing is loaded yet."""

    @abstractmethod
    def source_format(self, options: TrainOptions) -> str:
        """Of the model `options` names, from headers alone: see `save_checkpoint`. What is trained is saved in it, too."""

    @abstractmethod
    def load(
        self,
        options: TrainOptions,
        *,
        device: torch.device,
        dtype: torch.dtype,
        learning: Mapping[str, torch.dtype] | None = None,
        quantizers: Mapping[str, Quantizer] | None = None,
    ) -> ModelBundle:
        """Denoiser, text encoders by name, VAE; each read when first used.

        dtype: of what stays frozen; learning: of each part that learns, by name; quantizers: of each part that has one.
        """

    def open_denoiser(self, path: Path) -> Component:
        """The denoiser of the model at `path` (a file or a diffusers folder), for tools that look at nothing else."""
        raise UserError(f"tools cannot open the denoiser of {self.title} yet.")

    def open_parts(self, path: Path, others: Mapping[str, Path]) -> Mapping[str, Component]:
        """The parts that are in the model at `path`, and those in the files `others`, by part; for tools."""
        if others:
            raise UserError(f"{self.title} has all parts in one file or folder. Leave out {', '.join(others)}.")
        return {"denoiser": self.open_denoiser(path)}

    @abstractmethod
    def strategies(self, options: TrainOptions) -> Strategies:
        """The four strategies, as values; data loader workers get them by pickling."""

    @abstractmethod
    def objective(self, options: TrainOptions) -> Objective: ...

    @abstractmethod
    def predict(
        self, denoiser: nn.Module, x_t: Tensor, t: Tensor, cond: Any, batch: TrainBatch | None, options: TrainOptions
    ) -> Tensor:
        """x_t [B, C, h, w], t [B] -> the objective's target, same shape. Sign, time direction and packing stay in here.

        `batch` carries size conditioning in training; None when sampling a preview.
        """

    @abstractmethod
    def sample(self, denoiser: nn.Module, request: SampleRequest, options: TrainOptions, device: torch.device) -> Tensor:
        """Normalized latents of the request's pictures, [B, C, h, w]; runs `predict`, the very function that is trained."""

    @abstractmethod
    def decode(self, vae: nn.Module, latents: Tensor, options: TrainOptions) -> Tensor:
        """Normalized latents [B, C, h, w] -> pictures [B, 3, H, W] in [-1, 1], float32, on the VAE's device."""

    @abstractmethod
    def enable_gradient_checkpointing(self, part: str, module: nn.Module) -> None: ...

    def unused_modules(self, part: str, module: nn.Module) -> tuple[nn.Module, ...]:
        """What of a part nothing that is trained depends on: it gets no gradient, and stays as it is."""
        return ()

    def own_group(self, part: str, parameter: str, options: TrainOptions) -> tuple[str, float] | None:
        """Log name and learning rate of a parameter that has a rate of its own in full fine-tuning; 0 leaves it as it is."""
        return None

    def head_widths(self, options: TrainOptions) -> Sequence[int]:
        """Widths of the denoiser's attention heads, from headers alone; none where the family does not know them."""
        return ()

    def swap_division(self, options: TrainOptions) -> SwapDivision | None:
        """How `--blocks_to_swap` divides among the denoiser's blocks, from headers alone: the groups of its `block_groups()`.
        None for families whose denoiser is not a `Denoiser`."""
        return None

    @abstractmethod
    def save_checkpoint(self, bundle: ModelBundle, path: Path, settings: SaveSettings) -> None:
        """A full checkpoint under its published key names.

        Writes to `path` only (a file, or a folder for the diffusers formats and, with `max_shard_size`, for safetensors); the
        caller makes that atomic.
        """

    @abstractmethod
    def base_model_version(self, options: TrainOptions) -> str:
        """`ss_base_model_version`, for example `sd_v1`."""

    def preview_guidance(self, options: TrainOptions) -> float:
        """Classifier-free guidance of previews whose prompt line names none."""
        return 7.5

    def metadata(self, options: TrainOptions) -> dict[str, Any]:
        """The family's own `ss_` keys of saved networks."""
        return {}

    def prediction_type(self, options: TrainOptions) -> str | None:
        """`modelspec.prediction_type`, "epsilon" or "v"; None for families that have no such choice."""
        return None

    @abstractmethod
    def modelspec_architecture(self, options: TrainOptions) -> str:
        """`modelspec.architecture` of a full checkpoint, for example `stable-diffusion-v1`; adapters add `/lora`."""


FAMILIES: dict[str, str] = {
    "sd": "library.sd_train_utils:SdFamily",
    "sdxl": "library.sdxl_train_utils:SdxlFamily",
    "flux": "library.flux_train_utils:FluxFamily",
    "lumina": "library.lumina_train_utils:LuminaFamily",
    "sd3": "library.sd3_train_utils:Sd3Family",
}
"""Family name -> where its class is. Read when asked for, so naming a family costs no import."""


def family_class(name: str) -> type[ModelFamily]:
    """The class of the family called `name`; a `UserError` names the known ones."""
    if name not in FAMILIES:
        raise UserError(f"unknown model family '{name}'. Known: {', '.join(FAMILIES)}.{suggest(name, FAMILIES)}")
    module, _, attribute = FAMILIES[name].partition(":")
    found: type[ModelFamily] = getattr(importlib.import_module(module), attribute)
    return found


class DetectedFamily(NamedTuple):
    family: str
    """Key in `FAMILIES`."""
    title: str


def family_trained_by(script: str) -> str | None:
    """Key in `FAMILIES` of the family that `script` trains; None where there is none, or the script has no name."""
    return next((name for name in FAMILIES if script and script in family_class(name).scripts.values()), None)


def detected_family(model: str, flag: str) -> DetectedFamily:
    """The family of the model that `model` names (a file, a diffusers folder or a hub id, given as `flag`), from headers alone.

    Raises `UserError` for what is no whole model of a known family.
    """
    path = find_model(model, flag, allow_patterns=("model_index.json",))
    found = detect_folder(path) if path.is_dir() else detect_family(open_checkpoint(path))
    if found is None:
        raise UserError(f"{flag} {model}: not a model this program knows. Known: {', '.join(FAMILIES)}.")
    name = family_trained_by(found.script)
    if name is not None:
        return DetectedFamily(name, found.title)
    raise UserError(f"{flag} {model} is {found.title}. Give a whole model of one of these families: {', '.join(FAMILIES)}.")
