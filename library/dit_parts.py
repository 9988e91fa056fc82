"""Where the parts of a transformer model are: each in a file of its own, all in one file, or in a diffusers folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from torch import nn

from library.errors import UserError
from library.key_layout import IDENTITY, KeyMap
from library.model_io import Shapes, TensorSource, empty_module, find_model, open_checkpoint, open_component
from library.model_parts import Component, stamp
from library.model_signatures import detect_family, detect_folder, require_family
from library.offload_plan import SwapDivision
from library.vae_parts import VAE_PREFIX, open_vae

PREFIXES = ("model.diffusion_model.", "")
VAE, TEXT = "vae.", "text_encoders."
"""Where single files that hold everything have the rest."""


class DitParams(Protocol):
    """Sizes of a network."""

    @property
    def head_width(self) -> int: ...

    @property
    def swap_division(self) -> SwapDivision: ...


Params = TypeVar("Params", bound=DitParams, covariant=True)


@dataclass(frozen=True)
class DitModel(Generic[Params]):
    """A model on disk, before anything is loaded."""

    path: Path
    format: str
    """safetensors, ckpt or diffusers_safetensors: also the format it is saved in unless told otherwise."""
    params: Params
    parts: Mapping[str, Component]
    """denoiser, vae, and the text encoders by name, in the family's order."""


@dataclass(frozen=True)
class TextPart:
    """A text encoder on disk."""

    open: Callable[[Path, str], Component]
    """(file or folder, the flag that it was given as) -> the encoder."""
    folder: str
    """In a diffusers model."""
    prefix: str
    """In a single file that holds everything."""
    optional: bool = False
    """Whether a model may be without it."""

    @property
    def tokenizer_folder(self) -> str:
        """In a diffusers model."""
        return self.folder.replace("text_encoder", "tokenizer")


@dataclass(frozen=True)
class DitLayout:
    """How a family's files are laid out."""

    title: str
    script: str
    families: tuple[str, ...]
    """Of `model_signatures.SIGNATURES`."""
    first_key: str
    """A tensor that every transformer of the family has, by its original name."""
    folder_names: Callable[[TensorSource], KeyMap]
    """The transformer of a diffusers folder -> original names <-> those there."""
    network: Callable[[Any], nn.Module]
    """Sizes -> the network."""
    sizes: Callable[[Shapes], Any]
    """Shapes of tensors under original names -> sizes."""
    text_parts: Callable[[Any], Mapping[str, TextPart]]
    """Sizes -> the text encoders, by part."""
    vae_scale: float
    vae_shift: float
    """Of latents, where no configuration says it."""
    unused: tuple[str, ...] = field(default=(), kw_only=True)
    """Patterns of the transformer's tensors that may be there without being used."""
    vae_flag: str = field(default="ae", kw_only=True)
    """What a file with the autoencoder is given as."""
    hub_files: tuple[str, ...] = field(default=(), kw_only=True)
    """What is downloaded of a hub id."""

    def find(self, name: str | None) -> Path:
        """The model that `--pretrained_model_name_or_path` names."""
        if not name:
            raise UserError(
                "no base model: give --pretrained_model_name_or_path a checkpoint file, a diffusers folder or a hub id."
            )
        return find_model(name, "--pretrained_model_name_or_path", allow_patterns=self.hub_files)

    def open_transformer(self, path: Path) -> tuple[TensorSource, TensorSource | None]:
        """(the transformer under its original names, the whole file or None for a folder)."""
        if path.is_dir():
            if not (path / "model_index.json").is_file():
                raise UserError(f"{path} is a folder without model_index.json, so it is not a diffusers model. Give a file.")
            require_family(path, detect_folder(path), self.families, self.title, self.script)
            source = open_component(path / "transformer")
            return source.under_their_names(self.folder_names(source)), None
        whole = open_checkpoint(path)
        require_family(path, detect_family(whole), self.families, self.title, self.script)
        for prefix in PREFIXES:
            if f"{prefix}{self.first_key}" in whole:
                source = whole.under(prefix)
                if not prefix:
                    source = source.only(key for key in source if not key.startswith((TEXT, VAE, VAE_PREFIX)))
                return source, whole
        raise UserError(f"{path} lacks {self.first_key}: it is not a whole {self.title} transformer. Download it again.")

    def transformer(self, source: TensorSource) -> Component:
        """Of tensors under original names; its configuration is {"params": its sizes}."""
        return Component(source, IDENTITY, {"params": self.sizes(source.shapes())}, self.make, optional=self.unused)

    def make(self, config: Mapping[str, Any]) -> nn.Module:
        """The network without weights."""
        return empty_module(lambda: self.network(config["params"]))

    def open_denoiser(self, path: Path) -> Component:
        """The transformer of a file or a diffusers folder."""
        return self.transformer(self.open_transformer(path)[0])

    def open_parts(self, path: Path, others: Mapping[str, Path]) -> dict[str, Component]:
        """The transformer, and the text encoders that are in the same file or folder or in the files `others`."""
        source, whole = self.open_transformer(path)
        denoiser = self.transformer(source)
        known = self.text_parts(denoiser.config["params"])
        found, _ = self.text_encoders(path, whole, others, known)
        if unknown := others.keys() - found.keys():
            raise UserError(f"{path} has no part {min(unknown)}. Its text encoders: {', '.join(known)}.")
        return {"denoiser": denoiser, **found}

    def latent_scale(self, vae: Component) -> tuple[float, float]:
        """(scale, shift) of an autoencoder's latents; the family's where its configuration says none."""
        own = vae.config.get("shift_factor")
        return vae.config.get("scaling_factor", self.vae_scale), self.vae_shift if own is None else own

    def text_encoders(
        self, path: Path, whole: TensorSource | None, given: Mapping[str, Path], parts: Mapping[str, TextPart]
    ) -> tuple[dict[str, Component], list[str]]:
        """(those that there are, the flags of those that there are not). given: files by part, from flags of that name."""
        found: dict[str, Component] = {}
        missing = []
        for name, part in parts.items():
            if name in given:
                found[name] = part.open(given[name], f"--{name}")
            elif whole is None and (not part.optional or (path / part.folder).is_dir()):
                found[name] = part.open(path / part.folder, str(path))
            elif whole is not None and any(key.startswith(part.prefix) for key in whole):
                found[name] = part.open(path, str(path))
            elif not part.optional:
                missing.append(f"--{name}")
        return found, missing

    def all_parts(self, path: Path, given: Mapping[str, Path]) -> tuple[dict[str, Component], TensorSource | None]:
        """(the transformer and all other parts, the whole file or None for a folder). given: see `text_encoders`."""
        source, whole = self.open_transformer(path)
        denoiser = self.transformer(source)
        return {"denoiser": denoiser, **self._others(path, whole, given, self.text_parts(denoiser.config["params"]))}, whole

    def _others(
        self, path: Path, whole: TensorSource | None, given: Mapping[str, Path], parts: Mapping[str, TextPart]
    ) -> dict[str, Component]:
        """Text encoders and autoencoder: from their own files, else from the model's. One `UserError` lists all that lack."""
        found, missing = self.text_encoders(path, whole, given, parts)
        own = self.vae_flag
        inside = whole is None or any(f"{prefix}encoder.conv_in.weight" in whole for prefix in (VAE, VAE_PREFIX))
        if own in given or inside:
            flag = f"--{own}" if own in given else "--pretrained_model_name_or_path"
            found["vae"] = open_vae(
                given.get(own, path), flag=flag, title=self.title, scale=self.vae_scale, shift=self.vae_shift
            )
        else:
            missing.append(f"--{own}")
        if missing:
            raise UserError(
                f"{path} does not hold all parts of the model. Give {', '.join(missing)}, each a file or a folder, or give a "
                "diffusers folder that has all parts."
            )
        return found


def given_files(flags: object, names: tuple[str, ...]) -> dict[str, Path]:
    """The files of parts that flags of these names give."""
    return {name: find_model(value, f"--{name}") for name in names if (value := getattr(flags, name)) is not None}


def format_of(path: Path) -> str:
    """safetensors, ckpt or diffusers_safetensors: of a model as it was found, and as it is saved unless told otherwise."""
    return "diffusers_safetensors" if path.is_dir() else "safetensors" if path.suffix == ".safetensors" else "ckpt"


def files_now(path: Path, given: Mapping[str, Path]) -> tuple[Path, tuple[tuple[str, Path], ...], object]:
    """What a description of the model is cached under: its files, and what is another as soon as one of them has changed."""
    return path, tuple(given.items()), tuple(stamp(file) for file in (path, *given.values()))


def text_tensors(path: Path, prefix: str) -> TensorSource:
    """A text encoder's file, or its part of one that holds everything."""
    whole = open_checkpoint(path)
    inner = whole.under(prefix)
    return inner if inner.entries else whole


def what_it_is(source: TensorSource) -> str:
    """For messages about a file that is not what was asked for."""
    detected = detect_family(source)
    return f": it is {detected.title}" if detected else ""


def check_width(part: Component, flag: str, width: int, expected: int, transformer: Path) -> None:
    """Raise a `UserError` for a text encoder, given as `flag`, whose states are not as wide as the transformer takes them."""
    if width != expected:
        raise UserError(
            f"{flag} {part.source.path} is {width} wide, and the transformer {transformer} takes {expected}. Give the text "
            "encoder that the model was made with."
        )


def check_channels(vae: Component, flag: str, expected: int, transformer: Path) -> None:
    """The same for an autoencoder and its latents."""
    channels = vae.config.get("latent_channels", 4)
    if channels != expected:
        raise UserError(
            f"{flag} {vae.source.path} makes {channels} latent channels, and the transformer {transformer} takes {expected}. "
            "Give the autoencoder that the model was made with."
        )
