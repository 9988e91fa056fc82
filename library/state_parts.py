"""A saved state whose tensors are in parts, each written by the process that has it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from library.checkpoint import explained_full_disk
from library.errors import UserError
from library.offload_transport import overlapping

if TYPE_CHECKING:
    from library.processes import Processes

Digest = dict[str, Any]


@dataclass(frozen=True)
class StateParts:
    """Files that the processes have written, beside where the state will be."""

    folder: Path
    digests: Mapping[str, Digest]
    """Of each file, as a manifest has them."""

    def move_to(self, target: Path) -> None:
        os.rename(self.folder, target)


@dataclass(frozen=True)
class Part:
    """What one process has of every tensor, where `count` share it out by its first dimension, as `fully_shard` does."""

    rank: int = 0
    count: int = 1

    def of(self, tensor: Tensor) -> Tensor:
        """Of a whole one, in memory of its own. Numbers (counts of steps) are the same everywhere."""
        if self.count == 1 or tensor.dim() == 0:
            return tensor
        pieces = tensor.chunk(self.count)
        return pieces[self.rank].clone() if self.rank < len(pieces) else tensor[:0].clone()

    def file(self, name: str) -> str:
        """`trainable-00001-of-00002.safetensors` of process number 0 of two."""
        path = Path(name)
        return f"{path.stem}-{self.rank + 1:05d}-of-{self.count:05d}{path.suffix}" if self.count > 1 else name


WHOLE = Part()


def read_part(paths: Sequence[Path], own: Part) -> dict[str, Tensor]:
    """The `own` part of the tensors that are divided among these files, one tensor at a time."""
    from safetensors import safe_open

    if len(paths) == own.count:
        paths, own = [paths[own.rank]], WHOLE
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(path, "pt")) for path in paths]
        keys: list[str] = files[0].keys()
        return {key: own.of(_joined([file.get_tensor(key) for file in files])) for key in keys}


def _joined(pieces: Sequence[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 or pieces[0].dim() == 0 else torch.cat(list(pieces))


def divided(state: Mapping[str, Any], own: Part) -> dict[str, Tensor]:
    """The `own` part of what a whole optimizer's state has of each weight, by `number.name`."""
    return {} if own.count == 1 else {key: own.of(value) for key, value in split_optimizer(state)[1].items()}


def parts_in(folder: Path, name: str) -> list[Path]:
    path = Path(name)
    return sorted(folder.glob(f"{path.stem}-*-of-*{path.suffix}"))


def write_parts(folder: Path, files: Mapping[str, Mapping[str, Tensor]], processes: Processes) -> StateParts:
    """Have every process write its tensors of the state that will be in `folder`; files: by the name of a whole state's file.

    Ends in an error on all processes if one of them cannot: none may wait for it.
    """
    main = processes.everybody(os.getpid())[0]
    place = folder.with_name(f".tmp-{main}-{folder.name}.parts")
    found: dict[str, Digest] | None = None
    try:
        own = Part(processes.rank, processes.count)
        found = _write({own.file(name): one for name, one in files.items()}, place)
    finally:
        answers = processes.everybody(found)
    if None in answers:
        raise UserError(
            f"process {answers.index(None)} of {processes.count} could not write its part of {folder}, and says why. "
            "No state was saved."
        )
    digests = {name: digest for written in answers for name, digest in written.items()}
    absent = sorted(name for name in digests if processes.rank == 0 and not (place / name).is_file())
    if absent:
        raise UserError(
            f"{place} has no {absent[0]}, which another process has written: --output_dir has to be a folder that all machines "
            "of the run share."
        )
    return StateParts(place, digests)


def _write(files: Mapping[str, Mapping[str, Tensor]], folder: Path) -> dict[str, Digest]:
    from safetensors.torch import save_file

    with explained_full_disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, tensors in files.items():
            save_file(storable(tensors), folder / name)
    return {name: digest_of(folder / name) for name in files}


def storable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors that share no memory, as safetensors wants them. They may be neighbours in one buffer."""
    stored = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    names = list(stored)
    for piece in overlapping(list(stored.values())):
        stored |= {names[index]: stored[names[index]].clone() for index in piece[1:]}
    return stored


def digest_of(path: Path) -> Digest:
    """Size and hash of a file."""
    digest = blake2b(digest_size=16)
    with path.open("rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return {"bytes": path.stat().st_size, "blake2b": digest.hexdigest()}


def split_optimizer(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """An optimizer's state without the tensors it has of each weight, and these, by `number.name`."""
    tensors = {
        f"{number}.{name}": value
        for number, entries in state["state"].items()
        for name, value in entries.items()
        if isinstance(value, Tensor)
    }
    rest = {
        number: {name: value for name, value in entries.items() if not isinstance(value, Tensor)}
        for number, entries in state["state"].items()
    }
    return {**state, "state": rest}, tensors


def join_optimizer(state: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Put back what `split_optimizer` took out, in place."""
    for key, value in tensors.items():
        number, _, name = key.partition(".")
        state["state"][int(number)][name] = value
