"""`--auto_fit`: the fastest way to run within a device's memory, among those that the options leave open.

Ways are tried from the fastest to the slowest; each is a set of flags, and `memory_plan` says what it takes. What the user gave
stays as it is. Quantising the base changes what is learned, so it comes last and is told.
"""

from __future__ import annotations

import importlib.util
import logging
import shlex
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from library.device_rates import FRAGMENTATION, free_memory, own_memory
from library.errors import UserError
from library.memory_plan import Forecast, forecast, forecasts
from library.option_rules import check_rules
from library.options import flags_of, with_flags
from library.plan_report import readable

if TYPE_CHECKING:
    from library.offload_plan import SwapDivision
    from library.option_groups import TrainOptions
    from library.train_util import PreparedRun

logger = logging.getLogger(__name__)

CHECKPOINTING, OFFLOAD, SWAP, QUANTISE = (
    "gradient_checkpointing", "cpu_offload_checkpointing", "blocks_to_swap", "quantize_base",
)  # fmt: skip
SCHEMES = ("fp8", "nf4")
"""Of `--quantize_base`, from the exacter to the smaller."""
MARGIN = 0.03
"""Share of the memory left free: what kernels allocate inside of themselves is not in the plan."""

_WHY = {
    CHECKPOINTING: "activations are computed again in the backward pass (about 30 % slower)",
    OFFLOAD: "what is kept of them waits in main memory",
    SWAP: "blocks wait in main memory until they are needed",
    QUANTISE: "the frozen base is rounded, so WHAT IS LEARNED CHANGES slightly",
}


@dataclass(frozen=True)
class Way:
    """Flags to set, and whether blocks are swapped besides, as few as possible."""

    flags: Mapping[str, Any]
    swaps: bool = False


@dataclass(frozen=True)
class Found:
    flags: Mapping[str, Any]
    forecast: Forecast


def fit_to_memory(prepared: PreparedRun) -> TrainOptions:
    """Options of the first way that fits. Raises `UserError` that says the least that would be needed when none does."""
    limit = memory_limit(prepared)
    tried: list[Found] = []
    for way in ways(prepared):
        changed = _changed(prepared, way)
        if changed is None:
            continue
        found = _fewest_swapped(changed, way, limit)
        tried.append(found)
        need = needed(prepared, found.forecast)
        logger.info("%s: %s of %s", _named(found.flags) or "as asked", readable(need), readable(limit))
        if need <= limit:
            _tell(found, need, limit)
            return with_flags(prepared.options, **found.flags)
    least = min(tried, key=lambda found: found.forecast.device_peak)
    phase = max(least.forecast.phases, key=lambda phase: phase.device.total)
    raise UserError(
        f"--auto_fit: nothing fits in {readable(limit)}. The least is {readable(needed(prepared, least.forecast))}, with "
        f"{_named(least.flags) or 'the options as they are'}, while {phase.name}. Lower --train_batch_size (raise "
        "--gradient_accumulation_steps to make up for it), --resolution or --vae_batch_size, or add --cache_latents."
    )


def memory_limit(prepared: PreparedRun) -> int:
    """Bytes of the device that has least: all processes have to find the same way."""
    asked, accelerator = prepared.options.run.auto_fit_memory, prepared.accelerator
    limit = free_memory(accelerator.device) if asked is None else int(asked * 2**30)
    if accelerator.num_processes == 1:
        return limit
    least = torch.tensor(limit, device=accelerator.device)
    torch.distributed.all_reduce(least, op=torch.distributed.ReduceOp.MIN)
    return int(least)


def needed(prepared: PreparedRun, found: Forecast) -> int:
    """Bytes of the device, with what the plan cannot see. On a CPU with what is in main memory at any rate."""
    device = prepared.accelerator.device
    own = own_memory(device)
    tensors = found.device_peak
    if device.type == "cpu" and prepared.options.run.auto_fit_memory is None:
        tensors += found.host_peak
    fragments = FRAGMENTATION if device.type == "cuda" else 0
    return int((tensors * (1 + fragments) + own) * (1 + MARGIN))


# ---- ways ------------------------------------------------------------------------------------------------------------


def ways(prepared: PreparedRun) -> Iterator[Way]:
    """From the fastest to the slowest."""
    options = prepared.options
    recomputing = {CHECKPOINTING: True} if _open(options, CHECKPOINTING) and not options.memory.recomputes else {}
    offloading = _open(options, OFFLOAD) and _has_main_memory(prepared) and CHECKPOINTING not in _refused(options)
    swapping = _open(options, SWAP) and _has_main_memory(prepared) and _division(prepared) is not None
    yield Way({})
    schemes: list[dict[str, Any]] = [{}]
    if prepared.mode == "network" and _open(options, QUANTISE) and options.denoiser_scheme is None:
        schemes += [{QUANTISE: scheme} for scheme in SCHEMES if scheme != "nf4" or importlib.util.find_spec("bitsandbytes")]
    for quantised in schemes:
        flags = {**quantised, **recomputing}
        if flags:
            yield Way(flags)
        if swapping:
            yield Way(flags, swaps=True)
        if offloading:
            yield Way({**flags, OFFLOAD: True})
        if offloading and swapping:
            yield Way({**flags, OFFLOAD: True}, swaps=True)


def _has_main_memory(prepared: PreparedRun) -> bool:
    """Whether main memory is another than the device's; on a CPU only where another card is planned for."""
    return prepared.accelerator.device.type == "cuda" or prepared.options.run.auto_fit_memory is not None


def _open(options: TrainOptions, name: str) -> bool:
    """Whether the flag is there, works, and was left to us."""
    flag = flags_of(type(options), type(options.family)).get(name)
    return flag is not None and not flag.planned and flag.inert is None and name not in options.explicit


def _refused(options: TrainOptions) -> frozenset[str]:
    """Switches that the user turned off."""
    return frozenset({CHECKPOINTING}) if CHECKPOINTING in options.explicit and not options.memory.recomputes else frozenset()


# ---- one way ---------------------------------------------------------------------------------------------------------


def _changed(prepared: PreparedRun, way: Way) -> PreparedRun | None:
    """The run with the flags of `way`; None where they do not go together with what the user asked for."""
    if not way.flags:
        return prepared
    options = with_flags(prepared.options, **way.flags)
    try:
        check_rules(options)
        return prepared.with_options(options)
    except UserError as error:
        logger.info("%s cannot be used here: %s", _named(way.flags), error)
        return None


def _fewest_swapped(prepared: PreparedRun, way: Way, limit: int) -> Found:
    """The way as it is; where it swaps, with the smallest number of blocks that fits, or else with the largest there is."""
    if not way.swaps:
        return Found(way.flags, forecast(prepared))
    division = _division(prepared)
    assert division is not None
    numbers = range(1, division.largest + 1)
    found = forecasts(prepared, [division.plans(number) for number in numbers])
    fits = (index for index, planned in enumerate(found) if needed(prepared, planned) <= limit)
    chosen = next(fits, len(found) - 1)
    return Found({**way.flags, SWAP: numbers[chosen]}, found[chosen])


def _division(prepared: PreparedRun) -> SwapDivision | None:
    """How blocks can be swapped; None where none can."""
    division = prepared.family.swap_division(prepared.options)
    return division if division is not None and division.largest else None


def _named(flags: Mapping[str, Any]) -> str:
    return " ".join(f"--{name}" if value is True else f"--{name} {value}" for name, value in flags.items())


def _tell(found: Found, need: int, limit: int) -> None:
    """The whole command line, and why."""
    given = [word for word in sys.argv[1:] if word != "--auto_fit" and not word.startswith("--auto_fit_memory=")]
    if "--auto_fit_memory" in given:
        at = given.index("--auto_fit_memory")
        del given[at : at + 2]
    command = " ".join([shlex.join([sys.argv[0], *given]), _named(found.flags)]).rstrip()
    logger.info("--auto_fit: needs %s of %s with: %s", readable(need), readable(limit), command)
    for name in found.flags:
        logger.info("  --%s: %s", name, _WHY[name])
