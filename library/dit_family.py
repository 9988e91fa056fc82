"""What the transformer families share: a network in its original names that follows a flow."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from library.dit_layers import Denoiser
from library.dit_parts import DitLayout, DitModel, DitParams
from library.dit_saving import DitCheckpoint
from library.family_base import LatentSpec, ModelBundle, ModelFamily
from library.model_loading import lazy_bundle
from library.model_parts import Component, SaveSettings, enable_encoder_checkpointing
from library.objectives import RectifiedFlow, range_and_huber
from library.offload_plan import SwapDivision
from library.quantized_layers import Quantizer
from library.vae_parts import decode_latents

if TYPE_CHECKING:
    from library.dit_options import VelocityOptions
    from library.option_groups import TrainOptions


class DitFamily(ModelFamily):
    """A transformer that predicts the velocity of a flow."""

    flow_keys: ClassVar[tuple[str, ...]] = (
        "weighting_scheme", "logit_mean", "logit_std", "mode_scale", "timestep_sampling", "sigmoid_scale",
        "model_prediction_type", "discrete_flow_shift",
    )  # fmt: skip
    """Options that saved networks are told as `ss_...`."""

    layout: ClassVar[DitLayout]

    # ---- what a family says ------------------------------------------------------------------------------------------

    @abstractmethod
    def describe(self, options: TrainOptions) -> DitModel[DitParams]:
        """The model that `options` name, from headers and configuration files alone."""

    @abstractmethod
    def tokenizers(self, options: TrainOptions) -> dict[str, Path]:
        """Encoder -> where its tokenizer is; downloads it when that is what is left. Raises `UserError` when there is none."""

    @abstractmethod
    def checkpoint(self, **contents: Any) -> DitCheckpoint: ...

    def saving(self, options: TrainOptions) -> dict[str, Any]:
        """What `checkpoint` is told of the options."""
        return {}

    # ---- facts -------------------------------------------------------------------------------------------------------

    def latent(self, options: TrainOptions) -> LatentSpec:
        """Stored latents are scaled already, as sd-scripts stores them."""
        config = self.describe(options).parts["vae"].config
        return LatentSpec(
            channels=config.get("latent_channels", 16), stride=2 ** (len(config["block_out_channels"]) - 1), patch=2
        )

    def latent_scale(self, options: TrainOptions) -> tuple[float, float]:
        """(scale, shift) of the autoencoder's latents."""
        return self.layout.latent_scale(self.describe(options).parts["vae"])

    def source_format(self, options: TrainOptions) -> str:
        return self.describe(options).format

    def metadata(self, options: TrainOptions) -> dict[str, Any]:
        return {f"ss_{name}": getattr(options.family, name) for name in self.flow_keys}

    def head_widths(self, options: TrainOptions) -> Sequence[int]:
        return (self.describe(options).params.head_width,)

    def swap_division(self, options: TrainOptions) -> SwapDivision:
        return self.describe(options).params.swap_division

    # ---- the model ---------------------------------------------------------------------------------------------------

    def load(
        self,
        options: TrainOptions,
        *,
        device: torch.device,
        dtype: torch.dtype,
        learning: Mapping[str, torch.dtype] | None = None,
        quantizers: Mapping[str, Quantizer] | None = None,
    ) -> ModelBundle:
        model = self.describe(options)
        facts = {"tokenizers": self.tokenizers(options), "learning": frozenset(learning or ()), "saving": self.saving(options)}
        return lazy_bundle(model, options, device=device, dtype=dtype, learning=learning, quantizers=quantizers, facts=facts)

    def open_denoiser(self, path: Path) -> Component:
        return self.layout.open_denoiser(path)

    def open_parts(self, path: Path, others: Mapping[str, Path]) -> Mapping[str, Component]:
        return self.layout.open_parts(path, others)

    def enable_gradient_checkpointing(self, part: str, module: nn.Module) -> None:
        if isinstance(module, Denoiser):
            module.enable_gradient_checkpointing()
        else:
            enable_encoder_checkpointing(module)

    # ---- steps -------------------------------------------------------------------------------------------------------

    def objective(self, options: TrainOptions) -> RectifiedFlow:
        flags: VelocityOptions = options.family
        scaled = flags.model_prediction_type == "sigma_scaled"
        return RectifiedFlow(
            sampling=flags.timestep_sampling,
            sigmoid_scale=flags.sigmoid_scale,
            flow_shift=flags.discrete_flow_shift,
            density=flags.weighting_scheme,
            logit_mean=flags.logit_mean,
            logit_std=flags.logit_std,
            mode_scale=flags.mode_scale,
            weighting=flags.weighting_scheme if scaled else "none",
            data_error=scaled,
            loss_type=options.loss.loss_type,
            **range_and_huber(options.noise, options.loss),
        )

    def decode(self, vae: nn.Module, latents: Tensor, options: TrainOptions) -> Tensor:
        scale, shift = self.latent_scale(options)
        return decode_latents(vae, latents / scale + shift)

    # ---- saving ------------------------------------------------------------------------------------------------------

    def save_checkpoint(self, bundle: ModelBundle, path: Path, settings: SaveSettings) -> None:
        facts = bundle.facts
        changed = {"denoiser"} | facts["learning"] | bundle.changed
        self.checkpoint(
            model=facts["model"],
            modules={name: bundle.part(name) for name in sorted(changed) if bundle.loaded(name)},
            tokenizers=facts["tokenizers"],
            **facts["saving"],
        ).write(path, settings)
