"""Options that contradict each other or name things that are not there: a table, looked at before any model is read."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.errors import UserError, suggest
from library.option_groups import (
    DreamBoothOptions,
    FineTuneOptions,
    FullTrainOptions,
    NetworkTrainOptions,
    TrainingOptions,
    TrainOptions,
)
from library.option_groups_attention import ATTENTION_BACKENDS, BackendNeeds
from library.option_groups_output import NEWEST_STATE
from library.options import flags_of, flat
from library.unused_options import DEPENDENT, Dependent

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rule:
    """`broken` is asked of options of type `scope` only. `{flag}` in the message stands for that flag's value.

    A broken rule ends the program, unless it is a warning: an option that has no effect, or is likely not what was meant.
    """

    broken: Callable[[Any], bool]
    message: str
    scope: type = object
    warning: bool = False


def warn_unused(row: Dependent) -> Rule:
    """A warning for flags that something else in the options leaves without effect."""

    def broken(options: Any) -> bool:
        known = flags_of(type(options), type(options.family))
        flags = (known[name] for name in row.flags if name in known)
        changed = (getattr(getattr(options, flag.group), flag.name) != flag.default for flag in flags)
        return any(changed) and not row.used(options)

    *others, last = (f"--{name}" for name in row.flags)
    what = f"{', '.join(others)} and {last} have" if others else f"{last} has"
    return Rule(broken, f"{what} no effect {row.why}.", warning=True)


def _has_folders(o: TrainOptions) -> bool:
    return o.data.dataset_config is None and (o.data.train_data_dir is not None or o.data.in_json is not None)


_MODEL_AND_OUTPUT = (
    Rule(
        lambda o: o.model.pretrained_model_name_or_path is None,
        "--pretrained_model_name_or_path is missing: the base model, as a file, a diffusers folder or a hub id.",
    ),
    Rule(lambda o: o.output.output_dir is None, "--output_dir is missing: the folder that trained models are written to."),
    Rule(
        lambda o: o.output.output_dir is not None and Path(o.output.output_dir).is_file(),
        "--output_dir {output_dir}: is a file. Name a folder.",
    ),
    Rule(
        lambda o: o.model.v2 and o.training.clip_skip is not None,
        "--clip_skip {clip_skip} with --v2: Stable Diffusion 2.x already skips its last layer; results may be worse.",
        warning=True,
    ),
)

_PRECISION = (
    Rule(
        lambda o: o.precision.full_bf16 and o.precision.mixed_precision != "bf16",
        "--full_bf16 needs --mixed_precision bf16, which is '{mixed_precision}'.",
    ),
    Rule(
        lambda o: o.precision.full_fp16 and o.precision.mixed_precision != "fp16",
        "--full_fp16 needs --mixed_precision fp16, which is '{mixed_precision}'.",
    ),
    Rule(
        lambda o: o.precision.full_fp16 and any(text.startswith("ggpo_") for text in o.network.network_args or ()),
        "--full_fp16 keeps gradients scaled, and ggpo_sigma and ggpo_beta need them as they are. Use --full_bf16, or "
        "remove one.",
        scope=NetworkTrainOptions,
    ),
    Rule(
        lambda o: "bf16_update" in o.explicit and not o.precision.full_bf16,
        "--bf16_update {bf16_update} has no effect without --full_bf16: the weights learn in float32.",
        warning=True,
    ),
)

_QUANTIZED = (
    Rule(
        lambda o: o.denoiser_scheme is not None,
        "--fp8_base and --quantize_base keep weights in few bits, which cannot learn, and full fine-tuning changes them all. "
        "Train an adapter, or remove them (--quantize_text_encoders is for text encoders that stay frozen).",
        scope=FullTrainOptions,
    ),
    Rule(
        lambda o: o.precision.quantize_text_encoders is not None and o.full.trains_text_encoder,
        "--quantize_text_encoders {quantize_text_encoders}: the text encoder is trained, and what is in few bits cannot learn. "
        "Remove it, or add --no-train_text_encoder.",
        scope=FullTrainOptions,
    ),
    Rule(
        lambda o: (o.precision.fp8_base or o.network.fp8_base_unet) and not (o.denoiser_scheme or "").startswith("fp8"),
        "--fp8_base and --fp8_base_unet say fp8, and --quantize_base says {quantize_base}. Give one of them.",
        scope=NetworkTrainOptions,
    ),
    Rule(
        lambda o: o.precision.quantized_compute == "8bit" and o.denoiser_scheme is None,
        "--quantized_compute {quantized_compute} has no effect without --quantize_base: the denoiser is not quantised.",
        warning=True,
    ),
    Rule(
        lambda o: o.precision.quantized_compute == "8bit" and o.denoiser_scheme == "nf4",
        "--quantized_compute 8bit: nf4 has no products of its own. Use int8 or fp8, or leave --quantized_compute out.",
    ),
)


def _clips_before_norm(o: TrainOptions) -> bool:
    """Whether weights are stepped, and gradients to be clipped, before all gradients are there."""
    return o.fused_backward and o.optimizer.max_grad_norm > 0 and o.training.gradient_accumulation_steps == 1


_FUSED = (
    Rule(
        lambda o: o.fused_backward and o.precision.mixed_precision == "fp16",
        "--fused_backward_pass cannot be used with --mixed_precision fp16: its scaled gradients may overflow, and whether they "
        "did is known after the weights were stepped. Use --mixed_precision bf16.",
    ),
    Rule(
        lambda o: o.fused_backward and any(text.startswith("ggpo_") for text in o.network.network_args or ()),
        "--fused_backward_pass: ggpo_sigma and ggpo_beta need the gradients of a whole step. Remove them, or the flag.",
        scope=NetworkTrainOptions,
    ),
    Rule(
        lambda o: _clips_before_norm(o) and o.optimizer.fused_clip == "each",
        "--fused_backward_pass: the norm of all gradients is not known when a weight is stepped, so each weight's gradient is "
        "clipped to --max_grad_norm {max_grad_norm} alone, as in sd-scripts. --max_grad_norm 0 does not clip; --fused_clip all "
        "clips the norm of all, and takes twice as long.",
        warning=True,
    ),
    Rule(
        lambda o: o.optimizer.fused_clip == "all" and not _clips_before_norm(o),
        "--fused_clip all has no effect: without --fused_backward_pass, and with --gradient_accumulation_steps above 1, the "
        "norm of all gradients is clipped in any case, and with --max_grad_norm 0 nothing is.",
        warning=True,
    ),
    Rule(
        lambda o: o.fused_backward and o.training.gradient_accumulation_steps > 1,
        "--fused_backward_pass saves little memory with --gradient_accumulation_steps {gradient_accumulation_steps}: the "
        "gradients of all weights are held until the last batch of an update.",
        warning=True,
    ),
)

_MEMORY = (
    Rule(
        lambda o: o.memory.cpu_offload_checkpointing and not o.memory.gradient_checkpointing,
        "--cpu_offload_checkpointing turns on --gradient_checkpointing: what is kept of a block then goes to main memory.",
        warning=True,
    ),
)

_SHARDED = (
    Rule(
        lambda o: o.memory.shard_weights and o.memory.cpu_offload_checkpointing,
        "--shard_weights cannot be used with --cpu_offload_checkpointing, which would take gathered weights to main memory. "
        "Use --gradient_checkpointing.",
    ),
    Rule(
        lambda o: o.memory.shard_weights and o.fused_backward,
        "--shard_weights cannot be used with --fused_backward_pass: a gradient is summed over the processes before a weight "
        "can be stepped. Of gradients, too, a process holds a part. Remove --fused_backward_pass.",
    ),
    Rule(
        lambda o: o.memory.shard_weights and o.attention.compiler is not None,
        "--shard_weights cannot be used with --torch_compile yet. Remove one of them.",
    ),
    Rule(
        lambda o: o.memory.shard_weights and o.run.auto_fit,
        "--shard_weights cannot be used with --auto_fit, which counts on whole weights. Remove one of them.",
    ),
    Rule(
        lambda o: o.memory.shard_weights and o.denoiser_scheme is not None,
        "--shard_weights cannot be used with --fp8_base or --quantize_base: weights in few bits are not shared out, so each "
        "process would hold them all. Remove one of them.",
        scope=NetworkTrainOptions,
    ),
    Rule(
        lambda o: o.memory.shard_weights and o.precision.mixed_precision == "fp16",
        "--shard_weights cannot be used with --mixed_precision fp16: each process would see overflows of its own part alone. "
        "Use --mixed_precision bf16.",
        scope=FullTrainOptions,
    ),
    Rule(
        lambda o: o.memory.shard_weights and o.full.stop_text_encoder_training is not None,
        "--shard_weights cannot be used with --stop_text_encoder_training: what is shared out learns to the end. Remove one of "
        "them.",
        scope=FullTrainOptions,
    ),
    Rule(
        lambda o: o.memory.shard_weights and o.precision.mixed_precision != "no" and not o.memory.gradient_checkpointing,
        "--shard_weights without --gradient_checkpointing: what a block computes with in {mixed_precision} is kept until its "
        "backward pass, on every process for all blocks. Add --gradient_checkpointing.",
        scope=FullTrainOptions,
        warning=True,
    ),
    Rule(
        lambda o: o.memory.shard_weights and o.run.plan,
        "--plan counts whole weights, gradients and optimizer states: with --shard_weights a process holds its part of those.",
        warning=True,
    ),
)

_NOISE_AND_LOSS = (
    Rule(
        lambda o: o.noise.adaptive_noise_scale is not None and o.noise.noise_offset is None,
        "--adaptive_noise_scale needs --noise_offset, which it raises.",
    ),
    Rule(
        lambda o: (o.noise.min_timestep or 0) >= (1000 if o.noise.max_timestep is None else o.noise.max_timestep),
        "--min_timestep {min_timestep} has to be below --max_timestep {max_timestep}.",
    ),
    Rule(
        lambda o: o.noise.zero_terminal_snr and not o.model.v_parameterization and not o.family.model_tells_v,
        "--zero_terminal_snr without --v_parameterization: a noise prediction learns nothing at the last step.",
        warning=True,
    ),
    Rule(
        lambda o: o.loss.scale_v_pred_loss_like_noise_pred and not o.model.v_parameterization and not o.family.model_tells_v,
        "--scale_v_pred_loss_like_noise_pred needs --v_parameterization.",
    ),
    Rule(
        lambda o: o.loss.v_pred_like_loss and o.model.v_parameterization,
        "--v_pred_like_loss is for noise predictions. Remove it, or --v_parameterization.",
    ),
    Rule(
        lambda o: o.loss.preserve_prior and (o.data.reg_data_dir is None or o.data.dataset_config is not None),
        "--preserve_prior has no effect without --reg_data_dir. In a dataset file, give the subset "
        "custom_attributes = {{ diff_output_preservation = true }}.",
        warning=True,
    ),
    Rule(
        lambda o: "prior_choices" in o.explicit,
        "--prior_choices has no effect: an adapter is switched off to ask the frozen model, at any noise and time.",
        scope=NetworkTrainOptions,
        warning=True,
    ),
)

_DATA = (
    Rule(
        lambda o: o.data.dataset_config is None and not _has_folders(o) and not isinstance(o, FineTuneOptions),
        "no training data: give --dataset_config, or --train_data_dir.",
    ),
    Rule(
        lambda o: o.data.dataset_config is None and o.data.in_json is None,
        "no training data: fine_tune.py needs --in_json or --dataset_config (train_db.py learns from folders alone).",
        scope=FineTuneOptions,
    ),
    Rule(
        lambda o: o.data.dataset_config is None and o.data.in_json is not None,
        "--in_json: train_db.py learns from picture folders. Use fine_tune.py for a metadata file.",
        scope=DreamBoothOptions,
    ),
    Rule(
        lambda o: o.data.dataset_config and (o.data.train_data_dir or o.data.reg_data_dir or o.data.in_json),
        "--train_data_dir, --reg_data_dir and --in_json have no effect beside --dataset_config {dataset_config}.",
        warning=True,
    ),
    Rule(
        lambda o: _has_folders(o) and o.data.in_json is not None and o.data.reg_data_dir is not None,
        "--reg_data_dir has no effect beside --in_json.",
        warning=True,
    ),
    Rule(
        lambda o: _has_folders(o) and o.data.in_json is None and o.data.resolution is None,
        "--resolution is missing: the size trained at, such as 512 or 512,768.",
    ),
    Rule(
        lambda o: o.data.enable_bucket and o.data.min_bucket_reso > o.data.max_bucket_reso,
        "--min_bucket_reso {min_bucket_reso} is larger than --max_bucket_reso {max_bucket_reso}.",
    ),
    Rule(
        lambda o: o.cache.latents and (o.data.color_aug or o.data.random_crop or o.data.face_crop_aug_range),
        "--cache_latents keeps one encoding per picture, so none of --color_aug, --random_crop and --face_crop_aug_range can "
        "be used with it.",
    ),
    Rule(
        lambda o: o.cache.text_outputs and o.data.token_warmup_step > 0,
        "--cache_text_encoder_outputs cannot keep captions that change from step to step: remove it, or --token_warmup_step.",
    ),
)

_RUN = (
    Rule(
        lambda o: o.training.max_train_epochs and o.training.max_train_steps != TrainingOptions().max_train_steps,
        "--max_train_epochs {max_train_epochs} goes before --max_train_steps {max_train_steps}, which has no effect.",
        warning=True,
    ),
    Rule(
        lambda o: o.optimizer.use_8bit_adam and o.optimizer.use_lion_optimizer,
        "--use_8bit_adam and --use_lion_optimizer exclude each other. Remove one.",
    ),
    Rule(
        lambda o: o.optimizer.optimizer_type and (o.optimizer.use_8bit_adam or o.optimizer.use_lion_optimizer),
        "--optimizer_type {optimizer_type} stands beside --use_8bit_adam or --use_lion_optimizer. Keep --optimizer_type.",
    ),
    Rule(
        lambda o: not {"learning_rate", "unet_lr", "text_encoder_lr"} & o.explicit,
        "--learning_rate is not given; {learning_rate} is too low for most purposes (adapters: about 1e-4).",
        warning=True,
    ),
    Rule(
        lambda o: o.logging.log_with in ("tensorboard", "all") and o.logging.logging_dir is None,
        "--log_with {log_with} needs --logging_dir, the folder of TensorBoard's files.",
    ),
    Rule(
        lambda o: o.logging.log_with in ("wandb", "all") and importlib.util.find_spec("wandb") is None,
        "--log_with {log_with} needs the package wandb: pip install wandb.",
    ),
    Rule(
        lambda o: _previews(o) and o.sampling.sample_prompts is None,
        "previews are asked for, but there is no --sample_prompts; none will be made.",
        warning=True,
    ),
    Rule(
        lambda o: o.sampling.sample_prompts is not None and not _previews(o),
        "--sample_prompts has no effect without --sample_every_n_steps, --sample_every_n_epochs or --sample_at_first.",
        warning=True,
    ),
)


def _previews(o: TrainOptions) -> bool:
    return bool(o.sampling.sample_every_n_steps or o.sampling.sample_every_n_epochs or o.sampling.sample_at_first)


def _needs(name: str, needs: BackendNeeds) -> tuple[Rule, ...]:
    """What an attention back end has to have, as far as options and installed packages tell."""
    chosen = f"attention by {name} (--attn_mode)"
    return (
        Rule(lambda o: o.attention_modes == {name} and not needs.learns, f"{chosen} has no backward pass. Use sdpa to train."),
        Rule(
            lambda o: o.attention_modes == {name} and needs.package != "" and importlib.util.find_spec(needs.package) is None,
            f"{chosen} needs the package {needs.package} ({needs.install}). Install it, or use sdpa.",
        ),
        Rule(
            lambda o: o.attention_modes == {name} and needs.half_only and o.precision.mixed_precision == "no",
            f"{chosen} computes in fp16 and bf16, and --mixed_precision is '{{mixed_precision}}'. Use bf16, or sdpa.",
        ),
    )


_ATTENTION = (
    Rule(
        lambda o: len(o.attention_modes) > 1,
        "the flags of attention contradict each other: keep one of --attn_mode, --sdpa, --mem_eff_attn, --xformers and "
        "--diffusers_xformers.",
    ),
    *(rule for name, needs in ATTENTION_BACKENDS.items() for rule in _needs(name, needs)),
    Rule(
        lambda o: o.attention.torch_compile and o.attention.compiler is None,
        "--torch_compile has no effect with --dynamo_backend no.",
        warning=True,
    ),
)

_START = (
    Rule(
        lambda o: o.state.resume is not None and (o.state.initial_step is not None or o.state.initial_epoch is not None),
        "--initial_step and --initial_epoch have no effect beside --resume, whose state says where the run stands.",
        warning=True,
    ),
    Rule(
        lambda o: o.state.skip_until_initial_step and o.state.initial_step is None,
        "--skip_until_initial_step needs --initial_step, the step to skip to.",
    ),
)

_HUB = (
    Rule(
        lambda o: o.hub.resume_from_huggingface and o.state.resume in (None, NEWEST_STATE),
        "--resume_from_huggingface needs --resume owner/name/folder, the state on the hub.",
    ),
    Rule(
        lambda o: (
            {
                "huggingface_repo_type",
                "huggingface_path_in_repo",
                "huggingface_repo_visibility",
                "save_state_to_huggingface",
                "async_upload",
            }
            & o.explicit
            and o.hub.huggingface_repo_id is None
        ),
        "--huggingface_repo_type, --huggingface_path_in_repo, --huggingface_repo_visibility, --save_state_to_huggingface and "
        "--async_upload have no effect without --huggingface_repo_id.",
        warning=True,
    ),
    Rule(
        lambda o: (
            o.hub.save_state_to_huggingface
            and o.hub.huggingface_repo_id is not None
            and not (o.state.save_state or o.state.save_state_on_train_end)
        ),
        "--save_state_to_huggingface has no effect without --save_state or --save_state_on_train_end.",
        warning=True,
    ),
)

_VALIDATION = (
    Rule(
        lambda o: o.average.ema_evaluate and not o.average.ema,
        "--ema_evaluate needs --ema, the average it uses.",
    ),
)

_NETWORK = (
    Rule(
        lambda o: o.network.scale_weight_norms and "init=pissa" in (o.network.network_args or ()),
        "--scale_weight_norms cannot shrink the difference that --network_args init=pissa trains. Remove one of them.",
        scope=NetworkTrainOptions,
    ),
    Rule(
        lambda o: o.network.network_module is None,
        "--network_module is missing: networks.lora, for example.",
        scope=NetworkTrainOptions,
    ),
    Rule(
        lambda o: o.network.network_train_unet_only and o.network.network_train_text_encoder_only,
        "--network_train_unet_only and --network_train_text_encoder_only exclude each other. Remove one.",
        scope=NetworkTrainOptions,
    ),
    Rule(
        lambda o: o.cache.text_outputs and o.network.trains_text_encoder and not o.family.several_text_encoders,
        "--cache_text_encoder_outputs fixes what the text encoder gives, so it cannot learn: add --network_train_unet_only.",
        scope=NetworkTrainOptions,
    ),
    Rule(
        lambda o: o.network.dim_from_weights and o.network.network_weights is None,
        "--dim_from_weights needs --network_weights, the file the ranks are taken from.",
        scope=NetworkTrainOptions,
    ),
    Rule(
        lambda o: len(o.network.base_weights_multiplier or ()) > len(o.network.base_weights or ()),
        "--base_weights_multiplier has more values than --base_weights has files: {base_weights_multiplier}, {base_weights}.",
        scope=NetworkTrainOptions,
    ),
    Rule(
        lambda o: o.network.save_format != "kohya" and o.network.save_model_as != "safetensors",
        "--save_format {save_format} is written as safetensors alone, and --save_model_as says {save_model_as}. Remove it.",
        scope=NetworkTrainOptions,
    ),
)

_FULL = (
    Rule(
        lambda o: o.cache.text_outputs and o.full.trains_text_encoder and not o.family.several_text_encoders,
        "--cache_text_encoder_outputs fixes what the text encoder gives, so it cannot learn: add --no-train_text_encoder.",
        scope=FullTrainOptions,
    ),
    Rule(
        lambda o: o.full.learning_rate_te is not None and not o.full.trains_text_encoder,
        "--learning_rate_te {learning_rate_te} has no effect: the text encoder is not trained (--train_text_encoder).",
        scope=FullTrainOptions,
        warning=True,
    ),
    Rule(
        lambda o: (o.full.stop_text_encoder_training or 0) > 0 and not o.full.train_text_encoder,
        "--stop_text_encoder_training {stop_text_encoder_training} has no effect: the text encoder is not trained "
        "(--train_text_encoder).",
        scope=FullTrainOptions,
        warning=True,
    ),
    Rule(
        lambda o: o.full.use_safetensors and o.full.save_model_as is not None,
        "--use_safetensors has no effect beside --save_model_as {save_model_as}.",
        scope=FullTrainOptions,
        warning=True,
    ),
)

RULES: tuple[Rule, ...] = (
    *map(warn_unused, DEPENDENT),
    *_MODEL_AND_OUTPUT,
    *_PRECISION,
    *_QUANTIZED,
    *_ATTENTION,
    *_MEMORY,
    *_FUSED,
    *_SHARDED,
    *_NOISE_AND_LOSS,
    *_DATA,
    *_RUN,
    *_START,
    *_HUB,
    *_VALIDATION,
    *_NETWORK,
    *_FULL,
)

FILES = ("dataset_config", "in_json", "sample_prompts", "log_tracker_config", "network_weights", "base_weights", "from_file")
"""Flags that name files which have to exist. Models, VAEs and tokenizers may be hub ids: the family looks at those."""
ADAPTERS = ("network_weights", "base_weights")
"""Those that may be peft's folders."""
FOLDERS = ("train_data_dir", "reg_data_dir", "resume")
_IGNORED_BESIDE_DATASET_CONFIG = ("train_data_dir", "reg_data_dir", "in_json")


def check_rules(options: Any, rules: Iterable[Rule] = RULES) -> None:
    """Raise one `UserError` with everything that is wrong, one line each; log what is only doubtful.

    options: a container of option groups. rules: those of its kind of program, beside which the family has its own.
    """
    problems = [
        *_flag_problems(options, flat(options)),
        *_path_problems(flat(options)),
        *rule_problems(options, (*rules, *options.family.rules)),
    ]
    if problems:
        raise UserError("\n".join(problems))


def rule_problems(options: Any, rules: Iterable[Rule]) -> Iterator[str]:
    """What the broken ones among `rules` say; warnings are logged instead."""
    values = flat(options)
    for rule in rules:
        if isinstance(options, rule.scope) and rule.broken(options):
            message = rule.message.format_map(values)
            if rule.warning:
                logger.warning(message)
            else:
                yield message


def _flag_problems(options: Any, values: dict[str, Any]) -> Iterator[str]:
    """What a flag's own line says of its value."""
    for name, flag in flags_of(type(options), type(options.family)).items():
        if values[name] == flag.default:
            continue
        if flag.planned:
            yield f"--{name} is known, but not implemented here yet. {flag.declared.instead or 'Remove it.'}"
        elif flag.inert:
            logger.warning("--%s has no effect: %s", name, flag.inert)
        too_far = flag.out_of_range(values[name])
        if too_far and not flag.planned:
            yield too_far


def _path_problems(values: dict[str, Any]) -> Iterator[str]:
    ignored = _IGNORED_BESIDE_DATASET_CONFIG if values.get("dataset_config") else ()
    for name, kind in [(name, "file") for name in FILES] + [(name, "folder") for name in FOLDERS]:
        value = values.get(name)
        for path in value if isinstance(value, tuple) else (value,):
            is_no_path = name == "resume" and (path == NEWEST_STATE or values.get("resume_from_huggingface"))
            if path is None or name in ignored or is_no_path:
                continue
            found = Path(path).is_file() if kind == "file" else Path(path).is_dir()
            if not found and not (name in ADAPTERS and any(Path(path).glob("**/adapter_config.json"))):
                yield f"--{name} {path}: {_missing(Path(path), kind)}"


def _missing(path: Path, kind: str) -> str:
    if path.exists():
        return f"is not a {kind}."
    near = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    return f"does not exist.{suggest(path.name, near)}"
