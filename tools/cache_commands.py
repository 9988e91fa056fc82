"""What the caching tools share: a training command is read by the training script itself, and its caches are filled."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from library.errors import UserError, suggest

if TYPE_CHECKING:
    from library.option_groups import TrainOptions
    from library.run_plan import Mode

What = Literal["latents", "text"]

_DISK_FLAG: dict[What, str] = {"latents": "--cache_latents_to_disk", "text": "--cache_text_encoder_outputs_to_disk"}
_ASSUMED = ("--network_module=networks.lora", "--network_train_unet_only", "--output_dir=.")
"""What a command that only names data and model leaves open; what is given goes before it. Nothing is written to the output."""

USAGE = """\
Put this tool before a training command, and the caches that the training would make are made:
  python tools/{tool}.py flux_train_network.py --dataset_config data.toml ... the rest of the command
Or name a family, the model and the data, as for sd-scripts' tool of this name (without a family: Stable Diffusion 1.x/2.x):
  python tools/{tool}.py --sdxl --pretrained_model_name_or_path MODEL --dataset_config data.toml
Under `accelerate launch` every process makes a share. --skip_existing (--skip_cache_check) does not look into files there are.
"""


def _take_script(arguments: list[str]) -> tuple[str, bool, list[str]]:
    """(module of the training script, whether it was named, the other arguments)."""
    from library.family_base import FAMILIES, family_class

    if arguments and arguments[0].endswith(".py"):
        return Path(arguments[0]).stem, True, arguments[1:]
    names = {f"--{name}": name for name in FAMILIES}
    rest = []
    family = "sd"
    given = iter(arguments)
    for argument in given:
        if argument in names:
            family = names[argument]
        elif argument == "--family" or argument.startswith("--family="):
            family = argument.partition("=")[2] or next(given, "")
        else:
            rest.append(argument)
    return Path(family_class(family).scripts["network"]).stem, False, rest


def _family_and_mode(script: str) -> tuple[str, Mode]:
    """The family that `script` trains, and how."""
    from library.family_base import FAMILIES, family_class

    scripts = {}
    for name in FAMILIES:
        for mode, file in family_class(name).scripts.items():
            scripts[Path(file).stem] = (name, mode)
    if script not in scripts:
        raise UserError(f"{script}.py is not a training script. Known: {', '.join(scripts)}.{suggest(script, scripts)}")
    family, mode = scripts[script]
    return family, "network" if mode == "network" else "full"


def _only(options: TrainOptions, what: What) -> TrainOptions:
    """`options` with the one cache, in files."""
    cache = replace(
        options.cache,
        cache_latents=False,
        cache_latents_to_disk=what == "latents",
        cache_text_encoder_outputs=False,
        cache_text_encoder_outputs_to_disk=what == "text",
    )
    return replace(options, cache=cache)


def fill(what: What, argv: Sequence[str]) -> None:
    """Make the cache files of one kind for the training command `argv`. Raises `UserError` as the training would."""
    script, named, rest = _take_script(list(argv))
    family, mode = _family_and_mode(script)
    rest = ["--skip_cache_check" if argument == "--skip_existing" else argument for argument in rest]
    assumed = [] if named else list(_ASSUMED)
    options = importlib.import_module(script).parse_options([*assumed, *rest, _DISK_FLAG[what]])

    from library.family_base import family_class
    from library.train_util import fill_caches, prepare_run

    prepared = prepare_run(family_class(family)(), _only(options, what), mode)
    fill_caches(prepared.data, prepared.strategies, prepared.load(), prepared.options, prepared.accelerator, prepared.learning)
