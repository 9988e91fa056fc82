"""What learns, at which rate and in which precision: decided from the options, before anything is loaded."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Literal, cast

import torch

from library.eight_bit import check_eight_bit
from library.errors import UserError
from library.family_base import ModelBundle, ModelFamily
from library.optimizers import LearningRates
from library.quantization import TEXT_LAYERS
from library.quantized_layers import Quantizer
from library.run_setup import compute_dtype, learning_dtype
from library.trainable import (
    DENOISER,
    AdapterTrainable,
    FullTrainable,
    Trainable,
    merge_base_weights,
    saved_format,
    split_pairs,
)

if TYPE_CHECKING:
    from library.option_groups import FullTrainOptions, NetworkTrainOptions, TrainOptions
    from networks.external import NetworkModule

Mode = Literal["network", "full"]


class RunPlan(ABC):
    """One of the two ways to train."""

    rates: LearningRates
    frozen_dtype: torch.dtype

    @abstractmethod
    def learning_dtypes(self, family: ModelFamily) -> dict[str, torch.dtype]:
        """Part of the model -> the dtype it learns in; an adapter's parts stay frozen and are not among them."""

    @abstractmethod
    def learning_parts(self, family: ModelFamily) -> frozenset[str]:
        """Parts of the model whose outputs change as training goes on."""

    @abstractmethod
    def check(self, family: ModelFamily) -> None:
        """Raise `UserError` for what can be known to be wrong without a model."""

    @abstractmethod
    def quantizers(self, family: ModelFamily, device: torch.device) -> dict[str, Quantizer]:
        """How each part is kept that is not kept as it is. Raises `UserError` for what `family` or `device` cannot do."""

    def prepare(self, bundle: ModelBundle, family: ModelFamily) -> None:
        """Make the model the one that is trained on, before anything it gives is cached."""
        return

    @abstractmethod
    def build(self, family: ModelFamily, bundle: ModelBundle, options: TrainOptions) -> Trainable:
        """`options`: as the run has them, with the seed filled in."""


def plan_of(options: TrainOptions, mode: Mode) -> RunPlan:
    if mode == "network":
        return NetworkPlan(cast("NetworkTrainOptions", options))
    return FullPlan(cast("FullTrainOptions", options))


def _rates(learning_rate: float, unet: float | None, text: float | list[float] | tuple[float, ...] | None) -> LearningRates:
    """One text encoder rate stands for all encoders; a list gives each its own."""
    if text is None:
        text = ()
    values = tuple(text) if isinstance(text, (list, tuple)) else (text,)
    return LearningRates(default=learning_rate, denoiser=unet, text_encoders=values)


def _text_quantizer(scheme: str | None) -> Quantizer | None:
    return None if scheme is None else Quantizer(scheme, TEXT_LAYERS)


class NetworkPlan(RunPlan):
    """An adapter network on a model that stays frozen in the compute dtype."""

    def __init__(self, options: NetworkTrainOptions) -> None:
        self.options = options
        network = options.network
        self.rates = _rates(options.optimizer.learning_rate, network.unet_lr, network.text_encoder_lr)
        self.frozen_dtype = compute_dtype(options.precision)

    def learning_dtypes(self, family: ModelFamily) -> dict[str, torch.dtype]:
        return {}

    def learning_parts(self, family: ModelFamily) -> frozenset[str]:
        network = self.options.network
        denoiser = {DENOISER} if network.trains_denoiser else set()
        text = self._module(family).text_parts(family.arch.text_parts, self._arguments) if network.trains_text_encoder else ()
        return frozenset(denoiser | set(text))

    def quantizers(self, family: ModelFamily, device: torch.device) -> dict[str, Quantizer]:
        options = self.options
        cached = set(family.arch.text_parts) - self.learning_parts(family) if options.cache.text_outputs else set()
        always = _text_quantizer(options.precision.quantize_text_encoders)
        live = _text_quantizer(options.live_text_scheme)
        found = {part: always if part in cached else live for part in family.arch.text_parts}
        chosen = {part: quantizer for part, quantizer in found.items() if quantizer} | self._denoiser_quantizer(family, device)
        if chosen and options.network.base_weights and not self._module(family).merges_into_quantized:
            raise UserError(
                f"--base_weights: {options.network.network_module} merges into whole weights, and this model's "
                f"({', '.join(sorted(chosen))}) are quantised. Merge them into the model's file first, or leave --fp8_base, "
                "--quantize_base and --quantize_text_encoders out."
            )
        return chosen

    def _denoiser_quantizer(self, family: ModelFamily, device: torch.device) -> dict[str, Quantizer]:
        scheme, eight_bit = self.options.denoiser_scheme, self.options.precision.quantized_compute == "8bit"
        if scheme is None:
            return {}
        if family.quantized_layers is None:
            raise UserError(f"--quantize_base {scheme}: not implemented for {family.title} yet. Remove it and --fp8_base.")
        if eight_bit:
            check_eight_bit(scheme, device)
        return {DENOISER: Quantizer(scheme, family.quantized_layers, eight_bit=eight_bit, device=device)}

    @property
    def _arguments(self) -> dict[str, str]:
        return split_pairs(self.options.network.network_args or (), "--network_args")

    def _module(self, family: ModelFamily) -> NetworkModule:
        from networks.external import load_network_module

        return load_network_module(self.options.network.network_module or "").for_arch(family.arch)

    def prepare(self, bundle: ModelBundle, family: ModelFamily) -> None:
        if not self.options.network.base_weights:
            return
        merge_base_weights(self._module(family), bundle, self.options.network)

    def check(self, family: ModelFamily) -> None:
        self._module(family).text_parts((), self._arguments)

    def build(self, family: ModelFamily, bundle: ModelBundle, options: TrainOptions) -> Trainable:
        return AdapterTrainable.create(family, bundle, cast("NetworkTrainOptions", options))


class FullPlan(RunPlan):
    """The denoiser, and the text encoders where asked for; frozen parts are kept in the compute dtype."""

    def __init__(self, options: FullTrainOptions) -> None:
        self.options = options
        text = options.family.text_encoder_rates(options.full.learning_rate_te)
        self.rates = LearningRates(options.optimizer.learning_rate, None, text)
        self.frozen_dtype = compute_dtype(options.precision)

    def learning_dtypes(self, family: ModelFamily) -> dict[str, torch.dtype]:
        parts = {DENOISER} if self.options.family.denoiser_learns(self.rates.of_denoiser) else set()
        if self.options.full.trains_text_encoder:
            text = family.arch.text_parts
            parts |= {part for part in text if self.rates.of_text_encoder(part, text)[1]}
        return {part: learning_dtype(self.options.precision) for part in sorted(parts)}

    def learning_parts(self, family: ModelFamily) -> frozenset[str]:
        return frozenset(self.learning_dtypes(family))

    def quantizers(self, family: ModelFamily, device: torch.device) -> dict[str, Quantizer]:
        quantizer = _text_quantizer(self.options.precision.quantize_text_encoders)
        frozen = set(family.arch.text_parts) - self.learning_parts(family)
        return {part: quantizer for part in sorted(frozen)} if quantizer else {}

    def check(self, family: ModelFamily) -> None:
        if not self.learning_dtypes(family):
            raise UserError("every learning rate is 0, so nothing would learn. Set --learning_rate.")
        full = self.options.full
        if full.max_shard_size is not None and saved_format(full, family.source_format(self.options)) == "ckpt":
            raise UserError(
                f"--max_shard_size {full.max_shard_size:,}: a ckpt is always one file. "
                "Add --save_model_as safetensors, or remove --max_shard_size."
            )

    def build(self, family: ModelFamily, bundle: ModelBundle, options: TrainOptions) -> Trainable:
        return FullTrainable(family, bundle, self.learning_parts(family), self.options)
