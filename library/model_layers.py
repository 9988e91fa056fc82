"""A model on disk by its layers: for tools that read and write one tensor at a time, whatever the family and the layout.

A layer is known by its key in adapter files. A file's tensor may be several layers (OpenCLIP's `in_proj_weight`), and a layer
several of a file's tensors (FLUX.1's `qkv` in a diffusers folder).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from library.checkpoint import atomic_write
from library.errors import UserError
from library.family_base import ModelFamily, family_class, family_trained_by
from library.key_layout import Rule
from library.model_io import WEIGHT_SUFFIXES, JoinedEntry, ScaledEntry, TensorEntry, TensorSource, open_checkpoint
from library.model_parts import Component
from library.model_signatures import detect_family, detect_folder
from library.streamed_safetensors import LazyTensor, write_streamed

Change = Callable[[str, Tensor], Tensor]
"""(layer key, float32 weight) -> the weight that is written."""
_WEIGHT = ".weight"


@dataclass(frozen=True)
class Place:
    """A tensor of a model's part: the layers in it, and which of a joined tensor's parts a file's tensor is."""

    part: str
    keys: tuple[str, ...]
    rule: Rule
    entry: TensorEntry
    piece: int | None = None

    def changed(self, change: Change, device: torch.device) -> Tensor:
        """What a file has in this place, float32, after `change` of each layer in it."""
        whole = self.entry.read(torch.float32).to(device)
        made = self.rule.join([change(key, self.rule.split(whole, part)) for part, key in enumerate(self.keys)])
        if self.piece is None:
            return made
        assert isinstance(self.entry, JoinedEntry) and self.entry.rule is not None
        return self.entry.rule.split(made, self.piece)


@dataclass(frozen=True)
class ModelOnDisk:
    """A file or a diffusers folder, and the parts of the model that are in it."""

    path: Path
    family: ModelFamily
    parts: Mapping[str, Component]

    @cached_property
    def layers(self) -> dict[str, tuple[Place, int]]:
        """By layer key: where it is, and which of the layers there."""
        return {key: (place, number) for place in self._places() for number, key in enumerate(place.keys)}

    def weight(self, key: str, device: torch.device | str = "cpu") -> Tensor:
        """Of one layer, float32."""
        place, number = self.layers[key]
        return place.rule.split(place.entry.read(torch.float32).to(device), number)

    def modules(self) -> dict[str, nn.Module]:
        """The parts that adapters know, without memory."""
        known = {group.part for group in self.family.arch.groups}
        return {name: part.make(part.config).to("meta") for name, part in self.parts.items() if name in known}

    def _places(self) -> Iterator[Place]:
        for name, component in self.parts.items():
            groups = [group for group in self.family.arch.groups if group.part == name]
            for key, entry in component.source.entries.items() if groups else ():
                origins, _ = component.key_map.origins([key])
                names = list(origins)
                if not names or any(not own.endswith(_WEIGHT) for own in names) or len(entry.shape) < 2:
                    continue
                keys = tuple(groups[0].key(own.removesuffix(_WEIGHT)) for own in names)
                yield Place(name, keys, next(iter(origins.values())).rule, entry)

    def places_in(self, source: TensorSource) -> dict[str, Place]:
        """By name of a tensor in the file `source`."""
        names = {_identity(entry): name for name, entry in source.entries.items()}
        found: dict[str, Place] = {}
        for place in self._places():
            pieces: dict[tuple[Path, int, int, int], int | None]
            if isinstance(place.entry, JoinedEntry):
                pieces = {_identity(part): piece for piece, part in enumerate(place.entry.parts)}
            else:
                pieces = {_identity(place.entry): None}
            for identity, piece in pieces.items():
                if identity in names:
                    found[names[identity]] = Place(place.part, place.keys, place.rule, place.entry, piece)
        return found


def _identity(entry: TensorEntry) -> tuple[Path, int, int, int]:
    return entry.file, entry.start, entry.offset, id(entry.held) if entry.held is not None else 0


def open_model(path: Path, others: Mapping[str, Path] | None = None) -> ModelOnDisk:
    """The model at `path`. others: files of further parts, by name. Raises `UserError` for what is no model known here."""
    if path.is_dir():
        detected = detect_folder(path) if (path / "model_index.json").is_file() else None
    else:
        detected = detect_family(open_checkpoint(path))
    name = None if detected is None else family_trained_by(detected.script)
    if name is not None:
        family = family_class(name)()
        return ModelOnDisk(path, family, family.open_parts(path, others or {}))
    told = "" if detected is None else f" It is {detected.title}."
    raise UserError(f"{path} is not a model that adapters can be merged into or taken from here.{told}")


def lasting_metadata(source: TensorSource) -> dict[str, str]:
    """What a file says about itself, but for hashes of its tensors, which change."""
    kept = {name: str(value) for name, value in source.metadata.items() if not name.endswith(("_hash", "hash_sha256"))}
    return {"format": "pt", **kept}


def weight_files(path: Path) -> list[Path]:
    """The files of a model's weights: `path` itself, or those in a folder."""
    return [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.suffix in WEIGHT_SUFFIXES)


def write_changed(
    model: ModelOnDisk,
    output: Path,
    changed: Sequence[str],
    change: Change,
    *,
    dtype: torch.dtype | None,
    device: torch.device | str = "cpu",
    metadata: Mapping[str, str] | None = None,
    source: Path | None = None,
) -> None:
    """Write the model in its own layout to `output`, the layers `changed` through `change`, one tensor in memory at a time.

    dtype: of what is written; None keeps each tensor's (bf16 of those that the file has in few bits). source: another of the
    model's files in place of the whole. Files are written as safetensors.
    """
    device, keys = torch.device(device), set(changed)

    def write(file: Path, target: Path) -> None:
        opened = open_checkpoint(file)
        places = model.places_in(opened)
        planned = {}
        for name, entry in opened.entries.items():
            place = places.get(name)
            touched = place is not None and not keys.isdisjoint(place.keys)
            kept = torch.bfloat16 if isinstance(entry, ScaledEntry) else entry.dtype
            wanted = dtype if dtype is not None and entry.dtype.is_floating_point else kept

            def make(place: Place | None = place if touched else None, entry: TensorEntry = entry) -> Tensor:
                return entry.read() if place is None else place.changed(change, device)

            planned[name] = LazyTensor(wanted, entry.shape, make)
        write_streamed(target, planned, {**lasting_metadata(opened), **(metadata or {})})

    start = source or model.path
    if start.is_file():
        if output.suffix != ".safetensors":
            raise UserError(f"{output}: models are written as .safetensors.")
        atomic_write(output, lambda temporary: write(start, temporary))
        return
    atomic_write(output, lambda temporary: _write_folder(start, temporary, write))


def _write_folder(source: Path, target: Path, write: Callable[[Path, Path], None]) -> None:
    """Weights as `write` makes them, all other files as they are."""
    weights = set(weight_files(source))
    for file in sorted(path for path in source.rglob("*") if path.is_file()):
        place = target / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        if file not in weights:
            shutil.copy2(file, place)
        elif file.suffix != ".safetensors":
            raise UserError(f"{file}: folders with other weights than safetensors are not written. Convert it first.")
        else:
            write(file, place)
