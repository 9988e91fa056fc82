"""Stable Diffusion 3 and 3.5 as a model family."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from library.clip_text import ClipCaptions
from library.clip_tokenizer import load_clip_tokenizer
from library.dit_family import DitFamily
from library.dit_parts import DitLayout
from library.dit_text import find_tokenizers
from library.errors import UserError
from library.family_base import LatentSpec, SampleRequest
from library.objectives import RectifiedFlow, range_and_huber
from library.quantization import LayerTable
from library.run_plan import plan_of
from library.sampling import guided_pair, sample_flow, shifted_levels
from library.sd3_models import Sd3
from library.sd3_saving import Sd3Checkpoint
from library.sd3_utils import LAYOUT, SD3_LAYERS, TITLE, Sd3Model, describe
from library.strategy_base import Strategies
from library.strategy_dit import CLIP_G, CLIP_L, T5XXL
from library.strategy_sd3 import (
    Sd3ClipConditioning,
    Sd3Conditioning,
    Sd3LatentsCachingStrategy,
    Sd3TextEncoderOutputsCachingStrategy,
    Sd3TextEncodingStrategy,
    Sd3TokenizeStrategy,
)
from library.t5_parts import load_t5_tokenizer
from networks.lora_sd3 import ARCH

if TYPE_CHECKING:
    from library.batch import TrainBatch
    from library.option_groups import TrainOptions
    from library.sd3_options import Sd3Options
    from networks.network_targets import NetworkArch

logger = logging.getLogger(__name__)

PREVIEW_SHIFT = 3.0
_GUIDANCE = {"m": 7.0, "5-medium": 4.5, "5-large": 3.5}
"""What the models are published with."""
_BLOCK = re.compile(r"joint_blocks\.(\d+)\.")


class Sd3Family(DitFamily):
    """SD3 medium, SD3.5 medium, large and large-turbo: a transformer of joint text and image blocks."""

    name: ClassVar[str] = "sd3"
    title: ClassVar[str] = TITLE
    scripts: ClassVar[Mapping[str, str]] = {"network": "sd3_train_network.py", "full": "sd3_train.py"}
    arch: ClassVar[NetworkArch] = ARCH
    layout: ClassVar[DitLayout] = LAYOUT
    quantized_layers: ClassVar[LayerTable] = SD3_LAYERS
    flow_keys: ClassVar[tuple[str, ...]] = (
        "weighting_scheme", "logit_mean", "logit_std", "mode_scale", "training_shift", "apply_lg_attn_mask",
        "apply_t5_attn_mask",
    )  # fmt: skip

    # ---- facts -------------------------------------------------------------------------------------------------------

    def describe(self, options: TrainOptions) -> Sd3Model:
        return describe(options)

    def latent(self, options: TrainOptions) -> LatentSpec:
        """Stored latents are the VAE's own, as sd-scripts stores them."""
        scale, shift = self.latent_scale(options)
        return replace(super().latent(options), scale=scale, shift=shift, patch=describe(options).params.patch)

    def tokenizers(self, options: TrainOptions) -> dict[str, Path]:
        model = describe(options)
        return find_tokenizers(
            options, model.path, {n: part for n, part in LAYOUT.text_parts(model.params).items() if n in model.parts}
        )

    def checkpoint(self, **contents: Any) -> Sd3Checkpoint:
        return Sd3Checkpoint(**contents)

    def saving(self, options: TrainOptions) -> dict[str, Any]:
        return {"beside": options.family.saved_text}

    def check(self, options: TrainOptions) -> None:
        model = describe(options)
        self.tokenizers(options)
        flags: Sd3Options = options.family
        for flag in ("enable_scaled_pos_embed", "pos_emb_random_crop_rate"):
            if getattr(flags, flag) and model.kind != "5-medium":
                raise UserError(
                    f"--{flag} is for SD3.5 medium, whose table of positions was trained in all its parts, and {model.path} is "
                    "another model. Remove it."
                )
        frozen = getattr(flags, "num_last_block_to_freeze", None) or 0
        if frozen >= model.params.num_blocks:
            raise UserError(f"--num_last_block_to_freeze {frozen}: the model has {model.params.num_blocks} blocks.")
        if T5XXL not in model.parts:
            self._check_without_t5(model, options)

    def _check_without_t5(self, model: Sd3Model, options: TrainOptions) -> None:
        if T5XXL in plan_of(options, "full" if hasattr(options, "full") else "network").learning_parts(self):
            raise UserError(
                "text encoders learn, T5 among them (train_t5xxl, or a foreign network), and there is no T5 in the model. Give "
                "one as --t5xxl, or leave it out; --network_train_unet_only leaves out all."
            )
        logger.info("%s has no T5 and --t5xxl is not given: its part of the text is zeros", model.path)
        for flag in ("t5_dropout_rate", "apply_t5_attn_mask"):
            if getattr(options.family, flag):
                logger.warning("--%s has no effect: there is no T5.", flag)

    def base_model_version(self, options: TrainOptions) -> str:
        return describe(options).kind

    def modelspec_architecture(self, options: TrainOptions) -> str:
        kind = describe(options).kind
        return f"stable-diffusion-3-{'medium' if kind == 'm' else kind}"

    def preview_guidance(self, options: TrainOptions) -> float:
        model = describe(options)
        return 1.0 if model.is_turbo else _GUIDANCE[model.kind]

    # ---- the model ---------------------------------------------------------------------------------------------------

    def strategies(self, options: TrainOptions) -> Strategies:
        model, folders = describe(options), self.tokenizers(options)
        flags: Sd3Options = options.family
        first, second = (_captions(model, name, folders[name]) for name in (CLIP_L, CLIP_G))
        second = replace(second, tokenizer=replace(second.tokenizer, pad=0))
        conditioning = Sd3Conditioning if T5XXL in folders else Sd3ClipConditioning
        length = flags.t5xxl_max_token_length
        return Strategies(
            tokenize=Sd3TokenizeStrategy(
                first, second, load_t5_tokenizer(folders[T5XXL]) if T5XXL in folders else None, length
            ),
            text_encoding=Sd3TextEncodingStrategy(
                conditioning, {CLIP_L: first.tokenizer.eos, CLIP_G: second.tokenizer.eos}, flags.apply_t5_attn_mask
            ),
            latents_caching=Sd3LatentsCachingStrategy(),
            text_caching=Sd3TextEncoderOutputsCachingStrategy(
                conditioning=conditioning,
                mask_clip=flags.apply_lg_attn_mask,
                mask_t5=flags.apply_t5_attn_mask,
                shapes=_entry_shapes(model, {CLIP_L: first.length, CLIP_G: second.length, T5XXL: length}),
            ),
        )

    def unused_modules(self, part: str, module: nn.Module) -> tuple[nn.Module, ...]:
        return module.unused_modules() if isinstance(module, Sd3) else ()

    def own_group(self, part: str, parameter: str, options: TrainOptions) -> tuple[str, float] | None:
        """`--num_last_block_to_freeze`."""
        frozen = options.family.num_last_block_to_freeze
        block = _BLOCK.match(parameter) if part == "denoiser" and frozen else None
        if block is None or int(block[1]) < describe(options).params.num_blocks - frozen:
            return None
        return "frozen", 0.0

    # ---- steps -------------------------------------------------------------------------------------------------------

    def objective(self, options: TrainOptions) -> RectifiedFlow:
        """The error of the data that a prediction implies, weighted by `--weighting_scheme`."""
        flags: Sd3Options = options.family
        return RectifiedFlow(
            sampling="density",
            flow_shift=flags.training_shift,
            density=flags.weighting_scheme,
            logit_mean=flags.logit_mean,
            logit_std=flags.logit_std,
            mode_scale=flags.mode_scale,
            weighting=flags.weighting_scheme,
            data_error=True,
            loss_type=options.loss.loss_type,
            **range_and_huber(options.noise, options.loss),
        )

    def predict(
        self,
        denoiser: nn.Module,
        x_t: Tensor,
        t: Tensor,
        cond: Sd3ClipConditioning,
        batch: TrainBatch | None,
        options: TrainOptions,
    ) -> Tensor:
        """Rows of `batch` lose what their chances say: encoders, and the place of their positions."""
        flags: Sd3Options = options.family
        chances = {} if batch is None else batch.chances
        for name in cond.sources() & chances.keys():
            if rate := flags.dropout_rates[name]:
                cond = cond.without(name, chances[name] < rate)
        model = cast(Sd3, denoiser)
        text = cond.joined(
            model.params.context_width,
            flags.t5xxl_max_token_length,
            mask_clip=flags.apply_lg_attn_mask,
            mask_t5=flags.apply_t5_attn_mask,
        )
        out: Tensor = denoiser(
            x_t.to(model.dtype),
            t.float(),
            text.context.to(model.dtype),
            text.pooled.to(model.dtype),
            model.positions_of(x_t, chances, scaled=flags.enable_scaled_pos_embed, crop_rate=flags.pos_emb_random_crop_rate),
        )
        return out

    def sample(self, denoiser: nn.Module, request: SampleRequest, options: TrainOptions, device: torch.device) -> Tensor:
        """`--l` above 1 guides with the negative prompt; `--fs` is the shift of times."""
        spec = self.latent(options)
        both = request.both(device)

        def predict(x_t: Tensor, t: Tensor) -> Tensor:
            """One row for each of x_t's: the positive prompts, then, when guided, the negative ones."""
            return self.predict(denoiser, x_t, t, both.rows(slice(0, len(x_t))), None, options).float()

        return sample_flow(
            predict if request.guidance == 1 else guided_pair(predict, request.guidance),
            shifted_levels(request.steps, request.extra.get("flow_shift", PREVIEW_SHIFT)),
            (request.count, spec.channels, request.height // spec.stride, request.width // spec.stride),
            seed=request.seeds,
            device=device,
            start=request.start,
        )


def _captions(model: Sd3Model, name: str, folder: Path) -> ClipCaptions:
    size = model.parts[name].config.get("max_position_embeddings", 77)
    return ClipCaptions(load_clip_tokenizer(folder), size - 2, size)


def _entry_shapes(model: Sd3Model, lengths: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """What the text encoders give for one caption. lengths: tokens, by text encoder."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name in (CLIP_L, CLIP_G):
        config, side, length = model.parts[name].config, name[-1], lengths[name]
        shapes[f"{side}_out"] = (length, config["hidden_size"])
        shapes[f"{side}_pooled"] = (config["projection_dim"],)
        shapes[f"{side}_mask"] = (length,)
    if T5XXL in model.parts:
        shapes |= {"t5_out": (lengths[T5XXL], model.parts[T5XXL].config["d_model"]), "t5_attn_mask": (lengths[T5XXL],)}
    return shapes
