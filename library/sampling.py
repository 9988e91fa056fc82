"""Preview pictures: one sampler loop for every diffusion family, and the writer that runs prompts through it.

Shapes: B batch, C latent channels, h x w latent pixels, H x W pixels.
"""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from library.checkpoint import atomic_write
from library.errors import UserError, suggest
from library.family_base import ModelBundle, ModelFamily, SampleRequest
from library.lean_imports import diffusers_class
from library.objectives import shift_time
from library.prompts import PromptLine, parse_prompts
from library.rng import key_to_seed
from library.strategy_base import Conditioning, Strategies

if TYPE_CHECKING:
    from library.option_groups import SamplingOptions, TrainOptions

logger = logging.getLogger(__name__)

Predict = Callable[[Tensor, Tensor], Tensor]
"""(x_t [B, C, h, w], t [B]) -> the objective's target, same shape; guidance is folded in."""

LARGEST_SIGMA_SQUARED = 2.0**24
"""Where a zero-terminal-SNR schedule is cut off: its last noise level would be infinite for samplers that count in sigmas."""


class DiscreteObjective(Protocol):
    """What a sampler has to know of a DDPM objective (`objectives.DiscreteDDPM`)."""

    @property
    def betas(self) -> Tensor: ...
    @property
    def v_prediction(self) -> bool: ...
    @property
    def zero_terminal_snr(self) -> bool: ...


_LEADING = {"steps_offset": 1, "set_alpha_to_one": False}
"""As in the scheduler files Stable Diffusion models are published with."""

SCHEDULERS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "ddim": ("DDIMScheduler", _LEADING | {"clip_sample": False}),
    "pndm": ("PNDMScheduler", _LEADING | {"skip_prk_steps": True}),
    "lms": ("LMSDiscreteScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm_2": ("KDPM2DiscreteScheduler", {}),
    "dpm_2_a": ("KDPM2AncestralDiscreteScheduler", {}),
    "dpmsolver": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}),
    "dpmsolver++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpmsingle": ("DPMSolverSinglestepScheduler", {}),
}
"""sd-scripts' sampler names -> diffusers class and what it is made with. `k_` before a name changes nothing."""


def _diffusers_class(name: str) -> tuple[type[Any], Mapping[str, Any]]:
    found = SCHEDULERS.get(name.lower().removeprefix("k_"))
    if found is None:
        raise UserError(f"unknown sampler '{name}'. Known: {', '.join(SCHEDULERS)}.{suggest(name, SCHEDULERS)}")
    class_name, arguments = found
    cls = diffusers_class(class_name)
    if hasattr(cls, "_backends"):  # diffusers' stand-in for a class whose packages are not installed
        raise UserError(f"the sampler '{name}' needs a package that is not installed: pip install scipy. Or choose another.")
    return cls, arguments


def make_scheduler(name: str, objective: DiscreteObjective) -> Any:
    """A diffusers scheduler over the very schedule that is trained, with its prediction type.

    With zero terminal SNR the first step is the noisiest one ("trailing" spacing), as Lin et al. 2023 ask for.
    """
    cls, arguments = _diffusers_class(name)
    betas = objective.betas.double().clone()
    arguments = dict(arguments)
    if objective.zero_terminal_snr:
        before = (1 - betas[:-1]).prod()
        betas[-1] = 1 - 1 / (LARGEST_SIGMA_SQUARED * before)
        if "timestep_spacing" in inspect.signature(cls.__init__).parameters:  # the others begin there anyway
            arguments["timestep_spacing"] = "trailing"
    return cls(
        num_train_timesteps=len(betas),
        trained_betas=betas.tolist(),
        prediction_type="v_prediction" if objective.v_prediction else "epsilon",
        **arguments,
    )


def guided(conditional: Predict, unconditional: Predict, guidance: float) -> Predict:
    """Classifier-free guidance (Ho & Salimans 2022): u + guidance (c - u). At 1 only the conditional prediction is run."""
    if guidance == 1:
        return conditional

    def predict(x: Tensor, t: Tensor) -> Tensor:
        base = unconditional(x, t)
        return base + guidance * (conditional(x, t) - base)

    return predict


def guided_pair(both: Predict, guidance: float) -> Predict:
    """The same in one call: `both` gets every row twice, first all for the positive prompt, then all for the negative one."""

    def predict(x: Tensor, t: Tensor) -> Tensor:
        positive, negative = both(torch.cat([x, x]), torch.cat([t, t])).chunk(2)
        return negative + guidance * (positive - negative)

    return predict


@torch.no_grad()
def sample_diffusion(
    predict: Predict, scheduler: Any, shape: tuple[int, ...], *, steps: int, seed: int, device: torch.device | str
) -> Tensor:
    """Latents of `shape`, float32 on `device`, sampled in `steps` steps with `scheduler` (see `make_scheduler`).

    All noise is made on the CPU from `seed`, so that a seed is the same picture on every device.
    """
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(shape, generator=generator).to(device)
    scheduler.set_timesteps(steps, device=device)
    latents = latents * scheduler.init_noise_sigma
    extra = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    for t in scheduler.timesteps:
        prediction = predict(scheduler.scale_model_input(latents, t), t.expand(shape[0]))
        latents = scheduler.step(prediction.float(), t, latents, **extra).prev_sample
    return latents


def flow_levels(steps: int, shift: float) -> Tensor:
    """Times from 1 (noise) to 0 (data), steps + 1 of them, pushed toward noise by `shift`."""
    return shift_time(torch.linspace(1, 0, steps + 1), shift)


@torch.no_grad()
def sample_flow(velocity: Predict, levels: Tensor, shape: tuple[int, ...], *, seed: int, device: torch.device | str) -> Tensor:
    """Latents of `shape`, float32 on `device`: Euler steps along the flow `velocity` (noise - data) through `levels`.

    The noise is made on the CPU from `seed`, so that a seed is the same picture on every device.
    """
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)
    for now, following in zip(levels.tolist(), levels[1:].tolist(), strict=False):
        t = torch.full((shape[0],), now, device=device)
        latents = latents + (following - now) * velocity(latents, t).float()
    return latents


# ---- previews while training -----------------------------------------------------------------------------------------


def preview_due(options: SamplingOptions, step: int, epoch: int | None) -> bool:
    """Whether pictures are made after update `step`; `epoch`: the number of complete epochs at the end of one, else None.

    As in sd-scripts, `--sample_every_n_epochs` wins over `--sample_every_n_steps`.
    """
    if options.sample_prompts is None:
        return False
    if step == 0:
        return options.sample_at_first
    if options.sample_every_n_epochs:
        return epoch is not None and epoch % options.sample_every_n_epochs == 0
    return bool(options.sample_every_n_steps) and step % (options.sample_every_n_steps or 1) == 0


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
class PreviewWriter:
    """Makes and saves the pictures of `--sample_prompts`. Each process makes every `world`-th of them."""

    family: ModelFamily
    strategies: Strategies
    options: TrainOptions
    device: torch.device
    rank: int = 0
    world: int = 1
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    prompts: list[PromptLine] = field(default_factory=list)
    _encoded: dict[str, Conditioning] = field(default_factory=dict)
    """By prompt, on the CPU; only of encoders that do not learn."""

    @staticmethod
    def check(options: SamplingOptions) -> list[PromptLine]:
        """The prompts of the prompt file, if there is one. Raises `UserError` for a file or a sampler that cannot be used."""
        prompts = parse_prompts(options.sample_prompts) if options.sample_prompts else []
        for line in prompts:
            _diffusers_class(line.sample_sampler or options.sample_sampler)
        return prompts

    @classmethod
    def of(
        cls, family: ModelFamily, strategies: Strategies, options: TrainOptions, device: torch.device, **kwargs: Any
    ) -> PreviewWriter:
        """A writer for what `options` asks for; it is never due without a prompt file."""
        prompts = cls.check(options.sampling)
        return cls(family, strategies, options, device, prompts=prompts, **kwargs)

    def due(self, step: int, epoch: int | None = None) -> bool:
        return bool(self.prompts) and preview_due(self.options.sampling, step, epoch)

    def encode_frozen(self, bundle: ModelBundle, learning: frozenset[str] = frozenset()) -> None:
        """Encode all prompts now with the encoders that do not learn (part names in `learning` do), once for the run."""
        frozen = frozenset(bundle.text_encoder_names) - learning
        if frozen:
            for text in self._texts():
                self._encoded[text] = self._encode(bundle, text, frozen).to("cpu")

    def write(self, bundle: ModelBundle, denoiser: nn.Module, *, step: int, epoch: int | None = None) -> dict[int, Path]:
        """All of this process's pictures; modules are in evaluation mode meanwhile. Returns where that of each prompt is."""
        vae_was_loaded = bundle.loaded("vae")
        parts = [denoiser, *(bundle.part(name) for name in bundle.text_encoder_names if bundle.loaded(name))]
        paths = {}
        with torch.no_grad(), evaluation_mode(parts):
            for index in range(self.rank, len(self.prompts), self.world):
                picture = self.render(bundle, denoiser, index)
                path = self.path(index, step, epoch)
                atomic_write(path, picture.save)
                paths[index] = path
        if not vae_was_loaded:
            bundle.release("vae")
        logger.info("saved %d preview pictures in %s", len(paths), self.folder)
        return paths

    def render(self, bundle: ModelBundle, denoiser: nn.Module, index: int) -> Any:
        """The picture of prompt number `index`, a PIL image."""
        request = self.request(bundle, index)
        with self.autocast():
            latents = self.family.sample(denoiser, request, self.options, self.device)
        return to_picture(self.family.decode(bundle.vae, latents, self.options)[0])

    def request(self, bundle: ModelBundle, index: int) -> SampleRequest:
        line = self.prompts[index]
        width, height = self._size(line)
        return SampleRequest(
            positive=self._conditioning(bundle, line.prompt),
            negative=self._conditioning(bundle, line.negative_prompt or ""),
            width=width,
            height=height,
            steps=line.sample_steps,
            guidance=self.family.preview_guidance(self.options) if line.scale is None else line.scale,
            sampler=line.sample_sampler or self.options.sampling.sample_sampler,
            seed=self.seed(index),
            extra=line.extra(),
        )

    def seed(self, index: int) -> int:
        """The line's own seed, or one that is the same at every preview of the run, so that pictures can be compared."""
        own = self.prompts[index].seed
        return own if own is not None else key_to_seed(self.options.training.seed, "preview", index) % 2**32

    @property
    def folder(self) -> Path:
        return Path(self.options.output.output_dir or ".") / "sample"

    def path(self, index: int, step: int, epoch: int | None) -> Path:
        """sd-scripts' name: `{output_name}_{e000001 or 000100}_{index}_{time}_{seed}.png`.

        Steps name pictures made every n steps, also at an epoch's end; `e000000` are those before the first step.
        """
        name = self.options.output.output_name
        by_epoch = step == 0 or bool(self.options.sampling.sample_every_n_epochs)
        when = f"e{epoch or 0:06d}" if by_epoch else f"{step:06d}"
        stamp = time.strftime("%Y%m%d%H%M%S")
        return self.folder / f"{name + '_' if name else ''}{when}_{index:02d}_{stamp}_{self.seed(index)}.png"

    def _texts(self) -> list[str]:
        """Every text the prompts need, once."""
        return list(dict.fromkeys(text for line in self.prompts for text in (line.prompt, line.negative_prompt or "")))

    def _size(self, line: PromptLine) -> tuple[int, int]:
        """(width, height) in whole steps of the latent grid; at least 64 pixels, as in sd-scripts."""
        step = self.family.latent(self.options).bucket_step
        least = max(64, step)
        width, height = (max(least, size) // step * step for size in (line.width, line.height))
        if (width, height) != (line.width, line.height):
            asked, made = f"{line.width} x {line.height}", f"{width} x {height}"
            logger.info("preview of %s is made in %s: sides are multiples of %d", asked, made, step)
        return width, height

    def _encode(self, bundle: ModelBundle, text: str, only: frozenset[str]) -> Conditioning:
        tokens = {name: ids.to(self.device) for name, ids in self.strategies.tokenize.tokenize([text]).items()}
        encoders = {name: bundle.part(name) for name in sorted(only)}
        with torch.no_grad(), evaluation_mode(list(encoders.values())), self.autocast():
            return self.strategies.text_encoding.encode(encoders, tokens, only)

    def _conditioning(self, bundle: ModelBundle, text: str) -> Conditioning:
        """Kept fields as they are, the others encoded now. [1, ...] on the device."""
        kept = self._encoded.get(text)
        missing = frozenset(bundle.text_encoder_names) if kept is None else kept.missing()
        if not missing:
            assert kept is not None
            return kept.to(self.device)
        live = self._encode(bundle, text, missing)
        return live if kept is None else kept.to(self.device).merged(live)


def to_picture(image: Tensor) -> Any:
    """[3, H, W] in [-1, 1] -> a PIL image."""
    from PIL import Image

    pixels = (image.float().clamp(-1, 1) + 1) * 127.5
    return Image.fromarray(pixels.round().byte().permute(1, 2, 0).cpu().numpy())
