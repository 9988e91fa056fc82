"""Flags that only do something beside others: rows that `option_rules` makes warnings of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Dependent:
    """Flags that do nothing where `used` is false of the options; said where one of them differs from its default."""

    flags: tuple[str, ...]
    used: Callable[[Any], object]
    why: str
    """Ends the sentence that begins with their names and "no effect"."""


def _trackers(options: Any) -> object:
    return options.logging.log_with or options.logging.logging_dir


DEPENDENT = (
    Dependent(
        ("noise_offset_random_strength",),
        lambda o: o.noise.noise_offset is not None,
        "without --noise_offset, whose strength it draws",
    ),
    Dependent(
        ("ip_noise_gamma_random_strength",),
        lambda o: o.noise.ip_noise_gamma is not None,
        "without --ip_noise_gamma, whose strength it draws",
    ),
    Dependent(("multires_noise_discount",), lambda o: o.noise.multires_noise_iterations, "without --multires_noise_iterations"),
    Dependent(
        ("huber_schedule", "huber_c", "huber_scale"),
        lambda o: o.loss.loss_type in ("huber", "smooth_l1"),
        "without --loss_type huber or smooth_l1",
    ),
    Dependent(("p2_k",), lambda o: o.loss.p2_gamma, "without --p2_gamma"),
    Dependent(
        ("prior_loss_weight",),
        lambda o: o.data.reg_data_dir or o.data.dataset_config,
        "without regularization pictures (--reg_data_dir)",
    ),
    Dependent(
        ("masked_loss_normalize",),
        lambda o: o.loss.masked_loss or o.loss.alpha_mask or o.data.dataset_config,
        "without masks (--masked_loss, --alpha_mask)",
    ),
    Dependent(
        ("save_last_n_epochs", "save_last_n_epochs_state"),
        lambda o: o.output.save_every_n_epochs or o.output.save_n_epoch_ratio,
        "without --save_every_n_epochs",
    ),
    Dependent(
        ("save_last_n_steps", "save_last_n_steps_state"), lambda o: o.output.save_every_n_steps, "without --save_every_n_steps"
    ),
    Dependent(("save_last_n_epochs_state", "save_last_n_steps_state"), lambda o: o.state.save_state, "without --save_state"),
    Dependent(
        ("log_prefix", "log_tracker_name", "log_tracker_config", "log_config"),
        _trackers,
        "without a tracker (--logging_dir, --log_with)",
    ),
    Dependent(
        ("wandb_run_name", "wandb_api_key"), lambda o: o.logging.log_with in ("wandb", "all"), "without --log_with wandb"
    ),
    Dependent(("ema_decay", "ema_no_warmup", "ema_update_every", "ema_on_cpu"), lambda o: o.average.ema, "without --ema"),
    Dependent(
        ("training_comment",),
        lambda o: hasattr(o, "network") and not o.output.no_metadata,
        "on a whole model, whose metadata has no comment, and with --no_metadata",
    ),
    Dependent(("vae_batch_size",), lambda o: o.cache.latents, "without --cache_latents"),
    Dependent(("dynamo_backend",), lambda o: o.attention.torch_compile, "without --torch_compile"),
)

DEPENDENT_OF_FLOWS = (
    Dependent(("sample_sampler",), lambda o: False, "on a flow, whose previews are made with Euler's steps"),
    Dependent(
        ("logit_mean", "logit_std"),
        lambda o: o.family.weighting_scheme == "logit_normal",
        "without --weighting_scheme logit_normal",
    ),
    Dependent(("mode_scale",), lambda o: o.family.weighting_scheme == "mode", "without --weighting_scheme mode"),
)

DEPENDENT_OF_VELOCITIES = (
    Dependent(
        ("sigmoid_scale",),
        lambda o: o.family.timestep_sampling not in ("sigma", "uniform"),
        "with --timestep_sampling sigma and uniform",
    ),
    Dependent(
        ("discrete_flow_shift",),
        lambda o: o.family.timestep_sampling in ("sigma", "shift"),
        "but with --timestep_sampling sigma and shift",
    ),
)
