"""Stable Diffusion 1.x/2.x as a model family."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from library.clip_tokenizer import SD1_TOKENIZER, SD2_TOKENIZER, find_tokenizer
from library.sd_saving import SdCheckpoint
from library.sd_utils import TITLE, SdModel, check_flags, describe
from library.strategy_base import Strategies
from library.strategy_sd import (
    TEXT_ENCODER,
    SdConditioning,
    SdLatentsCachingStrategy,
    SdTextEncoderOutputsCachingStrategy,
    SdTextEncodingStrategy,
    SdTokenizeStrategy,
)
from library.unet_family import UnetFamily, run_unet
from networks.lora_sd import ARCH

if TYPE_CHECKING:
    from library.batch import TrainBatch
    from library.option_groups import TrainOptions
    from networks.network_targets import NetworkArch


class SdFamily(UnetFamily):
    """Stable Diffusion 1.x/2.x: a UNet that predicts noise or v, conditioned on CLIP's hidden states."""

    name: ClassVar[str] = "sd"
    title: ClassVar[str] = TITLE
    scripts: ClassVar[Mapping[str, str]] = {"network": "train_network.py", "full": "train_db.py", "metadata": "fine_tune.py"}
    arch: ClassVar[NetworkArch] = ARCH
    usual_side: ClassVar[int] = 512

    def describe(self, options: TrainOptions) -> SdModel:
        return describe(options.model)

    def check(self, options: TrainOptions) -> None:
        check_flags(self.describe(options), options.model, zero_terminal_snr=options.noise.zero_terminal_snr)
        super().check(options)

    def tokenizers(self, options: TrainOptions) -> dict[str, Path]:
        model = self.describe(options)
        found = find_tokenizer(
            flag=options.model.tokenizer,
            model_folder=model.path if model.path.is_dir() else None,
            cache_dir=options.model.tokenizer_cache_dir,
            hub_id=SD1_TOKENIZER if model.version == "v1" else SD2_TOKENIZER,
            subfolder=None if model.version == "v1" else "tokenizer",
        )
        return {"tokenizer": found}

    def checkpoint(self, **contents: Any) -> SdCheckpoint:
        return SdCheckpoint(**contents)

    def base_model_version(self, options: TrainOptions) -> str:
        suffix = "_v" if options.model.v_parameterization else ""
        return f"sd_{self.describe(options).version}{suffix}"

    def modelspec_architecture(self, options: TrainOptions) -> str:
        if self.describe(options).version == "v1":
            return "stable-diffusion-v1"
        return "stable-diffusion-v2-768-v" if options.model.v_parameterization else "stable-diffusion-v2-512"

    def strategies(self, options: TrainOptions) -> Strategies:
        captions = self.clip_captions(options, TEXT_ENCODER, self.tokenizers(options)["tokenizer"])
        width = self.describe(options).text_encoder.config["hidden_size"]
        return Strategies(
            tokenize=SdTokenizeStrategy(captions),
            text_encoding=SdTextEncodingStrategy(clip_skip=options.training.clip_skip),
            latents_caching=SdLatentsCachingStrategy(),
            text_caching=SdTextEncoderOutputsCachingStrategy(shapes={"context": (captions.length, width)}),
        )

    def predict(
        self,
        denoiser: nn.Module,
        x_t: Tensor,
        t: Tensor,
        cond: SdConditioning,
        batch: TrainBatch | None,
        options: TrainOptions,
    ) -> Tensor:
        return run_unet(denoiser, x_t, t, cond.context)
