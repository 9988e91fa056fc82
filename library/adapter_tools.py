"""What the tools for adapter files share: flags, reading any format of any family, and writing."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from library.checkpoint import atomic_write
from library.errors import UserError
from library.family_base import FAMILIES
from library.model_io import open_checkpoint
from library.model_layers import lasting_metadata
from networks.file_formats import FORMATS, KOHYA, PEFT, arch_named, arch_of, flat, own_layers, write_adapter
from networks.network_files import LayerTensors, by_layer, read_weights, refuse_unread
from networks.network_targets import NetworkArch
from networks.peft_folders import WEIGHTS, peft_parts

logger = logging.getLogger(__name__)

PRECISIONS: dict[str, torch.dtype] = {
    "float": torch.float32,
    "fp32": torch.float32,
    "float32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3fn": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
"""sd-scripts' names of what is written."""


def tool_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with what every tool knows."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def add_saving(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--save_precision", choices=PRECISIONS, help="of what is written; that of the first file unless given")
    parser.add_argument("--no_metadata", action="store_true", help="write only the metadata that loading needs")


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", help="what computes: cpu, cuda, ...")


def add_family(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--family", choices=FAMILIES, help="of the adapters, where their names leave it open")


def precision(name: str | None) -> torch.dtype | None:
    return None if name is None else PRECISIONS[name]


@dataclass(frozen=True)
class AdapterFile:
    """An adapter file, whole: it is small beside a model."""

    path: Path
    layers: LayerTensors
    """Under sd-scripts' names."""
    metadata: Mapping[str, str]
    arch: NetworkArch
    dtype: torch.dtype
    """What most of the file's numbers have."""

    def kept_metadata(self, given: argparse.Namespace) -> dict[str, str]:
        """Its metadata; with `--no_metadata`, what loading needs of it."""
        return minimal(self.metadata) if given.no_metadata else dict(self.metadata)

    def write(
        self, path: Path, layers: LayerTensors, *, format: str = KOHYA, dtype: torch.dtype | None = None, **metadata: str
    ) -> None:
        """`layers` as a file of this one's family, with its metadata and what is given beside."""
        write_adapter_file(path, layers, self.arch, {**self.metadata, **metadata}, format=format, dtype=dtype or self.dtype)


def read_adapter(path: Path, arch: NetworkArch | str | None = None) -> AdapterFile:
    """arch: the table of its family or the family's name, where it is known."""
    tensors = read_weights(path)
    metadata = adapter_metadata(path)
    if arch is None:
        arch = arch_of(by_layer(tensors), str(path), metadata)
    elif isinstance(arch, str):
        arch = arch_named(arch)
    sizes: dict[torch.dtype, int] = {}
    for tensor in tensors.values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.numel()
    dtype = max(sizes, key=lambda dtype: sizes[dtype])
    layers = own_layers(tensors, arch, str(path))
    refuse_unread(layers, str(path))
    return AdapterFile(path, layers, metadata, arch, dtype)


def adapter_metadata(path: Path) -> dict[str, str]:
    """`lasting_metadata` of the file or peft's folder."""
    file = peft_parts(path)[0] / WEIGHTS if path.is_dir() else path
    return lasting_metadata(open_checkpoint(file)) if file.suffix == ".safetensors" else {"format": "pt"}


def write_adapter_file(
    path: Path,
    layers: LayerTensors,
    arch: NetworkArch,
    metadata: Mapping[str, str],
    *,
    format: str = KOHYA,
    dtype: torch.dtype | None = None,
) -> None:
    """A file, or peft's folder, put in place in one move."""
    assert format in FORMATS
    if format != PEFT and path.suffix not in (".safetensors", ".ckpt", ".pt"):
        raise UserError(f"{path}: give a name that ends in .safetensors.")
    if format != KOHYA and format != PEFT and path.suffix != ".safetensors":
        raise UserError(f"{path}: under {format}'s names only .safetensors files are written.")
    tensors: dict[str, Tensor] = {name: tensor.contiguous() for name, tensor in flat(layers).items()}
    atomic_write(path, lambda temporary: write_adapter(temporary, tensors, metadata, arch, format, dtype))


def minimal(metadata: Mapping[str, str]) -> dict[str, str]:
    """What loading needs of an adapter's metadata."""
    kept = ("ss_v2", "ss_base_model_version", "ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_network_args")
    return {name: metadata[name] for name in ("format", *kept) if name in metadata}


def one_family(files: Iterable[AdapterFile]) -> NetworkArch:
    """Raise `UserError` for adapters of several families."""
    archs = {file.arch.name: file for file in files}
    if len(archs) > 1:
        told = ", ".join(f"{file.path} is for {name}" for name, file in archs.items())
        raise UserError(f"these adapters are for different models: {told}.")
    return next(iter(archs.values())).arch


# ---- flags of sd-scripts' tools that are taken and need nothing --------------------------------------------------------


def add_ignored(parser: argparse.ArgumentParser, switches: Iterable[str], values: Iterable[str] = ()) -> None:
    """sd-scripts' flags that say what is told from the files here, or how to compute; `report_ignored` names those given."""
    for name in switches:
        parser.add_argument(f"--{name}", action="store_true", help=argparse.SUPPRESS)
    for name in values:
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    parser.set_defaults(ignored=(*switches, *values))


def report_ignored(given: argparse.Namespace) -> None:
    names = [f"--{name}" for name in given.ignored if getattr(given, name)]
    if names:
        logger.warning("%s: no effect here: files tell what they are, and everything is computed in float32", ", ".join(names))


def strengths(ratios: Iterable[float] | None, count: int, usual: float = 1.0) -> list[float]:
    """`--ratios`, `usual` for each file where none is given."""
    found = [usual] * count if ratios is None else list(ratios)
    if len(found) != count:
        raise UserError(f"{len(found)} --ratios for {count} --models. Give one for each.")
    return found


def named_files(pairs: Iterable[str] | None, flag: str) -> dict[str, Path]:
    """`clip_l=clip.safetensors` ... as a dict."""
    found = {}
    for pair in pairs or ():
        name, equals, file = pair.partition("=")
        if not equals or not file:
            raise UserError(f"{flag} {pair}: give NAME=FILE.")
        found[name] = Path(file)
    return found


def network_facts(module: str, rank: int, conv_rank: int | None = None) -> dict[str, str]:
    """The metadata of an adapter that a tool has made: its algorithm and sizes."""
    facts = {"ss_network_module": module, "ss_network_dim": str(rank), "ss_network_alpha": str(float(rank))}
    if conv_rank:
        facts["ss_network_args"] = json.dumps({"conv_dim": conv_rank, "conv_alpha": float(conv_rank)})
    return facts
