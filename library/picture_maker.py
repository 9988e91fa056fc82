"""Prompts and a loaded model to pictures: what previews and `gen_img.py` both do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from library.buckets import Placement, Size, cover
from library.family_base import ModelBundle, ModelFamily, SampleRequest, SampleStart
from library.image_io import choose_crop, fit
from library.prompts import PromptLine, Side
from library.strategy_base import Conditioning, Strategies

if TYPE_CHECKING:
    import numpy as np

    from library.option_groups import TrainOptions


@contextmanager
def evaluation_mode(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Modules (and what is in them) in evaluation mode, each put back as it was."""
    before = [(module, module.training) for root in modules for module in root.modules()]
    for root in modules:
        root.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


@dataclass
class PictureMaker:
    """One model's prompts and pictures."""

    family: ModelFamily
    strategies: Strategies
    options: TrainOptions
    device: torch.device
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    _kept: dict[Side, Conditioning] = field(default_factory=dict)
    """On the CPU."""

    @property
    def side_step(self) -> int:
        """A picture's sides are multiples of it."""
        return self.family.latent(self.options).bucket_step

    def keep(self, bundle: ModelBundle, lines: Iterable[PromptLine], encoders: frozenset[str]) -> None:
        """Encode both sides of all prompts now, unless they are, with these encoders, which from then on need not be there for
        them."""
        for side in (side for line in lines for side in line.sides) if encoders else ():
            if side not in self._kept:
                self._kept[side] = self._encode(bundle, side, encoders).to("cpu")

    def forget(self) -> None:
        """What was kept is no longer what the encoders give."""
        self._kept.clear()

    def request(self, bundle: ModelBundle, lines: Sequence[PromptLine], seeds: Sequence[int]) -> SampleRequest:
        """A picture of each line, with its seed; but for their prompts, the lines are alike, and their size is one that can be
        made."""
        first = lines[0]
        sides = [
            [self._conditioning(bundle, side).rows(0) for side in alike]
            for alike in zip(*(line.sides for line in lines), strict=True)
        ]
        positive, negative = (type(rows[0]).collate(rows) for rows in sides)
        return SampleRequest(
            positive=positive,
            negative=negative,
            width=first.width,
            height=first.height,
            steps=first.sample_steps,
            guidance=self.family.preview_guidance(self.options) if first.scale is None else first.scale,
            sampler=first.sample_sampler or self.options.sampling.sample_sampler,
            seeds=tuple(seeds),
            extra=first.extra(),
        )

    def make(self, bundle: ModelBundle, denoiser: nn.Module, request: SampleRequest) -> list[Any]:
        """The request's pictures, PIL images. They are decoded one by one, as the decoder takes more memory than all else."""
        with self.autocast():
            latents = self.family.sample(denoiser, request, self.options, self.device)
        return [to_picture(self.family.decode(bundle.vae, row, self.options)[0]) for row in latents.split(1)]

    def begin_from(
        self, bundle: ModelBundle, pictures: Sequence[np.ndarray], request: SampleRequest, strength: float
    ) -> SampleRequest:
        """The request with `pictures` (uint8 [h, w, 3], one for each of its own) for a start, at its size."""
        spec = self.family.latent(self.options)
        images = torch.stack([_resized(picture, (request.width, request.height)) for picture in pictures])
        with torch.no_grad(), self.autocast():
            rows = [
                self.strategies.latents_caching.encode(bundle.vae, image, [seed])
                for image, seed in zip(images.to(self.device).split(1), request.seeds, strict=True)
            ]
        return replace(request, start=SampleStart(spec.normalize(torch.cat(rows).to(self.device)), strength))

    def _encode(self, bundle: ModelBundle, side: Side, only: frozenset[str]) -> Conditioning:
        tokenizer = self.strategies.tokenize.for_negatives() if side.negative else self.strategies.tokenize
        tokens = {name: ids.to(self.device) for name, ids in tokenizer.tokenize([side.text]).items()}
        encoders = {name: bundle.part(name) for name in sorted(only)}
        with torch.no_grad(), evaluation_mode(list(encoders.values())), self.autocast():
            return self.strategies.text_encoding.encode(encoders, tokens, only)

    def _conditioning(self, bundle: ModelBundle, side: Side) -> Conditioning:
        """Kept fields as they are, the others encoded now. [1, ...] on the device."""
        kept = self._kept.get(side)
        missing = frozenset(bundle.text_encoder_names) if kept is None else kept.missing()
        if not missing:
            assert kept is not None
            return kept.to(self.device)
        live = self._encode(bundle, side, missing)
        return live if kept is None else kept.to(self.device).merged(live)


def _resized(pixels: np.ndarray, size: Size) -> Tensor:
    """uint8 [h, w, 3] of any size -> [3, H, W] in [-1, 1]; what is too wide or too high is cut off evenly."""
    placement = Placement(size, cover((pixels.shape[1], pixels.shape[0]), size))
    cut = fit(pixels, placement, choose_crop(placement), None)
    return torch.from_numpy(cut.copy()).permute(2, 0, 1).float() / 127.5 - 1


def to_picture(image: Tensor) -> Any:
    """[3, H, W] in [-1, 1] -> a PIL image."""
    from PIL import Image

    pixels = (image.float().clamp(-1, 1) + 1) * 127.5
    return Image.fromarray(pixels.round().byte().permute(1, 2, 0).cpu().numpy())
