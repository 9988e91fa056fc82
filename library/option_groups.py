"""Every flag of the training scripts: name, type, default and help, once each. Names and defaults are sd-scripts'.

This file holds the containers the scripts ask for and the groups about the model and the training itself;
`option_groups_data` has what concerns pictures and captions, `option_groups_output` what is written, logged and shown.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from library.option_groups_attention import AttentionOptions
from library.option_groups_data import CacheOptions, DataOptions
from library.option_groups_output import (
    DeepSpeedOptions,
    HubOptions,
    LoggingOptions,
    MetadataOptions,
    OutputOptions,
    RunOptions,
    SamplingOptions,
    StateOptions,
)
from library.options import NoFamilyOptions, group, opt

__all__ = [
    "AttentionOptions", "AverageOptions", "CacheOptions", "DataOptions", "DeepSpeedOptions", "DreamBoothOptions",
    "DreamBoothPartOptions", "FineTuneOptions", "FullOptions", "FullTrainOptions", "HubOptions", "LoggingOptions",
    "LossOptions", "MemoryOptions", "MetadataOptions", "ModelOptions", "ModelPrecisionOptions", "NetworkOptions",
    "NetworkTrainOptions", "NoiseOptions", "OptimizerOptions", "OutputOptions", "PrecisionOptions", "RunOptions",
    "SamplingOptions", "ScheduleOptions", "StateOptions", "TrainOptions", "TrainingOptions", "ValidationOptions",
    "steps_or_ratio",
]  # fmt: skip


def steps_or_ratio(value: Any) -> int | float:
    """A whole number of steps, or a ratio of all steps: a number below 1 or a percentage such as `10%`."""
    problem = f"expected a number of steps, a ratio below 1 or a percentage, got {value!r}"
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(problem)
    try:
        number = float(value[:-1]) / 100 if isinstance(value, str) and value.endswith("%") else float(value)
    except ValueError:
        raise ValueError(problem) from None
    if 0 < number < 1:
        return number
    if not number.is_integer() or number < 0:
        raise ValueError(problem)
    return int(number)


SCHEME_NAMES = ("fp8", "fp8_raw", "int8", "nf4")


_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def byte_size(value: Any) -> int:
    """A number of bytes: `5000000000`, `5GB` or `4.5GiB`."""
    text = str(value).strip().upper()
    unit = next((unit for unit in _UNITS if text.endswith(unit)), "")
    try:
        size = int(float(text.removesuffix(unit)) * _UNITS.get(unit, 1))
    except (ValueError, OverflowError):
        size = 0
    if isinstance(value, bool) or size < 1:
        raise ValueError(f"expected a size such as 5GB or 500MB, got {value!r}")
    return size


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The model that training starts from."""

    pretrained_model_name_or_path: str | None = opt(None, "base model: a checkpoint file, a diffusers folder or a hub id")
    v2: bool = opt(False, "the model is Stable Diffusion 2.x; checked against what the file says")
    v_parameterization: bool = opt(False, "the model predicts v instead of noise; checked against what the file says")
    vae: str | None = opt(None, "VAE to use instead of the model's own: a file, a diffusers folder or a hub id")
    tokenizer: str | None = opt(None, "tokenizer folder or hub id; the model folder's own, or the hub's, unless given")
    tokenizer_cache_dir: str | None = opt(None, "folder that keeps tokenizers for offline use")


@dataclass(frozen=True, kw_only=True)
class ModelPrecisionOptions:
    """In which number format a frozen model is kept and computed."""

    mixed_precision: str = opt("no", "format of the computation", choices=("no", "fp16", "bf16"))
    no_half_vae: bool = opt(False, "run the VAE in float32 even under mixed precision")
    fp8_base: bool = opt(
        False, "keep the frozen denoiser in fp8, as --quantize_base fp8, and text encoders whose outputs are not cached"
    )
    quantize_base: str | None = opt(
        None,
        "keep the frozen denoiser in 8 or 4 bits: fp8 (a scale for each 128x128 tile), fp8_raw (sd-scripts' plain cast), int8 "
        "(a scale for each row), nf4",
        choices=SCHEME_NAMES,
    )
    quantize_text_encoders: str | None = opt(
        None, "the same for frozen text encoders, whether or not their outputs are cached", choices=SCHEME_NAMES
    )
    quantized_compute: str = opt(
        "dequantize",
        "how a quantised denoiser multiplies: in the format of the computation, or in int8 or fp8, which is less exact",
        choices=("dequantize", "8bit"),
    )


@dataclass(frozen=True, kw_only=True)
class PrecisionOptions(ModelPrecisionOptions):
    """In which number format is computed, kept and saved."""

    full_fp16: bool = opt(False, "keep learning weights and gradients in fp16, too; with --mixed_precision fp16")
    full_bf16: bool = opt(False, "keep learning weights and gradients in bf16, too")
    bf16_update: str = opt(
        "stochastic",
        "how bf16 weights take up steps: rounded stochastically; kahan, to the nearest with a bf16 remainder for each weight; "
        "nearest, which loses small steps",
        choices=("stochastic", "kahan", "nearest"),
    )
    save_precision: str | None = opt(
        None, "format of saved weights; as trained unless given", choices=("float", "fp16", "bf16")
    )

    @property
    def learns_in_half(self) -> bool:
        """Whether the weights that learn are kept in the format of the computation."""
        return self.full_bf16 or self.full_fp16


@dataclass(frozen=True, kw_only=True)
class MemoryOptions:
    """Trading speed against memory."""

    gradient_checkpointing: bool = opt(False, "recompute activations in the backward pass: less memory, about 30% slower")
    cpu_offload_checkpointing: bool = opt(
        False, "keep the denoiser's checkpointed activations in main memory; turns on --gradient_checkpointing"
    )
    pinned_memory_limit: float | None = opt(
        None, "GiB of a machine's memory that may be pinned for swapping and offloading; half of it unless given", minimum=0
    )
    shard_weights: bool = opt(
        False, "each of several processes holds a part of the weights, and of gradients and optimizer state of what learns"
    )
    lowram: bool = opt(False, "load weights straight onto the device", inert="every part is always loaded that way")
    highvram: bool = opt(False, "keep the device's cache between batches of caching", inert="the cache is never cleared there")
    vae_batch_size: int = opt(1, "pictures per batch while latents are cached", minimum=1)

    @property
    def recomputes(self) -> bool:
        """Whether activations are computed again in the backward pass, through whichever flag."""
        return self.gradient_checkpointing or self.cpu_offload_checkpointing


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How long and in which portions is trained."""

    train_batch_size: int = opt(1, "pictures per step and device", minimum=1)
    gradient_accumulation_steps: int = opt(1, "batches per update of the weights", minimum=1)
    max_train_steps: int = opt(1600, "updates of the weights in all", minimum=1)
    max_train_epochs: int | None = opt(None, "passes over the data; goes before --max_train_steps", minimum=1)
    seed: int | None = opt(None, "seed of everything random; drawn, and told, unless given", minimum=0)
    max_token_length: int | None = opt(None, "longest caption in tokens; 75 unless given", choices=(75, 150, 225))
    clip_skip: int | None = opt(None, "take the output of this text encoder layer, counted from the end, 1 the last", minimum=1)
    max_data_loader_n_workers: int = opt(8, "processes that load pictures; 0 loads in the main one", minimum=0)
    persistent_data_loader_workers: bool = opt(False, "keep the loading processes between epochs", inert="they are always kept")
    ddp_timeout: int | None = opt(None, "minutes until a silent process counts as lost; accelerate's unless given", minimum=1)
    ddp_gradient_as_bucket_view: bool = opt(
        False,
        "let gradients share memory with what is exchanged between devices",
        inert="gradients are averaged in one exchange of their own, without DDP's buckets",
    )
    ddp_static_graph: bool = opt(
        False,
        "tell DDP that every step computes the same graph",
        inert="gradients are averaged without DDP, so that no graph has to be known",
    )


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """How weights are updated."""

    optimizer_type: str = opt("", "AdamW unless given; AdamW8bit, ..., a class of torch.optim, or a dotted path to one")
    optimizer_args: tuple[str, ...] | None = opt(None, "arguments of the optimizer: weight_decay=0.01 betas=0.9,0.999 ...")
    learning_rate: float = opt(2e-6, "learning rate of every part that has none of its own", minimum=0)
    max_grad_norm: float = opt(1.0, "clip the norm of all gradients to this; 0 does not clip", minimum=0)
    use_8bit_adam: bool = opt(False, "the same as --optimizer_type AdamW8bit")
    use_lion_optimizer: bool = opt(False, "the same as --optimizer_type Lion")
    fused_backward_pass: bool = opt(False, "step each weight as soon as its gradient is there, and free the gradient")
    fused_clip: str = opt(
        "each",
        "what --max_grad_norm limits then: each gradient alone, as in sd-scripts, or all together (computes every batch twice)",
        choices=("each", "all"),
    )

    @property
    def name(self) -> str:
        """The optimizer asked for, through whichever flag."""
        if self.optimizer_type:
            return self.optimizer_type
        return "AdamW8bit" if self.use_8bit_adam else "Lion" if self.use_lion_optimizer else "AdamW"


@dataclass(frozen=True, kw_only=True)
class ScheduleOptions:
    """How learning rates change over the run."""

    lr_scheduler: str = opt("constant", "schedule: constant, constant_with_warmup, linear, cosine, rex, ...")
    lr_scheduler_type: str = opt("", "dotted path to a scheduler class, instead of --lr_scheduler")
    lr_scheduler_args: tuple[str, ...] | None = opt(None, "arguments of that class: T_max=100 ...")
    lr_warmup_steps: int | float = opt(0, "steps until the full rate: a number, a ratio below 1, or 10%", type=steps_or_ratio)
    lr_decay_steps: int | float = opt(0, "steps of the final decay: a number, a ratio below 1, or 10%", type=steps_or_ratio)
    lr_scheduler_num_cycles: int = opt(1, "restarts of cosine_with_restarts", minimum=1)
    lr_scheduler_power: float = opt(1.0, "power of polynomial")
    lr_scheduler_timescale: int | None = opt(None, "time scale of inverse_sqrt; the warm-up's length unless given", minimum=1)
    lr_scheduler_min_lr_ratio: float | None = opt(
        None, "lowest rate, as a ratio, of cosine_with_min_lr, warmup_stable_decay and rex", minimum=0, maximum=1
    )


@dataclass(frozen=True, kw_only=True)
class NoiseOptions:
    """Which noise is added, and at which times."""

    noise_offset: float | None = opt(None, "add a random offset of this strength to each channel's noise; about 0.1")
    noise_offset_random_strength: bool = opt(False, "draw the offset's strength between 0 and --noise_offset")
    adaptive_noise_scale: float | None = opt(None, "raise --noise_offset by this times the latent's absolute mean")
    multires_noise_iterations: int | None = opt(None, "add noise at this many coarser resolutions; 6 to 10", minimum=0)
    multires_noise_discount: float = opt(0.3, "strength of each coarser noise against the one before")
    ip_noise_gamma: float | None = opt(None, "disturb the model's input by this, leaving the target; about 0.1")
    ip_noise_gamma_random_strength: bool = opt(False, "draw that strength between 0 and --ip_noise_gamma")
    zero_terminal_snr: bool = opt(False, "rescale the schedule so that its last step is pure noise")
    min_timestep: int | None = opt(None, "earliest time trained; 0 unless given", minimum=0, maximum=999)
    max_timestep: int | None = opt(None, "time training stays below; 1000 unless given", minimum=1, maximum=1000)


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """How an error becomes the loss."""

    loss_type: str = opt("l2", "distance between prediction and target", choices=("l1", "l2", "huber", "smooth_l1"))
    huber_schedule: str = opt(
        "snr", "how the threshold of huber and smooth_l1 depends on the time", choices=("constant", "exponential", "snr")
    )
    huber_c: float = opt(0.1, "threshold of huber and smooth_l1")
    huber_scale: float = opt(1.0, "factor on that threshold")
    min_snr_gamma: float | None = opt(None, "limit the weight of easy times by min-SNR with this gamma; 5 is usual", minimum=0)
    scale_v_pred_loss_like_noise_pred: bool = opt(False, "weight a v prediction's loss as a noise prediction's")
    v_pred_like_loss: float | None = opt(None, "add a v prediction's loss, times this, to a noise prediction's", minimum=0)
    debiased_estimation_loss: bool = opt(False, "weight the loss by debiased estimation")
    p2_gamma: float | None = opt(None, "weight the loss by P2 with this gamma, 0.5 to 1: favours much noise", minimum=0)
    p2_k: float = opt(1.0, "k of P2: bounds the weight where there is almost no signal", minimum=0)
    prior_loss_weight: float = opt(1.0, "weight of regularization pictures", minimum=0)
    preserve_prior: bool = opt(
        False,
        "pictures of --reg_data_dir keep what the untrained model predicts, instead of being learned; in a dataset file: "
        "custom_attributes = { diff_output_preservation = true }",
    )
    prior_choices: int = opt(
        8,
        "where the model itself is trained: of each such picture, so many views with noises and times are predicted before "
        "training, and seen in turn",
        minimum=1,
    )
    weighted_captions: bool = opt(False, "read weights in captions, as in (word:1.3)")
    masked_loss_normalize: bool = opt(
        False, "with masks, take the mean over what each leaves, so that pictures with small ones count as much as others"
    )
    masked_loss: bool = opt(False, "weight the loss by the mask pictures of conditioning_data_dir")
    alpha_mask: bool = opt(False, "weight the loss by the pictures' own opacity")
    conditioning_data_dir: str | None = opt(None, "folder of mask pictures, of the pictures' names")


@dataclass(frozen=True, kw_only=True)
class NetworkOptions:
    """The adapter network that is trained."""

    network_module: str | None = opt(None, "module that makes the network: networks.lora, lycoris.kohya, ...")
    network_dim: int | None = opt(None, "rank; 4 unless given", minimum=1)
    network_alpha: float = opt(1.0, "the network's output is scaled by alpha / rank; 0 stands for the rank", minimum=0)
    network_dropout: float | None = opt(None, "share of the network's inputs dropped in a step", minimum=0, maximum=1)
    network_args: tuple[str, ...] | None = opt(None, "arguments of the module: conv_dim=4 conv_alpha=1 ...")
    network_weights: str | None = opt(None, "network file that training starts from")
    dim_from_weights: bool = opt(False, "take the ranks from --network_weights")
    network_train_unet_only: bool = opt(False, "train the denoiser's part of the network only")
    network_train_text_encoder_only: bool = opt(False, "train the text encoder's part of the network only")
    unet_lr: float | None = opt(None, "learning rate of the denoiser's part", minimum=0)
    text_encoder_lr: tuple[float, ...] | None = opt(None, "learning rate of the text encoder's part, one for each", minimum=0)
    scale_weight_norms: float | None = opt(None, "scale layers whose weight norm exceeds this back to it", minimum=0)
    base_weights: tuple[str, ...] | None = opt(None, "network files merged into the base model before training")
    base_weights_multiplier: tuple[float, ...] | None = opt(None, "strength of each of --base_weights; 1 unless given")
    save_model_as: str = opt("safetensors", "format of saved networks", choices=("safetensors", "ckpt", "pt"))
    save_format: str = opt(
        "kohya",
        "whose names saved networks have: kohya (sd-scripts', which all UIs read), comfy, diffusers, or peft (a folder)",
        choices=("kohya", "diffusers", "peft", "comfy"),
    )
    fp8_base_unet: bool = opt(False, "keep the frozen denoiser in fp8, the text encoders not")

    @property
    def trains_text_encoder(self) -> bool:
        return not self.network_train_unet_only

    @property
    def trains_denoiser(self) -> bool:
        return not self.network_train_text_encoder_only


@dataclass(frozen=True, kw_only=True)
class FullOptions:
    """Training the model itself."""

    train_text_encoder: bool = opt(False, "train the text encoder, too")
    learning_rate_te: float | None = opt(None, "learning rate of the text encoder; --learning_rate unless given", minimum=0)
    stop_text_encoder_training: int | None = opt(
        None, "train the text encoder for this many steps; -1 or 0 not at all", minimum=-1
    )
    no_token_padding: bool = opt(
        False, "leave captions unpadded", inert="captions are always padded, as sd-scripts does by now, too"
    )
    save_model_as: str | None = opt(
        None,
        "format of saved models; the base model's unless given",
        choices=("ckpt", "safetensors", "diffusers", "diffusers_safetensors"),
    )
    use_safetensors: bool = opt(False, "save as safetensors where --save_model_as is not given")
    max_shard_size: int | None = opt(
        None, "divide saved weights into files of at most this size, such as 5GB, in a folder with an index", type=byte_size
    )
    diffusers_xformers: bool = opt(False, "the same as --attn_mode xformers")

    @property
    def trains_text_encoder(self) -> bool:
        """Whether the text encoder learns at any time of the run."""
        return self.train_text_encoder and (self.stop_text_encoder_training is None or self.stop_text_encoder_training > 0)


@dataclass(frozen=True, kw_only=True)
class DreamBoothPartOptions(FullOptions):
    """Training the model itself."""

    train_text_encoder: bool = opt(True, "train the text encoder, too")


@dataclass(frozen=True, kw_only=True)
class ValidationOptions:
    """Measuring the loss on pictures that are not trained on."""

    validation_split: float = opt(0.0, "share of the pictures kept for validation", minimum=0, maximum=1)
    validation_seed: int | None = opt(None, "seed that chooses them; --seed unless given")
    validate_every_n_steps: int | None = opt(None, "validate every so many steps", minimum=1)
    validate_every_n_epochs: int | None = opt(
        None, "validate every so many epochs; every one unless given, or --validate_every_n_steps is", minimum=1
    )
    max_validation_steps: int | None = opt(None, "most batches of one validation, spread over all", minimum=1)
    validation_quantiles: int = opt(
        9, "times at which each picture is validated, spread over those that are trained", minimum=1
    )
    save_best: bool = opt(False, "keep the model with the lowest validation loss, as NAME-best")
    early_stopping_patience: int | None = opt(None, "stop when so many validations in a row found no lower loss", minimum=1)


@dataclass(frozen=True, kw_only=True)
class AverageOptions:
    """An average of what learns, over the run."""

    ema: bool = opt(False, "keep an exponential moving average of what learns, saved beside it as NAME-ema")
    ema_decay: float = opt(
        0.999, "share of the average that a step leaves; 0.999 remembers about 1000 steps", minimum=0, maximum=1
    )
    ema_no_warmup: bool = opt(False, "use that share from the first step on, and not smaller ones at first")
    ema_update_every: int = opt(1, "take up the weights every so many steps only, with the share to that power", minimum=1)
    ema_on_cpu: bool = opt(False, "keep the average in main memory; raise --ema_update_every with it, as each update is a copy")
    ema_evaluate: bool = opt(False, "validate and make previews with the average")


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """What every training script takes."""

    model: ModelOptions = group(ModelOptions)
    data: DataOptions = group(DataOptions)
    cache: CacheOptions = group(CacheOptions)
    training: TrainingOptions = group(TrainingOptions)
    optimizer: OptimizerOptions = group(OptimizerOptions)
    schedule: ScheduleOptions = group(ScheduleOptions)
    noise: NoiseOptions = group(NoiseOptions)
    loss: LossOptions = group(LossOptions)
    precision: PrecisionOptions = group(PrecisionOptions)
    memory: MemoryOptions = group(MemoryOptions)
    attention: AttentionOptions = group(AttentionOptions)
    output: OutputOptions = group(OutputOptions)
    state: StateOptions = group(StateOptions)
    sampling: SamplingOptions = group(SamplingOptions)
    logging: LoggingOptions = group(LoggingOptions)
    metadata: MetadataOptions = group(MetadataOptions)
    validation: ValidationOptions = group(ValidationOptions)
    average: AverageOptions = group(AverageOptions)
    hub: HubOptions = group(HubOptions)
    deepspeed: DeepSpeedOptions = group(DeepSpeedOptions)
    family: Any = group(NoFamilyOptions)
    """The family's own group."""
    run: RunOptions = group(RunOptions)
    explicit: frozenset[str] = field(default=frozenset(), compare=False)
    """Names of the flags that were set, on the command line or in a file."""

    @property
    def batches_shown(self) -> int | None:
        """Batches that are shown instead of trained."""
        return self.run.show_batches or (10 if self.data.debug_dataset else None)

    @property
    def attention_modes(self) -> frozenset[str]:
        """The attention back ends that flags name; more than one is a contradiction."""
        return self.attention.chosen | self.family.attention_modes

    @property
    def attention_mode(self) -> str:
        """The one that is used, a key of `ATTENTION_BACKENDS`."""
        return min(self.attention_modes, default="sdpa")

    @property
    def denoiser_scheme(self) -> str | None:
        """How the frozen denoiser is quantised, through whichever flag."""
        return self.precision.quantize_base or ("fp8" if self.precision.fp8_base else None)

    @property
    def log_name(self) -> str:
        """What TensorBoard and wandb call the run, unless `--log_tracker_name` does; sd-scripts' names."""
        return "network_train"

    @property
    def fused_backward(self) -> bool:
        """Whether weights are stepped during the backward pass, through whichever flag."""
        return self.optimizer.fused_backward_pass or self.family.fused_backward

    @property
    def learns_in_shards(self) -> bool:
        """Whether each process steps a part of every weight that learns."""
        return False


@dataclass(frozen=True, kw_only=True)
class NetworkTrainOptions(TrainOptions):
    """What the scripts that train an adapter network take."""

    network: NetworkOptions = group(NetworkOptions)

    @property
    def denoiser_scheme(self) -> str | None:
        return super().denoiser_scheme or ("fp8" if self.network.fp8_base_unet else None)

    @property
    def live_text_scheme(self) -> str | None:
        """How text encoders are quantised whose outputs are not cached: sd-scripts reads them for the cache as they are."""
        both = self.precision.fp8_base and not self.network.fp8_base_unet
        return self.precision.quantize_text_encoders or (self.denoiser_scheme if both else None)


@dataclass(frozen=True, kw_only=True)
class FullTrainOptions(TrainOptions):
    """What the scripts that train the model itself take."""

    full: FullOptions = group(FullOptions)

    @property
    def attention_modes(self) -> frozenset[str]:
        return super().attention_modes | ({"xformers"} if self.full.diffusers_xformers else frozenset())

    @property
    def log_name(self) -> str:
        return "finetuning"

    @property
    def learns_in_shards(self) -> bool:
        return self.memory.shard_weights


@dataclass(frozen=True, kw_only=True)
class DreamBoothOptions(FullTrainOptions):
    """`train_db.py`: from picture folders, with the text encoder unless told otherwise."""

    full: DreamBoothPartOptions = group(DreamBoothPartOptions)

    @property
    def log_name(self) -> str:
        return "dreambooth"


@dataclass(frozen=True, kw_only=True)
class FineTuneOptions(FullTrainOptions):
    """`fine_tune.py`: from a metadata file, without the text encoder unless told otherwise."""
