"""What a saved file says about itself: sd-scripts' `ss_*` keys and `modelspec.*` 1.0.1, in sd-scripts' value formats."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import mimetypes
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.errors import UserError

if TYPE_CHECKING:
    from library.option_groups import MetadataOptions, NetworkTrainOptions, TrainOptions

logger = logging.getLogger(__name__)

MINIMUM_KEYS = (
    "ss_v2",
    "ss_base_model_version",
    "ss_network_module",
    "ss_network_dim",
    "ss_network_alpha",
    "ss_network_args",
)
"""What other programs need to load a network; all that `--no_metadata` leaves beside modelspec."""

FROM_OPTIONS: dict[str, str] = {
    "ss_output_name": "output.output_name",
    "ss_training_comment": "output.training_comment",
    "ss_seed": "training.seed",
    "ss_network_module": "network.network_module",
    "ss_network_dim": "network.network_dim",
    "ss_network_alpha": "network.network_alpha",
    "ss_network_dropout": "network.network_dropout",
    "ss_scale_weight_norms": "network.scale_weight_norms",
    "ss_learning_rate": "optimizer.learning_rate",
    "ss_unet_lr": "network.unet_lr",
    "ss_text_encoder_lr": "network.text_encoder_lr",
    "ss_lr_scheduler": "schedule.lr_scheduler",
    "ss_lr_warmup_steps": "schedule.lr_warmup_steps",
    "ss_max_grad_norm": "optimizer.max_grad_norm",
    "ss_mixed_precision": "precision.mixed_precision",
    "ss_full_fp16": "precision.full_fp16",
    "ss_fp8_base": "precision.fp8_base",
    "ss_fp8_base_unet": "network.fp8_base_unet",
    "ss_gradient_checkpointing": "memory.recomputes",
    "ss_gradient_accumulation_steps": "training.gradient_accumulation_steps",
    "ss_lowram": "memory.lowram",
    "ss_cache_latents": "cache.latents",
    "ss_clip_skip": "training.clip_skip",
    "ss_max_token_length": "training.max_token_length",
    "ss_noise_offset": "noise.noise_offset",
    "ss_noise_offset_random_strength": "noise.noise_offset_random_strength",
    "ss_adaptive_noise_scale": "noise.adaptive_noise_scale",
    "ss_multires_noise_iterations": "noise.multires_noise_iterations",
    "ss_multires_noise_discount": "noise.multires_noise_discount",
    "ss_ip_noise_gamma": "noise.ip_noise_gamma",
    "ss_ip_noise_gamma_random_strength": "noise.ip_noise_gamma_random_strength",
    "ss_zero_terminal_snr": "noise.zero_terminal_snr",
    "ss_min_snr_gamma": "loss.min_snr_gamma",
    "ss_debiased_estimation": "loss.debiased_estimation_loss",
    "ss_loss_type": "loss.loss_type",
    "ss_huber_schedule": "loss.huber_schedule",
    "ss_huber_c": "loss.huber_c",
    "ss_huber_scale": "loss.huber_scale",
    "ss_prior_loss_weight": "loss.prior_loss_weight",
    "ss_caption_dropout_rate": "data.caption_dropout_rate",
    "ss_caption_dropout_every_n_epochs": "data.caption_dropout_every_n_epochs",
    "ss_caption_tag_dropout_rate": "data.caption_tag_dropout_rate",
    "ss_face_crop_aug_range": "data.face_crop_aug_range",
    "ss_resize_interpolation": "data.resize_interpolation",
    "ss_validation_seed": "validation.validation_seed",
    "ss_validation_split": "validation.validation_split",
    "ss_validate_every_n_epochs": "validation.validate_every_n_epochs",
    "ss_validate_every_n_steps": "validation.validate_every_n_steps",
    "ss_max_validation_steps": "validation.max_validation_steps",
}
"""Key -> `group.flag` whose value it is."""


@dataclass(frozen=True)
class RunFacts:
    """What metadata tells beside the options: known once the model and the data are."""

    base_model_version: str
    architecture: str
    """modelspec's, without the `/lora` of an adapter."""
    v2: bool
    """What the model turned out to be, whether or not `--v2` was given."""
    prediction_type: str | None
    """modelspec's: "epsilon" or "v"; None for families that have no such choice."""
    resolution: tuple[int, int]
    """(width, height) in pixels, of the first data set."""
    optimizer: str
    """`optimizers.describe_optimizer`."""
    num_epochs: int
    max_train_steps: int
    started_at: float
    """Seconds since 1970."""
    session_id: int
    network_args: Mapping[str, Any] | None = None
    family: Mapping[str, Any] = field(default_factory=dict)
    """The family's own `ss_*` keys."""


def as_text(value: Any) -> str:
    """sd-scripts' format: Python's str, JSON for mappings and lists; a list of one is its entry."""
    if isinstance(value, Mapping):
        return json.dumps(dict(value))
    if isinstance(value, (list, tuple)):
        return as_text(value[0]) if len(value) == 1 else json.dumps(list(value))
    return str(value)


def network_metadata(
    options: NetworkTrainOptions, facts: RunFacts, data: Mapping[str, str], base: BaseHashes
) -> dict[str, str]:
    """The `ss_*` keys of a network, but for those of one file (`at_save`). Waits for `base`.

    data: `TrainData.metadata()`. With `--no_metadata` only the keys that loading needs.
    """
    values: dict[str, Any] = {key: _option(options, path) for key, path in FROM_OPTIONS.items()}
    values |= {
        "ss_session_id": facts.session_id,
        "ss_training_started_at": facts.started_at,
        "ss_sd_scripts_commit_hash": "(unknown)",  # what sd-scripts writes where it does not know
        "ss_num_epochs": facts.num_epochs,
        "ss_max_train_steps": facts.max_train_steps,
        "ss_optimizer": facts.optimizer,
        "ss_v2": facts.v2,
        "ss_base_model_version": facts.base_model_version,
    }
    if options.precision.quantize_base:
        values["ss_quantize_base"] = options.precision.quantize_base
    if facts.network_args:
        values["ss_network_args"] = json.dumps(dict(facts.network_args))
    metadata = {key: as_text(value) for key, value in values.items()}
    metadata |= {key: as_text(value) for key, value in facts.family.items()}
    metadata |= data
    if options.output.no_metadata:
        return {key: metadata[key] for key in MINIMUM_KEYS if key in metadata}
    return metadata | base.result()


def _option(options: Any, path: str) -> Any:
    group, _, name = path.partition(".")
    return getattr(getattr(options, group), name)


def at_save(
    options: TrainOptions, metadata: Mapping[str, str], *, step: int, epoch: int, now: float | None = None
) -> dict[str, str]:
    """`metadata` with the keys of one saved file: updates made, and the epoch they end in (from 1)."""
    if options.output.no_metadata:
        return dict(metadata)
    finished = time.time() if now is None else now
    return {**metadata, "ss_training_finished_at": str(finished), "ss_steps": str(step), "ss_epoch": str(epoch)}


def average_metadata(options: TrainOptions) -> dict[str, str]:
    """What a file of averaged weights (`--ema`) says beside the keys of any other."""
    average = options.average
    if options.output.no_metadata:
        return {}
    return {"ss_ema": "True", "ss_ema_decay": str(average.ema_decay), "ss_ema_update_every": str(average.ema_update_every)}


# ---- modelspec -------------------------------------------------------------------------------------------------------

ADAPTERS = {"LoRA": "lora", "TextualInversion": "textual-inversion"}
"""Kind of file -> suffix of modelspec.architecture; a "Checkpoint" has none."""

REFERENCE_IMPLEMENTATION = "https://github.com/Stability-AI/generative-models"
"""modelspec.implementation of a Stable Diffusion file in its original key names."""


def modelspec_metadata(options: TrainOptions, facts: RunFacts, kind: str, now: float | None = None) -> dict[str, str]:
    """`modelspec.*` of one file. kind: "LoRA", "TextualInversion" or "Checkpoint"; now: seconds since 1970, for its date."""
    now = time.time() if now is None else now
    suffix = ADAPTERS.get(kind)
    low, high = options.noise.min_timestep, options.noise.max_timestep
    values: dict[str, str | None] = {
        "sai_model_spec": "1.0.1",
        "architecture": f"{facts.architecture}/{suffix}" if suffix else facts.architecture,
        "implementation": "diffusers" if kind == "LoRA" else REFERENCE_IMPLEMENTATION,
        "title": options.output.output_name or f"{kind}@{now}",
        "resolution": f"{facts.resolution[0]}x{facts.resolution[1]}",
        "date": datetime.fromtimestamp(int(now)).isoformat(),
        "prediction_type": facts.prediction_type,
        "timestep_range": None if low is None and high is None else f"{low or 0},{1000 if high is None else high}",
        "encoder_layer": None if options.training.clip_skip is None else str(options.training.clip_skip),
        **_given(options.metadata),
    }
    return {f"modelspec.{key}": value for key, value in values.items() if value is not None}


def _given(options: MetadataOptions) -> dict[str, str]:
    """The `--metadata_*` flags that are set, by modelspec name; a thumbnail's file as a data URL."""
    named = {f.name.removeprefix("metadata_"): getattr(options, f.name) for f in fields(options)}
    given = {name: str(value) for name, value in named.items() if value is not None}
    if "thumbnail" in given:
        given["thumbnail"] = thumbnail_url(given["thumbnail"])
    return given


def thumbnail_url(value: str) -> str:
    """A picture file as a data URL; a data URL as it is."""
    if value.startswith("data:"):
        return value
    kind, _ = mimetypes.guess_type(value)
    if kind is None or not kind.startswith("image/"):
        raise UserError(f"--metadata_thumbnail {value}: expected a picture file (.png, .jpg, .webp, ...) or a data: URL.")
    try:
        content = Path(value).read_bytes()
    except OSError as error:
        raise UserError(f"--metadata_thumbnail {value} cannot be read: {error.strerror}.") from error
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


# ---- the base model --------------------------------------------------------------------------------------------------


def legacy_hash(path: Path) -> str:
    """`ss_sd_model_hash`: eight digits over 64 KiB of the file from 1 MiB on. "IsADirectory" for a folder, as in sd-scripts."""
    if path.is_dir():
        return "IsADirectory"
    with path.open("rb") as file:
        file.seek(0x100000)
        return hashlib.sha256(file.read(0x10000)).hexdigest()[:8]


def full_hash(path: Path) -> str:
    """`ss_new_sd_model_hash`: SHA-256 of the whole file."""
    if path.is_dir():
        return "IsADirectory"
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


class BaseHashes:
    """Names and hashes of the base model and the VAE, read in a background thread: a start does not wait for gigabytes.

    Made on the main process only. `result` waits for the thread, at the first save.
    """

    def __init__(self, model: str | None, vae: str | None, *, skip: bool = False) -> None:
        """model, vae: as the flags name them, a path or a hub id. skip: `--no_metadata`, nothing is read."""
        self._found: dict[str, str] = {}
        self._failure: OSError | None = None
        self._sources: Sequence[tuple[str, str | None]] = () if skip else (("sd_model", model), ("vae", vae))
        self._thread = threading.Thread(target=self._read, name="base-model-hash", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            for what, name in self._sources:
                if name is not None:
                    self._add(what, name)
        except OSError as error:
            self._failure = error

    def _add(self, what: str, name: str) -> None:
        path = Path(name)
        if path.exists():
            self._found[f"ss_{what}_hash"] = legacy_hash(path)
            self._found[f"ss_new_{what}_hash"] = full_hash(path)
            name = path.name
        self._found[f"ss_{what}_name"] = name

    def result(self) -> dict[str, str]:
        self._thread.join()
        if self._failure is not None:
            logger.warning("the base model's hash is missing from the metadata: %s", self._failure)
        return self._found
