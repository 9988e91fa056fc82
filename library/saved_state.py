"""States to resume from: everything a run needs in one folder, whole or not at all."""

from __future__ import annotations

import glob
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.checkpoint import atomic_write, output_stems
from library.errors import UserError
from library.state_parts import (
    WHOLE,
    Digest,
    Part,
    StateParts,
    digest_of,
    divided,
    join_optimizer,
    parts_in,
    read_part,
    storable,
)

logger = logging.getLogger(__name__)

STATE_FORMAT = 2
TENSORS_FILE, OPTIMIZER_FILE, TRAIN_STATE_FILE = "trainable.safetensors", "optimizer.pt", "train_state.json"
OPTIMIZER_TENSORS = "optimizer.safetensors"
"""Of a state in parts: what the optimizer has of each weight, which `OPTIMIZER_FILE` leaves out."""
AVERAGES_FILE = "averages.safetensors"
"""Beside them with `--ema`."""
IMAGE_LOSSES_FILE = "image_losses.json"
"""Beside them with `--log_image_losses`."""
MANIFEST_FILE = "manifest.json"
"""Size and BLAKE2b hash of every other file."""
STATE_FILES = (TENSORS_FILE, OPTIMIZER_FILE, TRAIN_STATE_FILE, MANIFEST_FILE)
FOREIGN_STATE_FILES = ("random_states_0.pkl", "optimizer.bin", "scheduler.bin")
"""What accelerate writes, and sd-scripts through it."""


@dataclass(frozen=True)
class SavedState:
    """A state as read from `folder`. Tensors are on the CPU."""

    folder: Path
    trainable: dict[str, Tensor]
    averages: dict[str, Tensor]
    """Of `--ema`; empty without."""
    optimizer: dict[str, Any]
    scheduler: dict[str, Any]
    scaler: dict[str, Any] | None
    train_state: dict[str, Any]
    image_losses: list[dict[str, Any]]
    """Of each process; empty without `--log_image_losses`."""


def save_state(
    folder: Path,
    *,
    trainable: Mapping[str, Tensor],
    averages: Mapping[str, Tensor],
    optimizer: Mapping[str, Any],
    scheduler: Mapping[str, Any],
    scaler: Mapping[str, Any] | None,
    train_state: Mapping[str, Any],
    image_losses: Sequence[Mapping[str, Any]] = (),
    parts: StateParts | None = None,
) -> None:
    """Write a state to resume from, whole or not at all; replaces one of the same name.

    `train_state` holds JSON values and at least `epoch` and `step`; sd-scripts' names for them are written too. parts: tensors
    that the processes have written already, instead of those here.
    """
    from safetensors.torch import save_file

    states = {"optimizer": dict(optimizer), "scheduler": dict(scheduler), "scaler": None if scaler is None else dict(scaler)}
    _check_plain(states, "state")
    record = {
        "format": STATE_FORMAT,
        "current_epoch": train_state["epoch"],
        "current_step": train_state["step"],
        "torch": torch.__version__,
        **train_state,
    }

    def write(temporary: Path) -> None:
        if parts is None:
            temporary.mkdir()
            save_file(storable(trainable), temporary / TENSORS_FILE)
            if averages:
                save_file(storable(averages), temporary / AVERAGES_FILE)
        else:
            parts.move_to(temporary)
        with (temporary / OPTIMIZER_FILE).open("wb") as file:
            torch.save(states, file)
        (temporary / TRAIN_STATE_FILE).write_text(json.dumps(record, indent=1), encoding="utf-8")
        if image_losses:
            (temporary / IMAGE_LOSSES_FILE).write_text(json.dumps(list(image_losses)), encoding="utf-8")
        manifest = _manifest(temporary, {} if parts is None else parts.digests)
        (temporary / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1), encoding="utf-8")

    atomic_write(folder, write)
    logger.info("saved state %s", folder)


def _check_plain(value: Any, where: str) -> None:
    """Raise for a value that a safe read (`weights_only`) would refuse: better now than when the state is needed."""
    if isinstance(value, Mapping):
        for key, entry in value.items():
            _check_plain(entry, f"{where}[{key!r}]")
    elif isinstance(value, (list, tuple, set)):
        for index, entry in enumerate(value):
            _check_plain(entry, f"{where}[{index}]")
    elif not isinstance(value, (Tensor, int, float, bool, str, bytes, complex, torch.dtype, torch.device, type(None))):
        raise UserError(
            f"this optimizer or schedule keeps a {type(value).__module__}.{type(value).__name__} in {where}, which cannot be "
            "saved safely. Train without --save_state, or choose another --optimizer_type or --lr_scheduler_type."
        )


def _manifest(folder: Path, known: Mapping[str, Digest] | None = None) -> dict[str, Digest]:
    """known: of files that need not be read again."""
    known = known or {}
    return {path.name: known.get(path.name) or digest_of(path) for path in sorted(folder.iterdir())}


def _check_manifest(folder: Path) -> None:
    """Raise `UserError` for a file that is not as it was written."""
    with _explained(folder / MANIFEST_FILE):
        wanted = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
        found = _manifest(folder)
        damaged = [name for name, entry in wanted.items() if found.get(name) != entry]
    if damaged:
        now, then = found.get(damaged[0], {}).get("bytes", 0), wanted[damaged[0]]["bytes"]
        raise UserError(
            f"--resume {folder}: {damaged[0]} is damaged: it is not what was saved ({then:,} bytes then, {now:,} now). "
            "Resume from another state."
        )


def newest_state(folder: Path, output_name: str | None) -> Path | None:
    """The newest whole state in `folder` of runs called `output_name`; says which ones it passes over, and why.

    It is the furthest one of the run that saved last: another run of that name may have got further, long ago.
    """
    paths = [path for name in output_stems(output_name) for path in folder.glob(f"{glob.escape(name)}-*state") if path.is_dir()]
    found: list[tuple[str, int, float, Path]] = []
    for path in paths:
        with _told_if_passed_over():
            record = read_train_state(path)
            found.append((record.get("run", ""), record["step"], path.stat().st_mtime, path))
    latest = {run: max(time for other, _, time, _ in found if other == run) for run, *_ in found}
    for run, step, _, path in sorted(found, key=lambda entry: (latest[entry[0]], *entry), reverse=True):
        with _told_if_passed_over():
            _check_manifest(path)
            further = [other for name, at, _, other in found if name != run and at > step]
            beside = f". {further[0].name} is further, but of an earlier run" if further else ""
            logger.info("--resume auto: going on from %s%s", path, beside)
            return path
    logger.info("--resume auto: no state in %s, so the run starts afresh", folder)
    return None


@contextmanager
def _told_if_passed_over() -> Iterator[None]:
    """A state that cannot be used is one line, and no error."""
    try:
        yield
    except UserError as error:
        logger.warning("--resume auto passes over %s", str(error).removeprefix("--resume "))


def load_state(folder: Path | str, own: Part = WHOLE) -> SavedState:
    """Read what `save_state` wrote, of its tensors a process's `own` part, however they were divided. `UserError` when there is
    nothing, something of another program, or a part is missing or damaged."""
    folder = Path(folder)
    record = read_train_state(folder)
    _check_manifest(folder)
    count = record.get("shards", 1)
    tensors = _tensors(folder, TENSORS_FILE, count, own)
    averages = _tensors(folder, AVERAGES_FILE, count, own)
    with _explained(folder / OPTIMIZER_FILE):
        states = torch.load(folder / OPTIMIZER_FILE, map_location="cpu", weights_only=True)
        kept = _tensors(folder, OPTIMIZER_TENSORS, count, own) if count > 1 else divided(states["optimizer"], own)
        join_optimizer(states["optimizer"], kept)
    image_losses = []
    if (folder / IMAGE_LOSSES_FILE).is_file():
        with _explained(folder / IMAGE_LOSSES_FILE):
            image_losses = json.loads((folder / IMAGE_LOSSES_FILE).read_text(encoding="utf-8"))
    return SavedState(
        folder, tensors, averages, states["optimizer"], states["scheduler"], states["scaler"], record, image_losses
    )


def _tensors(folder: Path, name: str, count: int, own: Part) -> dict[str, Tensor]:
    """The `own` part of those in so many files; none where there are no such files."""
    paths = [folder / Part(rank, count).file(name) for rank in range(count)]
    if not paths[0].is_file():
        return {}
    with _explained(paths[0]):
        return read_part(paths, own)


def read_train_state(folder: Path) -> dict[str, Any]:
    """`train_state.json` alone, once the folder is known to be one of ours and complete."""
    if not folder.is_dir():
        near = [path.name for path in sorted(folder.parent.glob("*-state"))] if folder.parent.is_dir() else []
        found = f" There are: {', '.join(near)}." if near else ""
        raise UserError(f"--resume {folder}: no such folder.{found}")
    missing = [name for name in STATE_FILES if not (folder / name).is_file()]
    if TENSORS_FILE in missing and parts_in(folder, TENSORS_FILE):
        missing.remove(TENSORS_FILE)
    if missing and any((folder / name).exists() for name in FOREIGN_STATE_FILES):
        raise UserError(_explain_foreign(folder))
    if missing:
        raise UserError(f"--resume {folder}: not a complete state, {', '.join(missing)} is missing. Resume from another one.")
    with _explained(folder / TRAIN_STATE_FILE):
        record = json.loads((folder / TRAIN_STATE_FILE).read_text(encoding="utf-8"))
    if not isinstance(record, dict) or record.get("format") != STATE_FORMAT:
        version = record.get("format") if isinstance(record, dict) else type(record).__name__
        raise UserError(
            f"--resume {folder}: this is a state of format {version}, and this program reads {STATE_FORMAT}. "
            "Use the version that wrote it."
        )
    return record


def _explain_foreign(folder: Path) -> str:
    """What can be done with a state of sd-scripts, which counts updates in `train_state.json`."""
    try:
        step = int(json.loads((folder / TRAIN_STATE_FILE).read_text(encoding="utf-8"))["current_step"])
    except (OSError, ValueError, KeyError, TypeError):  # older ones, and those of other programs, have none
        step = None
    when = f" after step {step}" if step else ""
    return (
        f"--resume {folder}: this state was written by sd-scripts or accelerate{when}. Its weights and its step can be "
        "carried over; the optimizer's state, the place in the data and the random numbers cannot, as it does not say enough "
        "about them. Start from the model saved beside it: --network_weights FILE for an adapter, "
        f"--pretrained_model_name_or_path FILE for a fine-tuned model, each with --initial_step {step or 'N'}."
    )


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """A file that cannot be read becomes a `UserError` that names it."""
    from pickle import UnpicklingError

    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, RuntimeError, EOFError, KeyError, UnpicklingError, SafetensorError) as error:
        summary = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"--resume: {path} is damaged or incomplete ({summary}). Resume from another state.") from error


# ---- which options a state depends on ----------------------------------------------------------------------------------

NEUTRAL_GROUPS = frozenset({"output", "state", "hub", "logging", "sampling", "metadata", "run", "validation", "cache"})
"""Option groups that do not change what is learned; a state says by itself how many readings of captions a cache keeps."""

NEUTRAL_OPTIONS = frozenset({
    "data.debug_dataset", "data.strict_data", "family.blocks_to_swap", "family.split_mode", "full.max_shard_size",
    "memory.shard_weights", "memory.vae_batch_size", "memory.lowram", "memory.highvram", "memory.pinned_memory_limit",
    "model.tokenizer_cache_dir", "training.max_data_loader_n_workers",
    "training.persistent_data_loader_workers", "training.ddp_timeout", "training.ddp_gradient_as_bucket_view",
    "training.ddp_static_graph",
})  # fmt: skip
"""Options of the other groups that do not either."""


def result_options(options: Any) -> dict[str, str]:
    """`group.flag` -> value as text, for every option that changes what is learned. Goes into a state's `options`."""
    from dataclasses import fields, is_dataclass

    found = {}
    for group in fields(options):
        values = getattr(options, group.name)
        if group.name not in NEUTRAL_GROUPS and is_dataclass(values):
            found.update({f"{group.name}.{f.name}": str(getattr(values, f.name)) for f in fields(values)})
    return found


def changed_options(saved: Mapping[str, Any], options: Any) -> dict[str, str]:
    """`group.flag` -> `--seed was 1 and is now 2`, for each option that differs from those in a state's `options`."""
    then, now = saved.get("options", {}), result_options(options)
    return {
        key: f"--{key.split('.', 1)[1]} was {then.get(key, 'not known')} and is now {now.get(key, 'not known')}"
        for key in sorted((then.keys() | now.keys()) - NEUTRAL_OPTIONS)
        if then.get(key) != now.get(key)
    }
