"""Lumina-Image-2.0 as a model family."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from library.clip_tokenizer import find_tokenizer
from library.dit_family import DitFamily
from library.dit_parts import DitLayout
from library.family_base import SampleRequest
from library.gemma2_parts import GEMMA2_KIND, GEMMA2_TOKENIZER, GEMMA2_TOKENIZER_FOLDER, load_gemma2_tokenizer
from library.lumina_models import Lumina
from library.lumina_saving import LuminaCheckpoint
from library.lumina_utils import GEMMA2, LAYOUT, LUMINA_LAYERS, TITLE, LuminaModel, describe
from library.quantization import LayerTable
from library.sampling import Predict, flow_levels, sample_flow
from library.strategy_base import Strategies
from library.strategy_lumina import (
    LuminaConditioning,
    LuminaLatentsCachingStrategy,
    LuminaTextEncoderOutputsCachingStrategy,
    LuminaTextEncodingStrategy,
    LuminaTokenizeStrategy,
)
from networks.lora_lumina import ARCH

if TYPE_CHECKING:
    from library.batch import TrainBatch
    from library.lumina_options import LuminaModelOptions
    from library.option_groups import TrainOptions
    from networks.network_targets import NetworkArch

PREVIEW_SHIFT = 6.0
"""Of the published scheduler; a prompt line's `--fs` goes before it."""
GUIDED_UNTIL, LARGEST_CHANGE = 0.25, 1.0
"""sd-scripts' `--ctr` and `--rcfg`, unless a prompt line says otherwise."""


class LuminaFamily(DitFamily):
    """Lumina-Image-2.0: a transformer that predicts data - noise, and counts time from noise to data."""

    name: ClassVar[str] = "lumina"
    title: ClassVar[str] = TITLE
    scripts: ClassVar[Mapping[str, str]] = {"network": "lumina_train_network.py", "full": "lumina_train.py"}
    arch: ClassVar[NetworkArch] = ARCH
    layout: ClassVar[DitLayout] = LAYOUT
    quantized_layers: ClassVar[LayerTable] = LUMINA_LAYERS

    # ---- facts -------------------------------------------------------------------------------------------------------

    def describe(self, options: TrainOptions) -> LuminaModel:
        return describe(options)

    def tokenizers(self, options: TrainOptions) -> dict[str, Path]:
        path = describe(options).path
        found = find_tokenizer(
            flag=options.model.tokenizer,
            model_folder=path if path.is_dir() else None,
            cache_dir=options.model.tokenizer_cache_dir,
            hub_id=GEMMA2_TOKENIZER,
            subfolder=GEMMA2_TOKENIZER_FOLDER,
            kind=GEMMA2_KIND,
        )
        return {GEMMA2: found}

    def checkpoint(self, **contents: Any) -> LuminaCheckpoint:
        return LuminaCheckpoint(**contents)

    def check(self, options: TrainOptions) -> None:
        self.tokenizers(options)

    def base_model_version(self, options: TrainOptions) -> str:
        return "lumina2"

    def modelspec_architecture(self, options: TrainOptions) -> str:
        return "lumina-2"

    def preview_guidance(self, options: TrainOptions) -> float:
        return 4.0

    # ---- the model ---------------------------------------------------------------------------------------------------

    def strategies(self, options: TrainOptions) -> Strategies:
        model = describe(options)
        flags: LuminaModelOptions = options.family
        length, (scale, shift) = flags.token_length, self.latent_scale(options)
        shapes = {"context": (length, model.parts[GEMMA2].config["hidden_size"]), "mask": (length,)}
        tokenizer = load_gemma2_tokenizer(self.tokenizers(options)[GEMMA2])
        return Strategies(
            tokenize=LuminaTokenizeStrategy(tokenizer, length, flags.system_prompt.strip()),
            text_encoding=LuminaTextEncodingStrategy(),
            latents_caching=LuminaLatentsCachingStrategy(scale=scale, shift=shift),
            text_caching=LuminaTextEncoderOutputsCachingStrategy(shapes=shapes),
        )

    def unused_modules(self, part: str, module: nn.Module) -> tuple[nn.Module, ...]:
        """The text encoder's last layer and norm: what is taken of it is the input of the former."""
        encoder: Any = module
        return (encoder.layers[-1], encoder.norm) if part == GEMMA2 else ()

    # ---- steps -------------------------------------------------------------------------------------------------------

    def predict(
        self,
        denoiser: nn.Module,
        x_t: Tensor,
        t: Tensor,
        cond: LuminaConditioning,
        batch: TrainBatch | None,
        options: TrainOptions,
    ) -> Tensor:
        return velocity(denoiser, x_t, t, cond)

    def sample(self, denoiser: nn.Module, request: SampleRequest, options: TrainOptions, device: torch.device) -> Tensor:
        """`--l` guides with the negative prompt, `--ctr` says how long, `--rcfg` how far; `--fs` is the shift of times."""
        spec, extra = self.latent(options), request.extra
        both: LuminaConditioning = request.both(device)
        both = both.fitted(both.mask.sum(1).tolist())

        def predict(x_t: Tensor, t: Tensor) -> Tensor:
            """One row for each of x_t's: the positive prompts, then, when guided, the negative ones."""
            return velocity(denoiser, x_t, t, both.rows(slice(0, len(x_t)))).float()

        until, largest = extra.get("cfg_trunc_ratio", GUIDED_UNTIL), extra.get("renorm_cfg", LARGEST_CHANGE)
        return sample_flow(
            predict if request.guidance == 1 else guided(predict, request.guidance, until=until, largest=largest),
            flow_levels(request.steps, extra.get("flow_shift", PREVIEW_SHIFT)),
            (request.count, spec.channels, request.height // spec.stride, request.width // spec.stride),
            seed=request.seeds,
            device=device,
            start=request.start,
        )


def velocity(denoiser: nn.Module, x_t: Tensor, t: Tensor, cond: LuminaConditioning) -> Tensor:
    """noise - data for latents x_t [B, C, h, w] at t [B], 1 = noise. The network has both the other way round."""
    model = cast(Lumina, denoiser)
    mask = None if cond.whole else cond.mask.bool()
    out: Tensor = denoiser(x_t.to(model.dtype), 1 - t.float(), cond.context.to(model.dtype), mask)
    return -out


def guided(both: Predict, guidance: float, *, until: float, largest: float) -> Predict:
    """Classifier-free guidance as Lumina-Image-2.0 has it: only while less than `until` of the noise is gone, and never longer
    than `largest` times what the prompt alone gives (0: however long). `both` as for `sampling.guided_pair`."""

    def predict(x: Tensor, t: Tensor) -> Tensor:
        if 1 - float(t[0]) >= until:
            return both(x, t)
        positive, negative = both(torch.cat([x, x]), torch.cat([t, t])).chunk(2)
        made = negative + guidance * (positive - negative)
        if largest <= 0:
            return made
        lengths, limits = (torch.linalg.vector_norm(side, dim=(1, 2, 3), keepdim=True) for side in (made, positive))
        return made * (largest * limits / lengths).clamp(max=1)

    return predict
