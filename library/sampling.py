"""Preview pictures: one sampler loop for every diffusion family, and the writer that runs prompts through it.

Shapes: B batch, C latent channels, h x w latent pixels, H x W pixels.
"""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from library.checkpoint import atomic_write
from library.errors import UserError, suggest
from library.family_base import ModelBundle, ModelFamily, SampleRequest, SampleStart
from library.lean_imports import diffusers_class
from library.objectives import shift_time
from library.picture_maker import PictureMaker, evaluation_mode
from library.prompts import PromptLine, parse_prompts
from library.rng import key_to_seed
from library.strategy_base import Strategies

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


def check_sampler(name: str) -> None:
    """Raise `UserError` for a name that is not known, or whose packages are not installed."""
    _diffusers_class(name)


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


Seed = int | Sequence[int]
"""Of a batch as a whole, or of each row, which then is the same in any batch."""


def _generators(seed: Seed) -> list[torch.Generator]:
    """On the CPU, so that a seed is the same picture on every device."""
    return [torch.Generator().manual_seed(number) for number in ([seed] if isinstance(seed, int) else seed)]


def _first_noise(shape: tuple[int, ...], generators: Sequence[torch.Generator]) -> Tensor:
    rows = shape[0] // len(generators)
    return torch.cat([torch.randn((rows, *shape[1:]), generator=generator) for generator in generators])


@torch.no_grad()
def sample_diffusion(
    predict: Predict,
    scheduler: Any,
    shape: tuple[int, ...],
    *,
    steps: int,
    seed: Seed,
    device: torch.device | str,
    start: SampleStart | None = None,
) -> Tensor:
    """Latents of `shape`, float32 on `device`, sampled in `steps` steps with `scheduler` (see `make_scheduler`), or in those of
    them that `start` leaves."""
    generators = _generators(seed)
    noise = _first_noise(shape, generators).to(device)
    generator = generators[0] if len(generators) == 1 else generators
    scheduler.set_timesteps(steps, device=device)
    latents, timesteps = _begin(scheduler, noise, steps, start)
    extra = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    for t in timesteps:
        prediction = predict(scheduler.scale_model_input(latents, t), t.expand(shape[0]))
        latents = scheduler.step(prediction.float(), t, latents, **extra).prev_sample
    return latents


def _begin(scheduler: Any, noise: Tensor, steps: int, start: SampleStart | None) -> tuple[Tensor, Tensor]:
    """The first latents, and the times that are left."""
    if start is None:
        return noise * scheduler.init_noise_sigma, scheduler.timesteps
    first = start.skipped(steps) * scheduler.order  # some samplers have two times a step
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    timesteps: Tensor = scheduler.timesteps[first:]
    if hasattr(scheduler, "plms_timesteps"):  # the second step is made twice, wherever the first one is
        timesteps = scheduler.timesteps.unique_consecutive()[first:]
        timesteps = torch.cat([timesteps[:2], timesteps[1:]])
    latents: Tensor = scheduler.add_noise(start.latents.to(noise), noise, timesteps[:1].expand(len(noise)))
    return latents, timesteps


def flow_levels(steps: int, shift: float) -> Tensor:
    """Times from 1 (noise) to 0 (data), steps + 1 of them, pushed toward noise by `shift`."""
    return shift_time(torch.linspace(1, 0, steps + 1), shift)


def shifted_levels(steps: int, shift: float) -> Tensor:
    """The same as of a scheduler whose 1000 levels are shifted already: from 1 to the least of them, shifted again, then 0."""
    least = float(shift_time(torch.tensor(1e-3), shift))
    return torch.cat([shift_time(torch.linspace(1, least, steps), shift), torch.zeros(1)])


@torch.no_grad()
def sample_flow(
    velocity: Predict,
    levels: Tensor,
    shape: tuple[int, ...],
    *,
    seed: Seed,
    device: torch.device | str,
    start: SampleStart | None = None,
) -> Tensor:
    """Latents of `shape`, float32 on `device`: Euler steps along the flow `velocity` (noise - data) through `levels`, or
    through those of them that `start` leaves."""
    latents = _first_noise(shape, _generators(seed)).to(device)
    if start is not None:
        levels = levels[start.skipped(len(levels) - 1) :]
        latents = torch.lerp(start.latents.to(latents), latents, float(levels[0]))
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


@dataclass
class PreviewWriter:
    """Makes and saves the pictures of `--sample_prompts`. Each process makes every `world`-th of them, or where weights are
    sharded all make each of them together."""

    maker: PictureMaker
    rank: int = 0
    world: int = 1
    together: bool = False
    prompts: list[PromptLine] = field(default_factory=list)

    @staticmethod
    def check(options: SamplingOptions) -> list[PromptLine]:
        """The prompts of the prompt file, if there is one. Raises `UserError` for a file or a sampler that cannot be used."""
        prompts: list[PromptLine] = parse_prompts(options.sample_prompts) if options.sample_prompts else []
        for line in prompts:
            check_sampler(line.sample_sampler or options.sample_sampler)
        return prompts

    @classmethod
    def of(
        cls,
        family: ModelFamily,
        strategies: Strategies,
        options: TrainOptions,
        device: torch.device,
        *,
        rank: int = 0,
        world: int = 1,
        together: bool = False,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> PreviewWriter:
        """A writer for what `options` asks for; it is never due without a prompt file."""
        prompts = cls.check(options.sampling)
        if options.family.is_flow and any(line.sample_sampler for line in prompts):
            logger.warning(
                "%s: --ss has no effect on a flow, whose previews are made with Euler's steps", options.sampling.sample_prompts
            )
        return cls(PictureMaker(family, strategies, options, device, autocast), rank, world, together, prompts)

    @property
    def options(self) -> TrainOptions:
        return self.maker.options

    def due(self, step: int, epoch: int | None = None) -> bool:
        return bool(self.prompts) and preview_due(self.options.sampling, step, epoch)

    def encode_frozen(self, bundle: ModelBundle, learning: frozenset[str] = frozenset()) -> None:
        """Encode all prompts now with the encoders that do not learn (part names in `learning` do), once for the run."""
        self.maker.keep(bundle, self.prompts, frozenset(bundle.text_encoder_names) - learning)

    def write(self, bundle: ModelBundle, denoiser: nn.Module, *, step: int, epoch: int | None = None) -> dict[int, Path]:
        """All of this process's pictures; modules are in evaluation mode meanwhile. Returns where that of each prompt is."""
        vae_was_loaded = bundle.loaded("vae")
        parts = [denoiser, *(bundle.part(name) for name in bundle.text_encoder_names if bundle.loaded(name))]
        paths = {}
        with torch.no_grad(), evaluation_mode(parts):
            for index in range(len(self.prompts)):
                own = index % self.world == self.rank
                if not own and not self.together:
                    continue
                [picture] = self.maker.make(bundle, denoiser, self.request(bundle, index))
                if not own:
                    continue
                path = self.path(index, step, epoch)
                atomic_write(path, picture.save)
                paths[index] = path
        if not vae_was_loaded:
            bundle.release("vae")
        logger.info("saved %d preview pictures in %s", len(paths), self.folder)
        return paths

    def request(self, bundle: ModelBundle, index: int) -> SampleRequest:
        return self.maker.request(bundle, [self._fitting(self.prompts[index])], [self.seed(index)])

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

    def _fitting(self, line: PromptLine) -> PromptLine:
        """In whole steps of the latent grid; at least 64 pixels, as in sd-scripts."""
        step = self.maker.side_step
        least = max(64, step)
        width, height = (max(least, size) // step * step for size in (line.width, line.height))
        if (width, height) != (line.width, line.height):
            asked, made = f"{line.width} x {line.height}", f"{width} x {height}"
            logger.info("preview of %s is made in %s: sides are multiples of %d", asked, made, step)
        return replace(line, width=width, height=height)
