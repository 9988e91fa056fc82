"""`gen_img.py`: pictures from prompts, with networks or without, and sheets of them.

They are made as previews are (`picture_maker`), on a model that is loaded as training loads it. Before that, all is checked.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL.Image import Image

from library.checkpoint import check_output
from library.compiling import ComputePlan
from library.errors import UserError
from library.family_base import ModelBundle, ModelFamily, SampleRequest, family_class
from library.generation_options import GenerateOptions, PictureLine, model_options
from library.image_io import decode, read_size
from library.memory_policy import MemoryPlan
from library.picture_files import Making, PictureFiles, SheetPlan
from library.picture_maker import PictureMaker
from library.picture_metadata import NetworkUse
from library.picture_networks import PictureNetworks, asked_networks, fitting_networks, show_metadata
from library.prompts import parse_line, parse_prompts
from library.run_plan import plan_of
from library.run_setup import make_accelerator
from library.sampling import check_sampler

if TYPE_CHECKING:
    from accelerate import Accelerator

    from library.option_groups import NetworkTrainOptions

logger = logging.getLogger(__name__)

ALL_NETWORKS = "all networks"
_SOURCE_STEP = 64
"""Sides of a picture that is started from are cut to multiples of it where no size is given, as in sd-scripts."""


@dataclass(frozen=True)
class Variant:
    """Which of the live networks are on."""

    label: str
    on: tuple[bool, ...]


@dataclass(frozen=True)
class Picture:
    """One that is to be made."""

    line: PictureLine
    seed: int
    strengths: tuple[float, ...]
    """Of the live networks."""
    number: int
    """Among all pictures of the run."""
    row: int
    column: int
    """Where it is on the sheet."""

    @property
    def kind(self) -> Any:
        """The same for pictures that can be made together."""
        alike = replace(self.line, prompt="", negative_prompt=None, seed=None, seeds=None, network_mul=None)
        return self.strengths, alike


def seeds_of(line: PictureLine, first: int, count: int) -> list[int]:
    """The line's own, counting on from the last of them; `first` is the first one where it has none."""
    given = line.seeds or ((first,) if line.seed is None else (line.seed,))
    return [given[index] if index < len(given) else given[-1] + index - len(given) + 1 for index in range(count)]


@dataclass
class PictureRun:
    """A run that has passed every check. Nothing of the model is loaded before it is used."""

    options: GenerateOptions
    family: ModelFamily
    model: NetworkTrainOptions
    lines: list[PictureLine]
    """None of them where prompts are typed in."""
    base: PictureLine
    """What a prompt does not say."""
    first_seed: int
    accelerator: Accelerator
    memory: MemoryPlan
    compute: ComputePlan
    bundle: ModelBundle
    networks: PictureNetworks
    maker: PictureMaker
    files: PictureFiles
    _complete: bool = field(default=False, init=False)

    def variants(self) -> list[Variant]:
        """As asked; for `--grid_networks` also none of the networks, and each alone."""
        names = [use.name for use in self.networks.live_uses]
        every = Variant(ALL_NETWORKS if len(names) > 1 else "".join(names), (True,) * len(names))
        if not self.options.files.grid_networks:
            return [every]
        alone = [Variant(name, tuple(at == index for at in range(len(names)))) for index, name in enumerate(names)]
        return [Variant("no network", (False,) * len(names)), *alone, *([every] if len(names) > 1 else [])]

    def plan(self, lines: Sequence[PictureLine], first_number: int = 0) -> list[Picture]:
        """Round by round, prompt by prompt."""
        asked, variants = self.options.pictures, self.variants()
        each = asked.images_per_prompt
        found: list[Picture] = []
        for round_number in range(asked.n_iter):
            for row, line in enumerate(lines):
                seeds = seeds_of(line, self.first_seed, asked.n_iter * each)
                for index in range(round_number * each, (round_number + 1) * each):
                    for place, variant in enumerate(variants):
                        found.append(
                            Picture(
                                line=line,
                                seed=seeds[index],
                                strengths=self.strengths(line, variant),
                                number=first_number + len(found),
                                row=row,
                                column=index * len(variants) + place,
                            )
                        )
        return found

    def strengths(self, line: PictureLine, variant: Variant) -> tuple[float, ...]:
        """A prompt's own list goes before the flags', and is filled up with its last number."""
        usual = self.networks.strengths
        own = line.network_mul or usual
        filled = (*own, *(own[-1:] * (len(usual) - len(own))))
        return tuple(strength if on else 0.0 for strength, on in zip(filled, variant.on, strict=True))

    def run(self) -> list[Path]:
        """All pictures, or those of the prompts that are typed in; gives the files that were written."""
        if self.options.pictures.interactive:
            return [path for lines in self._typed() for path in self.make(self.plan(lines, self.files.written))]
        pictures = self.plan(self.lines)
        written = self.make(pictures, keep_encoders=False)
        if self.options.files.draws_grid:
            written.append(self.files.write_sheet(self._sheet_plan(pictures)))
        logger.info("saved %d files in %s", len(written), self.files.folder)
        return written

    def make(self, pictures: Sequence[Picture], *, keep_encoders: bool = True) -> list[Path]:
        """Save this process's share of `pictures`; gives the files in their order. keep_encoders: there will be other prompts,
        so text encoders stay."""
        written: dict[int, Path] = {}
        with torch.no_grad():
            for strengths, group in groupby(sorted(pictures, key=lambda one: one.strengths), key=lambda one: one.strengths):
                alike = list(group)
                self._prepare(strengths, alike, keep_encoders=keep_encoders)
                for batch in self._batches(alike):
                    written |= self._make_batch(batch)
        return [written[number] for number in sorted(written)]

    def _prepare(self, strengths: Sequence[float], pictures: Sequence[Picture], *, keep_encoders: bool) -> None:
        """Networks at `strengths`, prompts encoded. Where no network concerns the text encoders, they are done with before the
        denoiser is read."""
        text_parts = frozenset(self.bundle.text_encoder_names)
        if self.networks.parts & text_parts:
            self._complete_model()
        if self.networks.live_parts & text_parts:
            self.maker.forget()
        if self._complete:
            self.networks.set_strengths(strengths)
        self.maker.keep(self.bundle, (picture.line for picture in pictures), text_parts)
        if not keep_encoders:
            for name in text_parts - self.networks.live_parts:
                self.bundle.release(name)
        self._complete_model()
        self.networks.set_strengths(strengths)

    def _complete_model(self) -> None:
        if self._complete:
            return
        self._complete = True
        self.networks.put_on(self.bundle)
        self.compute.attach(self.bundle.denoiser)
        self.memory.attach(self.family, self.bundle, ())

    def _batches(self, pictures: Sequence[Picture]) -> Iterator[list[Picture]]:
        """Neighbours that can be made together, at most `--batch_size` of them; every process has its share."""
        size, batches = self.options.pictures.batch_size, []
        for _, group in groupby(pictures, key=lambda one: one.kind):
            alike = list(group)
            batches += [alike[start : start + size] for start in range(0, len(alike), size)]
        yield from batches[self.accelerator.process_index :: self.accelerator.num_processes]

    def _make_batch(self, batch: Sequence[Picture]) -> dict[int, Path]:
        """By number."""
        request = self.maker.request(self.bundle, [one.line for one in batch], [one.seed for one in batch])
        try:
            request, first, small = self._started(batch, request)
            made = self.maker.make(self.bundle, self.bundle.denoiser, request)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"the device is out of memory with {request.count} pictures of {request.width} x {request.height} at a time. "
                "Lower --batch_size or their size, or add --bf16, --quantize_base or --blocks_to_swap. "
                f"({str(error).splitlines()[0]})"
            ) from error
        uses = [[*self.networks.merged_uses, *map(_at_strength, self.networks.live_uses, one.strengths)] for one in batch]
        paths = {}
        for number, (one, networks) in enumerate(zip(batch, uses, strict=True)):
            making = Making(one.line, one.seed, request, networks, first)
            path = self.files.write(made[number], making, place=(one.row, one.column), number=one.number)
            if first is not None and self.options.pictures.highres_fix_save_1st:
                self.files.write_small(small[number], replace(making, request=first, first=None), path)
            paths[one.number] = path
        return paths

    def _started(
        self, batch: Sequence[Picture], request: SampleRequest
    ) -> tuple[SampleRequest, SampleRequest | None, list[Image]]:
        """With the picture to start from, or with a small picture of --highres_fix_scale for the start; then also the request
        for the small pictures, made from the picture or from noise, and they."""
        line, asked = batch[0].line, self.options.pictures

        def begin(request: SampleRequest, pixels: Sequence[np.ndarray]) -> SampleRequest:
            return self.maker.begin_from(self.bundle, pixels, request, line.strength)

        source = [] if line.image_path is None else [decode(Path(line.image_path))[0]] * len(batch)
        if asked.highres_fix_scale is None:
            return begin(request, source) if source else request, None, []
        step = self.maker.side_step
        width, height = (max(step, int(side * asked.highres_fix_scale) // step * step) for side in (line.width, line.height))
        smaller = replace(request, width=width, height=height, steps=asked.highres_fix_steps)
        first = begin(smaller, source) if source else smaller
        small = self.maker.make(self.bundle, self.bundle.denoiser, first)
        return begin(request, [np.asarray(one) for one in small]), first, small

    def _typed(self) -> Iterator[list[PictureLine]]:
        """Prompts as they are typed in; what is wrong with one is told, and the next asked for."""
        while text := _ask("prompt (empty to end): "):
            try:
                line = parse_line(text, "prompt", self.base)
                check_lines([line], self.maker, len(self.networks.live_uses))
            except UserError as error:
                logger.error("%s", error)
            else:
                yield [line]

    def _sheet_plan(self, pictures: Sequence[Picture]) -> SheetPlan:
        """Labels: prompts beside the rows; above the columns seeds, where they are those of all rows, and networks."""
        variants = self.variants()
        headings = []
        for column in range(max(one.column for one in pictures) + 1):
            seeds = {one.seed for one in pictures if one.column == column}
            number, place = divmod(column, len(variants))
            seed = f"seed {min(seeds)}" if len(seeds) == 1 else f"picture {number + 1}"
            headings.append(f"{variants[place].label}, {seed}" if len(variants) > 1 else seed)
        return SheetPlan([line.prompt for line in self.lines], headings)


def _at_strength(use: NetworkUse, strength: float) -> NetworkUse:
    return replace(use, strength=strength)


def _ask(text: str) -> str:
    try:
        return input(text).strip()
    except EOFError:
        return ""


# ---- checking --------------------------------------------------------------------------------------------------------


def check_lines(lines: Sequence[PictureLine], maker: PictureMaker, networks: int) -> None:
    """Raise one `UserError` for all prompts that cannot be drawn. networks: how many are live."""
    problems = [
        f"prompt {number}: {problem}" for number, line in enumerate(lines, 1) for problem in _wrong(line, maker, networks)
    ]
    if problems:
        raise UserError("\n".join(problems))


def _wrong(line: PictureLine, maker: PictureMaker, networks: int) -> Iterator[str]:
    step = maker.side_step
    for name, side in (("width", line.width), ("height", line.height)):
        if side % step:
            below, above = side // step * step, (side // step + 1) * step
            nearest = f"{below} or {above}" if below else f"{above}"
            yield f"{name} {side} is not a multiple of {step}, as this model's pictures are. Use {nearest}."
    if line.controlnet_image is not None:
        yield "--cn: there are no ControlNets here yet. Remove it."
    if len(line.network_mul or ()) > networks:
        yield f"--am has {len(line.network_mul or ())} strengths for {networks} networks that are not merged."
    if min([*(line.seeds or ()), line.seed or 0]) < 0:
        yield "a seed is at least 0."
    if not 0 < line.strength <= 1:
        yield f"strength {line.strength:g}: the share of the steps, more than 0 and at most 1."
    if line.image_path is not None and not Path(line.image_path).is_file():
        yield f"{line.image_path}: no such picture to start from."
    try:
        check_sampler(line.sample_sampler or "")
    except UserError as error:
        yield str(error)


def _base_line(options: GenerateOptions, family: ModelFamily) -> PictureLine:
    asked, width, height = options.pictures, family.usual_side, family.usual_side
    if asked.image_path is not None and Path(asked.image_path).is_file() and not (asked.W or asked.H):
        width, height = (max(side // _SOURCE_STEP, 1) * _SOURCE_STEP for side in read_size(Path(asked.image_path)))
    return PictureLine(
        "",
        negative_prompt=asked.negative_prompt,
        width=asked.W or width,
        height=asked.H or height,
        image_path=asked.image_path,
        strength=asked.strength,
        sample_steps=asked.steps,
        scale=asked.scale,
        guidance_scale=asked.guidance,
        flow_shift=asked.flow_shift,
        cfg_trunc_ratio=asked.cfg_trunc_ratio,
        renorm_cfg=asked.renorm_cfg,
        sample_sampler=asked.sampler,
    )


def _asked_lines(options: GenerateOptions, base: PictureLine) -> list[PictureLine]:
    asked = options.pictures
    if asked.from_file is not None:
        return parse_prompts(asked.from_file, "--from_file", base)
    return [] if asked.prompt is None else [parse_line(asked.prompt, "--prompt", base)]


def prepare(name: str, options: GenerateOptions) -> PictureRun:
    """Everything checked: prompts, options, folder, the headers of the model's files, and the networks held against them."""
    family = family_class(name)()
    base = _base_line(options, family)
    lines = _asked_lines(options, base)
    asked = asked_networks(options.networks)
    model = model_options(name, options)
    folder = check_output(options.files.outdir, "--outdir")
    family.check(model)
    accelerator = make_accelerator(model)
    device = accelerator.device
    if options.files.draws_grid and accelerator.num_processes > 1:
        raise UserError("--grid needs all pictures in one process. Launch one, or leave --grid out.")
    memory, compute = MemoryPlan.of(family, model, device), ComputePlan.of(family, model, device)
    plan = plan_of(model, "network")
    quantizers = plan.quantizers(family, device)
    maker = PictureMaker(family, family.strategies(model), model, device, accelerator.autocast)
    check_lines(lines, maker, sum(not one.merged for one in asked))
    bundle = family.load(model, device=device, dtype=plan.frozen_dtype, quantizers=quantizers)
    fitting = fitting_networks(asked, family, bundle, quantized=bool(quantizers))
    if options.networks.network_show_meta:
        show_metadata(asked)
    first_seed = options.pictures.seed
    if first_seed is None:
        first_seed = secrets.randbelow(2**32)
        if not lines or any(line.seed is None and not line.seeds for line in lines):
            logger.info("no --seed given: using %d", first_seed)
    return PictureRun(
        options=options,
        family=family,
        model=model,
        lines=lines,
        base=base,
        first_seed=first_seed,
        accelerator=accelerator,
        memory=memory,
        compute=compute,
        bundle=bundle,
        networks=PictureNetworks(fitting),
        maker=maker,
        files=PictureFiles(folder, options, is_flow=options.family.is_flow),
    )


def generate(name: str, options: GenerateOptions) -> list[Path]:
    """The pictures that `options` ask for, of a model of the family called `name`; gives the files."""
    return prepare(name, options).run()
