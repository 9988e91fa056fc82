"""Flags about what is written, logged and shown, and about the run as a program."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from library.options import EXPECTED, opt


def every_or_off(value: Any) -> int | None:
    """A positive interval; 0 and below mean never, as in sd-scripts."""
    try:
        number = int(value) if isinstance(value, str) else value
    except ValueError:
        number = None
    if isinstance(number, bool) or not isinstance(number, int):
        raise ValueError(f"expected {EXPECTED[int]}, got {value!r}")
    return number if number > 0 else None


def gibibytes(value: Any) -> float:
    """`12GB`, `12GiB`, `12G` or `12`, all of which are 12 x 2^30 bytes, as makers of graphics cards count; `800MB`."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([GM])(?:i?B)?)?\s*", str(value), re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise ValueError(f"expected an amount of memory such as 12GB or 800MB, got {value!r}")
    return float(match[1]) / (1024 if (match[2] or "").upper() == "M" else 1)


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """Which models are saved, where and when."""

    output_dir: str | None = opt(None, "folder for everything this run writes")
    output_name: str | None = opt(None, "file name of saved models, without extension; 'last' unless given")
    save_every_n_epochs: int | None = opt(None, "save every so many epochs", minimum=1)
    save_every_n_steps: int | None = opt(None, "save every so many steps", minimum=1)
    save_n_epoch_ratio: int | None = opt(
        None, "save so often that there are at least this many files; 0 does not count", minimum=0
    )
    save_last_n_epochs: int | None = opt(None, "keep only the files of the last so many epochs' saves", minimum=1)
    save_last_n_epochs_state: int | None = opt(None, "the same for states", minimum=1)
    save_last_n_steps: int | None = opt(None, "remove files saved more than so many steps ago", minimum=1)
    save_last_n_steps_state: int | None = opt(None, "the same for states", minimum=1)
    no_metadata: bool = opt(False, "write only the metadata that loading needs")
    training_comment: str | None = opt(None, "text written into the metadata")


NEWEST_STATE = "auto"
"""`--resume auto`: the newest whole state in the output folder."""


@dataclass(frozen=True, kw_only=True)
class StateOptions:
    """Saving and resuming the whole state of a run."""

    save_state: bool = opt(False, "save a state with every saved model, to resume from")
    save_state_on_train_end: bool = opt(False, "save a state at the end")
    resume: str | None = opt(None, "state folder to go on from, exactly; auto: the newest whole one in --output_dir, or none")
    initial_step: int | None = opt(
        None, "count steps from here, as if those before had been made; goes before --initial_epoch", minimum=0
    )
    initial_epoch: int | None = opt(None, "count epochs from here, 1 the first", minimum=1)
    skip_until_initial_step: bool = opt(False, "begin inside the epoch, with the pictures that come at --initial_step")


PREVIEW_SAMPLERS = (
    "ddim", "pndm", "lms", "euler", "euler_a", "heun", "dpm_2", "dpm_2_a", "dpmsolver", "dpmsolver++", "dpmsingle",
    "k_lms", "k_euler", "k_euler_a", "k_dpm_2", "k_dpm_2_a",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """Preview pictures during training."""

    sample_prompts: str | None = opt(None, "file of prompts: .txt, .toml or .json")
    sample_every_n_steps: int | None = opt(None, "make previews every so many steps; 0 never", type=every_or_off)
    sample_every_n_epochs: int | None = opt(None, "make previews every so many epochs; 0 never", type=every_or_off)
    sample_at_first: bool = opt(False, "make previews before the first step, too")
    sample_sampler: str = opt("ddim", "sampler of previews; lms needs the package scipy", choices=PREVIEW_SAMPLERS)


@dataclass(frozen=True, kw_only=True)
class LoggingOptions:
    """What is logged, and where."""

    logging_dir: str | None = opt(None, "folder for TensorBoard's files; turns TensorBoard on")
    log_with: str | None = opt(None, "tracker", choices=("tensorboard", "wandb", "all"))
    log_prefix: str | None = opt(None, "put before the name of each run's folder in --logging_dir")
    log_tracker_name: str | None = opt(None, "project name in the tracker; the script's own unless given")
    log_tracker_config: str | None = opt(None, "TOML file with settings of the tracker")
    wandb_run_name: str | None = opt(None, "name of this run in wandb")
    wandb_api_key: str | None = opt(None, "key to log in to wandb", secret=True)
    log_config: bool = opt(False, "send these options to the tracker")
    log_image_losses: bool = opt(
        True, "keep a running loss of each picture: image_losses.csv at the end, and the worst ones named"
    )
    console_log_level: str | None = opt(
        None, "lowest level shown; INFO unless given", choices=("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
    )
    console_log_file: str | None = opt(None, "write log lines to this file instead of the console")
    console_log_simple: bool = opt(False, "log the message alone, without time and level")


@dataclass(frozen=True, kw_only=True)
class MetadataOptions:
    """modelspec metadata of saved models."""

    metadata_title: str | None = opt(None, "title; --output_name unless given")
    metadata_author: str | None = opt(None, "author")
    metadata_description: str | None = opt(None, "description")
    metadata_license: str | None = opt(None, "licence")
    metadata_tags: str | None = opt(None, "tags, with commas between")
    metadata_usage_hint: str | None = opt(None, "how to use the model")
    metadata_thumbnail: str | None = opt(None, "thumbnail, as a data URL")
    metadata_merged_from: str | None = opt(None, "what the model was merged from")
    metadata_trigger_phrase: str | None = opt(None, "words that call up what was learned")
    metadata_preprocessor: str | None = opt(None, "preprocessor the model expects")
    metadata_is_negative_embedding: str | None = opt(None, "whether an embedding is meant for negative prompts")


@dataclass(frozen=True, kw_only=True)
class HubOptions:
    """Uploading to, and resuming from, the Hugging Face hub."""

    huggingface_repo_id: str | None = opt(None, "repository that saved models are uploaded to, owner/name; made if not there")
    huggingface_repo_type: str | None = opt(None, "its type; model unless given", choices=("model", "dataset", "space"))
    huggingface_path_in_repo: str | None = opt(None, "folder in it; the top one unless given")
    huggingface_token: str | None = opt(None, "access token; that of `hf auth login` unless given", secret=True)
    huggingface_repo_visibility: str | None = opt(
        None, "of a repository that is made; private unless given", choices=("public", "private")
    )
    save_state_to_huggingface: bool = opt(False, "upload states, too")
    resume_from_huggingface: bool = opt(False, "--resume names a folder on the hub: owner/name/folder:revision:type")
    async_upload: bool = opt(False, "upload beside the training; a save waits for the upload of the one before")


_FOR_WEIGHTS = (
    "Where memory is short for weights, use --shard_weights (several devices), --blocks_to_swap, --fp8_base or --quantize_base "
    "(adapters)."
)
_FOR_OPTIMIZER = (
    "Where memory is short for the optimizer, use --shard_weights (several devices), --optimizer_type AdamW8bit or "
    "PagedAdamW8bit, --full_bf16, or Adafactor with --fused_backward_pass."
)
_FOR_BOTH = (
    "Several devices share out weights, gradients and optimizer state with --shard_weights (accelerate launch --multi_gpu). "
    f"{_FOR_WEIGHTS} {_FOR_OPTIMIZER}"
)


@dataclass(frozen=True, kw_only=True)
class DeepSpeedOptions:
    """Training through DeepSpeed."""

    deepspeed: bool = opt(False, "train through DeepSpeed", planned=True, instead=_FOR_BOTH)
    zero_stage: int = opt(2, "ZeRO stage", choices=(0, 1, 2, 3), planned=True, instead=_FOR_BOTH)
    offload_optimizer_device: str | None = opt(
        None, "where optimizer state is kept", choices=("cpu", "nvme"), planned=True, instead=_FOR_OPTIMIZER
    )
    offload_optimizer_nvme_path: str | None = opt(None, "folder for it on NVMe", planned=True, instead=_FOR_OPTIMIZER)
    offload_param_device: str | None = opt(
        None, "where weights are kept", choices=("cpu", "nvme"), planned=True, instead=_FOR_WEIGHTS
    )
    offload_param_nvme_path: str | None = opt(None, "folder for them on NVMe", planned=True, instead=_FOR_WEIGHTS)
    zero3_init_flag: bool = opt(False, "build huge models in parts, at stage 3", planned=True, instead=_FOR_WEIGHTS)
    zero3_save_16bit_model: bool = opt(
        False, "save 16-bit weights, at stage 3", planned=True, instead="Use --save_precision fp16 or bf16."
    )
    fp16_master_weights_and_gradients: bool = opt(
        False, "keep master weights and gradients in fp16", planned=True, instead="Use --full_bf16 or --full_fp16."
    )


@dataclass(frozen=True, kw_only=True)
class ProgramOptions:
    """The run as a program; on the command line only."""

    config_file: str | None = opt(
        None, "file with options: .toml, .yaml or .json; the command line goes before it", cli_only=True
    )
    output_config: bool = opt(False, "write the options to --config_file and end", cli_only=True)
    print_config: bool = opt(False, "print the options as TOML and end", cli_only=True)
    debug: bool = opt(False, "show Python tracebacks of errors", cli_only=True)


@dataclass(frozen=True, kw_only=True)
class RunOptions(ProgramOptions):
    """The run as a program; on the command line only."""

    plan: bool = opt(False, "print what the run would take, in memory and time, write it to plan.json, and end", cli_only=True)
    show_batches: int | None = opt(
        None, "write the first so many batches to batches.html, as they would be trained, and end", minimum=1, cli_only=True
    )
    auto_fit: bool = opt(
        False, "choose checkpointing, swapping, offloading and, last, quantisation so that it fits", cli_only=True
    )
    auto_fit_memory: float | None = opt(
        None, "memory --auto_fit may use, such as 12GB; what the device has free unless given", type=gibibytes, cli_only=True
    )
