"""Flags of `gen_img.py`, of every script that makes pictures alone. Names and defaults are sd-scripts'. Imports nothing heavy.

What they share with training has the training's names: `model_options` gives the options under which families know the model.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from library.cli import read_options
from library.config_file import find_config, read_config
from library.errors import UserError
from library.option_groups import (
    AttentionOptions,
    LoggingOptions,
    ModelOptions,
    ModelPrecisionOptions,
    NetworkTrainOptions,
)
from library.option_groups_output import PREVIEW_SAMPLERS, ProgramOptions
from library.option_rules import Rule, rule_problems
from library.options import NoFamilyOptions, build_parser, flags_of, flat, from_flags, group, opt
from library.prompts import PromptLine, line_option

T = TypeVar("T")

FAMILY_OPTIONS: dict[str, str] = {
    "sd": "library.unet_options:UnetOptions",
    "sdxl": "library.sdxl_options:SdxlOptions",
    "flux": "library.flux_options:FluxOptions",
    "lumina": "library.lumina_options:LuminaOptions",
    "sd3": "library.sd3_options:Sd3Options",
}
"""Family name -> where the option group of its training scripts is."""
_CLIP_TOKENS = 75
_PLANNED_FORMAT = "Use --dtype for all, and --quantize_base and --quantize_text_encoders for fewer bits."
_PLANNED_PICTURE = "Pictures are made from a prompt alone. Remove it."


def _list_of(kind: Callable[[Any], T], expected: str) -> Callable[[Any], tuple[T, ...]]:
    """Reads values with commas between them, or a list as a file holds it."""

    def read(value: Any) -> tuple[T, ...]:
        try:
            return tuple(kind(item) for item in (value.split(",") if isinstance(value, str) else value))
        except (TypeError, ValueError):
            raise ValueError(f"{expected} separated by commas") from None

    return read


whole_numbers, numbers = _list_of(int, "whole numbers"), _list_of(float, "numbers")


@dataclass(frozen=True)
class PictureLine(PromptLine):
    """One prompt, of which several pictures may be made."""

    seeds: tuple[int, ...] | None = line_option("d", whole_numbers)
    network_mul: tuple[float, ...] | None = line_option("am", numbers)
    """Strengths of the networks that are not merged, in their order."""
    image_path: str | None = line_option("i", str)
    """A picture to start from."""
    strength: float = line_option("t", float, 0.8)
    """How far from it: the share of the steps that are made. Of --highres_fix_scale as well."""


@dataclass(frozen=True, kw_only=True)
class PictureModelOptions(ModelOptions):
    """The model that makes the pictures."""

    pretrained_model_name_or_path: str | None = opt(
        None, "model: a checkpoint file, a diffusers folder or a hub id", aliases=("ckpt", "ckpt_path")
    )
    family: str | None = opt(None, "family of the model; told from its files unless given", choices=tuple(FAMILY_OPTIONS))
    sdxl: bool = opt(False, "the same as --family sdxl")
    v1: bool = opt(False, "the model is Stable Diffusion 1.x", inert="the files tell")
    zero_terminal_snr: bool = opt(False, "rescale the schedule so that its last step is pure noise")
    clip_skip: int | None = opt(None, "take the output of this text encoder layer, counted from the end, 1 the last", minimum=1)
    max_token_length: int | None = opt(None, "longest prompt in tokens; 75 unless given", choices=(75, 150, 225))
    max_embeddings_multiples: int | None = opt(None, "the same in portions of 75", choices=(1, 2, 3))
    plain_prompts: bool = opt(False, "read brackets in prompts as text, and not as the weights of (word:1.2)")

    @property
    def named_family(self) -> str | None:
        return "sdxl" if self.sdxl else self.family

    @property
    def token_length(self) -> int | None:
        return self.max_token_length or (self.max_embeddings_multiples or 0) * _CLIP_TOKENS or None


@dataclass(frozen=True, kw_only=True)
class PicturePrecisionOptions(ModelPrecisionOptions):
    """In which number format the model is kept and computed."""

    fp16: bool = opt(False, "the same as --mixed_precision fp16")
    bf16: bool = opt(False, "the same as --mixed_precision bf16")
    dtype: str | None = opt(
        None, "the same, as the minimal scripts say it", choices=("float32", "float16", "bfloat16", "fp32", "fp16", "bf16")
    )
    full_fp16: bool = opt(False, "load the model in fp16", inert="it is loaded in the format of the computation")
    full_bf16: bool = opt(False, "load the model in bf16", inert="it is loaded in the format of the computation")
    offload: bool = opt(
        False,
        "keep what does not compute in main memory",
        inert="text encoders leave the device; --blocks_to_swap is for the rest",
    )
    opt_channels_last: bool = opt(False, "another layout of tensors", inert="the VAE has it anyway")

    @property
    def computed_in(self) -> str:
        """The format that is asked for, through whichever flag."""
        if self.dtype is not None:
            return {"float32": "no", "fp32": "no", "float16": "fp16", "bfloat16": "bf16"}.get(self.dtype, self.dtype)
        return "fp16" if self.fp16 else "bf16" if self.bf16 else self.mixed_precision


@dataclass(frozen=True, kw_only=True)
class PictureOptions:
    """What is made. Options inside a prompt (`--w 640`) go before these."""

    prompt: str | None = opt(None, "prompt")
    from_file: str | None = opt(None, "file of prompts: .txt, .toml or .json")
    interactive: bool = opt(False, "ask for prompts until an empty one")
    negative_prompt: str | None = opt(None, "what the picture is led away from")
    W: int | None = opt(
        None, "width in pixels; the family's usual one unless given", aliases=("width", "image_width"), minimum=1
    )
    H: int | None = opt(None, "height in pixels", aliases=("height", "image_height"), minimum=1)
    steps: int = opt(50, "steps of the sampler", minimum=1)
    scale: float | None = opt(
        None, "guidance by the negative prompt; the family's usual one unless given", aliases=("cfg_scale", "guidance_scale"),
        minimum=0,
    )  # fmt: skip
    guidance: float | None = opt(None, "guidance that the model is told (FLUX.1 dev); 3.5 unless given", minimum=0)
    flow_shift: float | None = opt(
        None, "push times of a flow toward noise; the family's usual shift unless given", aliases=("discrete_flow_shift",),
        minimum=0.001,
    )  # fmt: skip
    cfg_trunc_ratio: float | None = opt(
        None, "guide until this share of the noise is gone (Lumina); 0.25 unless given", minimum=0
    )
    renorm_cfg: float | None = opt(
        None, "guide no further than this many times the prompt's own prediction (Lumina); 1 unless given, 0 for no limit",
        minimum=0,
    )  # fmt: skip
    sampler: str = opt("ddim", "sampler; lms needs the package scipy", choices=PREVIEW_SAMPLERS)
    seed: int | None = opt(
        None, "seed of the first picture of every prompt, those after it count on; drawn, and told, unless given", minimum=0
    )
    images_per_prompt: int = opt(1, "pictures of each prompt", minimum=1)
    n_iter: int = opt(1, "rounds over all prompts", minimum=1)
    iter_same_seed: bool = opt(False, "the same seeds for all prompts", inert="they have the same seeds in any case")
    batch_size: int = opt(1, "pictures that are made together", minimum=1)
    image_path: str | None = opt(None, "picture to start from; its size is used unless --W and --H are given")
    strength: float = opt(0.8, "how far from it, or from the small picture of --highres_fix_scale: share of the steps")
    highres_fix_scale: float | None = opt(None, "make the picture at this share of its size first (0.5), and start from that")
    highres_fix_steps: int = opt(28, "steps of the small picture", minimum=1)
    highres_fix_save_1st: bool = opt(False, "save the small picture as well")


@dataclass(frozen=True, kw_only=True)
class PictureFileOptions:
    """What is written."""

    outdir: str = opt("outputs", "folder for the pictures", aliases=("output_dir",))
    sequential_file_name: bool = opt(False, "number the files instead of naming them by time and seed")
    use_original_file_name: bool = opt(
        False, "begin names with that of the source picture", inert="they are made of time and seed, or of numbers"
    )
    no_preview: bool = opt(False, "show no pictures in a window", inert="none are shown")
    grid: bool = opt(False, "also write all pictures in one, a row for each prompt, a column for each seed")
    grid_networks: bool = opt(
        False, "also make every picture without networks and with each of them alone, side by side; turns --grid on"
    )

    @property
    def draws_grid(self) -> bool:
        return self.grid or self.grid_networks


@dataclass(frozen=True, kw_only=True)
class PictureNetworkOptions:
    """Networks (LoRAs and other adapters) on the model."""

    network_weights: tuple[str, ...] | None = opt(None, "network files; of any algorithm and format that is read here")
    network_mul: tuple[float, ...] | None = opt(None, "strength of each; 1 unless given")
    network_module: tuple[str, ...] | None = opt(
        None, "module of each, or of all; needed for foreign ones such as lycoris.kohya alone: ours are told from the files"
    )
    network_args: tuple[str, ...] | None = opt(None, "arguments of each: key=value;key=value; lbw=... as in --lbw")
    lbw: tuple[str, ...] | None = opt(
        None, "strength of each by block: numbers with commas between, 0.5*12 for twelve of them", aliases=("lbws",)
    )
    lora_weights: tuple[str, ...] | None = opt(None, "network files with their strengths: file;0.8 ...")
    network_merge: bool = opt(False, "merge the networks into the model instead of computing them beside it",
                              aliases=("merge_lora_weights",))  # fmt: skip
    network_merge_n_models: int | None = opt(None, "merge so many of the networks, the first ones", minimum=0)
    network_pre_calc: bool = opt(False, "merge networks for each prompt anew", inert="their strengths are computed live")
    network_show_meta: bool = opt(False, "show what the files say of themselves")


@dataclass(frozen=True, kw_only=True)
class PlannedPictureOptions:
    """Known from sd-scripts."""

    prompt2: str | None = opt(None, "prompt of the second text encoder alone", planned=True)
    clip_l_dtype: str | None = opt(None, "format of CLIP-L", planned=True, instead=_PLANNED_FORMAT)
    t5xxl_dtype: str | None = opt(None, "format of T5", planned=True, instead=_PLANNED_FORMAT)
    gemma2_dtype: str | None = opt(None, "format of Gemma-2", planned=True, instead=_PLANNED_FORMAT)
    ae_dtype: str | None = opt(None, "format of the autoencoder", planned=True, instead="Use --no_half_vae for float32.")
    flux_dtype: str | None = opt(None, "format of the transformer", planned=True, instead=_PLANNED_FORMAT)
    from_module: str | None = opt(None, "module that makes the prompts", planned=True, instead="Write them to a --from_file.")
    mask_path: str | None = opt(None, "what of it is made anew", planned=True, instead=_PLANNED_PICTURE)
    highres_fix_latents_upscaling: bool = opt(
        False, "enlarge latents instead of the picture", planned=True, instead="The small picture is enlarged. Remove it."
    )
    highres_fix_upscaler: str | None = opt(
        None, "module that enlarges", planned=True, instead="Pictures are enlarged by Lanczos' filter. Remove it."
    )
    guide_image_path: tuple[str, ...] | None = opt(None, "pictures for ControlNets", planned=True, instead=_PLANNED_PICTURE)
    control_net_models: tuple[str, ...] | None = opt(None, "ControlNets", planned=True, instead=_PLANNED_PICTURE)
    control_net_lllite_models: tuple[str, ...] | None = opt(None, "LLLites", planned=True, instead=_PLANNED_PICTURE)
    textual_inversion_embeddings: tuple[str, ...] | None = opt(None, "embeddings", planned=True)
    clip_vision_strength: float | None = opt(None, "strength of a picture as prompt", planned=True, instead=_PLANNED_PICTURE)
    ds_depth_1: int | None = opt(None, "Deep Shrink", planned=True)
    gradual_latent_timesteps: int | None = opt(None, "Gradual Latent", planned=True)
    negative_scale: float | None = opt(None, "a guidance of the negative prompt's own", planned=True)
    original_width: int | None = opt(None, "original width SDXL is told", planned=True)
    original_height: int | None = opt(None, "original height SDXL is told", planned=True)
    crop_top: int | None = opt(None, "crop SDXL is told", planned=True)
    crop_left: int | None = opt(None, "crop SDXL is told", planned=True)
    shuffle_prompts: bool = opt(False, "the prompts of a round in another order", planned=True)
    vae_slices: int | None = opt(None, "decode in slices", planned=True, instead="Pictures are decoded one by one. Remove it.")
    vae_batch_size: float | None = opt(
        None, "pictures decoded together", inert="they are decoded one by one, which takes least"
    )


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """What every script that makes pictures takes."""

    model: PictureModelOptions = group(PictureModelOptions)
    pictures: PictureOptions = group(PictureOptions)
    networks: PictureNetworkOptions = group(PictureNetworkOptions)
    files: PictureFileOptions = group(PictureFileOptions)
    precision: PicturePrecisionOptions = group(PicturePrecisionOptions)
    attention: AttentionOptions = group(AttentionOptions)
    family: Any = group(NoFamilyOptions)
    """What the family's own group says of the model."""
    logging: LoggingOptions = group(LoggingOptions)
    planned: PlannedPictureOptions = group(PlannedPictureOptions)
    run: ProgramOptions = group(ProgramOptions)
    explicit: frozenset[str] = field(default=frozenset(), compare=False)
    """Names of the flags that were set, on the command line or in a file."""


_FORMAT_FLAGS = ("mixed_precision", "fp16", "bf16", "dtype")


def _network_count(o: GenerateOptions) -> int:
    return len(o.networks.network_weights or o.networks.lora_weights or ())


def _too_many(name: str) -> Rule:
    return Rule(
        lambda o: len(getattr(o.networks, name) or ()) > max(_network_count(o), 0),
        f"--{name} has more values than there are networks in --network_weights: {{{name}}}.",
    )


RULES: tuple[Rule, ...] = (
    Rule(
        lambda o: o.model.pretrained_model_name_or_path is None,
        "--ckpt is missing: the model, as a file, a diffusers folder or a hub id.",
    ),
    Rule(
        lambda o: o.model.sdxl and o.model.family not in (None, "sdxl"),
        "--sdxl and --family {family} contradict each other. Remove one.",
    ),
    Rule(
        lambda o: sum([o.pictures.prompt is not None, o.pictures.from_file is not None, o.pictures.interactive]) != 1,
        "say what to draw, in one of three ways: --prompt TEXT, --from_file FILE or --interactive.",
    ),
    Rule(
        lambda o: len(o.explicit.intersection(_FORMAT_FLAGS)) > 1,
        "--mixed_precision, --fp16, --bf16 and --dtype say the same. Keep one.",
    ),
    Rule(
        lambda o: o.family.is_flow and not o.explicit.intersection(_FORMAT_FLAGS),
        "the model is computed in float32, which takes twice the memory of bfloat16. Add --bf16.",
        warning=True,
    ),
    Rule(
        lambda o: o.model.max_token_length is not None and o.model.max_embeddings_multiples is not None,
        "--max_embeddings_multiples and --max_token_length say the same. Keep one.",
    ),
    Rule(
        lambda o: o.pictures.interactive and o.files.draws_grid,
        "--interactive makes one prompt at a time, so there is no --grid. Remove one.",
    ),
    Rule(
        lambda o: o.networks.network_weights is not None and o.networks.lora_weights is not None,
        "--network_weights and --lora_weights name the same. Keep one.",
    ),
    Rule(
        lambda o: o.networks.lora_weights is not None and o.networks.network_mul is not None,
        "--lora_weights has the strengths in it (file;0.8). Remove --network_mul, or use --network_weights.",
    ),
    *(_too_many(name) for name in ("network_mul", "network_module", "network_args", "lbw")),
    Rule(
        lambda o: (o.networks.network_merge_n_models or 0) > _network_count(o),
        "--network_merge_n_models {network_merge_n_models}: there are fewer networks in --network_weights.",
    ),
    Rule(
        lambda o: o.files.grid_networks and (o.networks.network_merge or bool(o.networks.network_merge_n_models)),
        "--grid_networks takes networks off again, which merged ones cannot be. Remove --network_merge.",
    ),
    Rule(
        lambda o: o.files.grid_networks and not _network_count(o),
        "--grid_networks compares networks. Give some: --network_weights.",
    ),
    Rule(
        lambda o: o.family.is_flow and "sampler" in o.explicit,
        "--sampler {sampler} has no effect: this model is a flow, which is followed by Euler's steps.",
        warning=True,
    ),
    Rule(
        lambda o: not o.family.is_flow and o.pictures.guidance is not None,
        "--guidance {guidance} has no effect: this model is not told a guidance. --scale is that by the negative prompt.",
        warning=True,
    ),
    Rule(
        lambda o: not o.family.is_flow and o.pictures.flow_shift is not None,
        "--flow_shift {flow_shift} has no effect: this model is no flow.",
        warning=True,
    ),
    Rule(
        lambda o: not o.family.bounds_guidance and (o.pictures.cfg_trunc_ratio, o.pictures.renorm_cfg) != (None, None),
        "--cfg_trunc_ratio and --renorm_cfg have no effect: this model's guidance has no such bounds.",
        warning=True,
    ),
    Rule(
        lambda o: o.pictures.highres_fix_scale is not None and not 0 < o.pictures.highres_fix_scale < 1,
        "--highres_fix_scale {highres_fix_scale}: the share of the size at which the small picture is made, between 0 and 1.",
    ),
    Rule(
        lambda o: o.pictures.highres_fix_scale is None and bool({"highres_fix_steps", "highres_fix_save_1st"} & o.explicit),
        "--highres_fix_steps and --highres_fix_save_1st have no meaning without --highres_fix_scale.",
    ),
    Rule(lambda o: Path(o.files.outdir).is_file(), "--outdir {outdir}: is a file. Name a folder."),
)


def family_group(name: str) -> type[NoFamilyOptions]:
    """The option group of the family's training scripts."""
    module, _, attribute = FAMILY_OPTIONS[name].partition(":")
    found: type[NoFamilyOptions] = getattr(importlib.import_module(module), attribute)
    return found


_SHARED_GROUPS = ("model", "precision", "attention", "family")


def model_options(name: str, options: GenerateOptions) -> NetworkTrainOptions:
    """The model, as its family is asked about it: the flags that training has by the same names.

    Raises `UserError` for what the family's rules have against them.
    """
    training = family_group(name)
    shared = {
        key
        for key, flag in flags_of(GenerateOptions, training.model_group).items()
        if key in options.explicit and flag.group in _SHARED_GROUPS and not flag.inert
    } & flags_of(NetworkTrainOptions, training).keys()
    values = flat(options)
    made = from_flags(
        NetworkTrainOptions,
        training,
        **{key: values[key] for key in shared}
        | {
            "mixed_precision": options.precision.computed_in,
            "max_token_length": options.model.token_length,
            "weighted_captions": not training.is_flow and not options.model.plain_prompts,
            "sample_sampler": options.pictures.sampler,
            "network_train_unet_only": True,
        },
    )
    if problems := list(rule_problems(made, made.family.rules)):
        raise UserError("\n".join(problems))
    return made


# ---- the command line ------------------------------------------------------------------------------------------------


def build_picture_parser(family: str | None = None, description: str | None = None) -> argparse.ArgumentParser:
    """family: whose options are among them."""
    return build_parser(GenerateOptions, _model_group(family), description)


def read_picture_options(
    argv: Sequence[str] | None = None, description: str | None = None, family: str | None = None
) -> tuple[str, GenerateOptions]:
    """(the model's family, the options). family: the only one that the script is for; told from the model's files otherwise.

    Raises `UserError`. Headers of the model's files are all that is read.
    """
    name = _find_family(list(sys.argv[1:] if argv is None else argv), family)
    options = read_options(GenerateOptions, argv, _model_group(name), description, RULES)
    assert name is not None  # there is a model: the rules have passed
    return name, options


def _model_group(family: str | None) -> type[NoFamilyOptions]:
    return NoFamilyOptions if family is None else family_group(family).model_group


def _find_family(argv: list[str], only: str | None) -> str | None:
    """None where no model is named. Which family it is decides which options there are, so it is found out before they are."""
    words = [word for word in argv if word not in ("-h", "--help")]
    given = vars(build_parser(GenerateOptions).parse_known_args(words)[0])
    if given.get("config_file") and not given.get("output_config"):
        given = {**read_config(find_config(given["config_file"])), **given}
    if only is not None and given.get("family") not in (None, only):
        raise UserError(f"--family {given['family']}: this script is for {only} alone. Use gen_img.py.")
    named = only or ("sdxl" if given.get("sdxl") else given.get("family"))
    spellings = ("pretrained_model_name_or_path", "ckpt", "ckpt_path")
    model = next((given[spelling] for spelling in spellings if given.get(spelling)), None)
    if model is None or (named is not None and len(words) < len(argv)):
        return named  # nothing to look at, or help that is to answer at once

    from library.family_base import detected_family

    found = detected_family(model, "--ckpt")
    if named is not None and found.family != named:
        raise UserError(
            f"{model} is {found.title}, and this is to be a model of the family {named}. Use gen_img.py without --family, "
            "which tells families apart, or give another model."
        )
    return found.family
