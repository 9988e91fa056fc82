"""SDXL as a model family."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from library.clip_tokenizer import CLIP, SD1_TOKENIZER, find_tokenizer
from library.errors import UserError
from library.sdxl_models import block_number, unused_modules
from library.sdxl_saving import SECOND_TOKENIZER, SdxlCheckpoint
from library.sdxl_utils import TITLE, check_flags, describe, ends_in_noise, predicts_v
from library.strategy_base import Strategies
from library.strategy_sdxl import (
    CLIP_L,
    OPEN_CLIP,
    SdxlConditioning,
    SdxlLatentsCachingStrategy,
    SdxlTextEncoderOutputsCachingStrategy,
    SdxlTextEncodingStrategy,
    SdxlTokenizeStrategy,
)
from library.unet_family import UnetFamily, run_unet
from library.unet_parts import UnetModel
from networks.lora_sdxl import ARCH

if TYPE_CHECKING:
    from library.batch import TrainBatch
    from library.option_groups import TrainOptions
    from networks.network_targets import NetworkArch

logger = logging.getLogger(__name__)


class SdxlFamily(UnetFamily):
    """SDXL: a UNet that is also told the picture's original size, its crop and its target size."""

    name: ClassVar[str] = "sdxl"
    title: ClassVar[str] = TITLE
    scripts: ClassVar[Mapping[str, str]] = {"network": "sdxl_train_network.py", "full": "sdxl_train.py"}
    arch: ClassVar[NetworkArch] = ARCH

    # ---- facts -------------------------------------------------------------------------------------------------------

    def describe(self, options: TrainOptions) -> UnetModel:
        return describe(options.model)

    def predicts_v(self, options: TrainOptions) -> bool:
        return predicts_v(self.describe(options), options.model, options.explicit)

    def ends_in_noise(self, options: TrainOptions) -> bool:
        return ends_in_noise(self.describe(options), options.noise.zero_terminal_snr, options.explicit)

    def check(self, options: TrainOptions) -> None:
        ends = self.ends_in_noise(options)
        check_flags(self.describe(options), options.model, options.explicit, zero_terminal_snr=ends)
        if options.loss.v_pred_like_loss and self.predicts_v(options):
            raise UserError("--v_pred_like_loss is for noise predictions, and this model predicts v. Remove it.")
        if options.loss.scale_v_pred_loss_like_noise_pred and not self.predicts_v(options):
            raise UserError(
                "--scale_v_pred_loss_like_noise_pred is for v predictions, and this model predicts noise. Remove it."
            )
        if ends and not self.predicts_v(options):
            logger.warning("--zero_terminal_snr for a model that predicts noise, which learns nothing at the last step.")
        super().check(options)

    def tokenizers(self, options: TrainOptions) -> dict[str, Path]:
        """Where there is no second one it is the first, padded with id 0: their words are the same."""
        path = self.describe(options).path
        folder = path if path.is_dir() else None
        cache, flag = options.model.tokenizer_cache_dir, options.model.tokenizer
        first = find_tokenizer(flag=flag, model_folder=folder, cache_dir=cache, hub_id=SD1_TOKENIZER)
        own = folder / SECOND_TOKENIZER if folder is not None and flag is None else None
        return {"tokenizer": first, SECOND_TOKENIZER: own if own is not None and CLIP.is_in(own) else first}

    def checkpoint(self, **contents: Any) -> SdxlCheckpoint:
        return SdxlCheckpoint(**contents)

    def base_model_version(self, options: TrainOptions) -> str:
        return "sdxl_base_v1-0"

    def modelspec_architecture(self, options: TrainOptions) -> str:
        return "stable-diffusion-xl-v1-base"

    def metadata(self, options: TrainOptions) -> dict[str, Any]:
        return {"ss_zero_terminal_snr": self.ends_in_noise(options)}

    # ---- the model ---------------------------------------------------------------------------------------------------

    def strategies(self, options: TrainOptions) -> Strategies:
        folders, parts = self.tokenizers(options), self.describe(options).parts
        first = self.clip_captions(options, CLIP_L, folders["tokenizer"])
        second = self.clip_captions(options, OPEN_CLIP, folders[SECOND_TOKENIZER])
        second = replace(second, tokenizer=replace(second.tokenizer, pad=0))
        shapes = {
            "hidden_state1": (first.length, parts[CLIP_L].config["hidden_size"]),
            "hidden_state2": (second.length, parts[OPEN_CLIP].config["hidden_size"]),
            "pool2": (parts[OPEN_CLIP].config["projection_dim"],),
        }
        return Strategies(
            tokenize=SdxlTokenizeStrategy(first, second),
            text_encoding=SdxlTextEncodingStrategy(eos=second.tokenizer.eos),
            latents_caching=SdxlLatentsCachingStrategy(),
            text_caching=SdxlTextEncoderOutputsCachingStrategy(shapes=shapes),
        )

    def unused_modules(self, part: str, module: nn.Module) -> tuple[nn.Module, ...]:
        return unused_modules(module) if part == CLIP_L else ()

    def own_group(self, part: str, parameter: str, options: TrainOptions) -> tuple[str, float] | None:
        """`--block_lr`."""
        rates = options.family.block_rates if part == "denoiser" else None
        if rates is None:
            return None
        block = block_number(parameter)
        return f"block{block}", rates[block]

    # ---- steps -------------------------------------------------------------------------------------------------------

    def predict(
        self,
        denoiser: nn.Module,
        x_t: Tensor,
        t: Tensor,
        cond: SdxlConditioning,
        batch: TrainBatch | None,
        options: TrainOptions,
    ) -> Tensor:
        context = torch.cat([cond.hidden_state1, cond.hidden_state2.to(cond.hidden_state1.dtype)], dim=-1)
        sizes = preview_sizes(x_t, self.latent(options).stride) if batch is None else batch_sizes(batch)
        return run_unet(denoiser, x_t, t, context, {"text_embeds": cond.pool2, "time_ids": sizes.to(x_t.device).float()})


def batch_sizes(batch: TrainBatch) -> Tensor:
    """[B, 6]: original height and width, what was cut off above and to the left, height and width that is trained."""
    return torch.cat([batch.original_sizes, batch.crop_top_lefts, batch.target_sizes], dim=1)


def preview_sizes(x_t: Tensor, stride: int) -> Tensor:
    """[B, 6]: those of a picture that is x_t's own size and not cropped."""
    height, width = (side * stride for side in x_t.shape[-2:])
    return torch.tensor([[height, width, 0, 0, height, width]], device=x_t.device).expand(len(x_t), 6)
