"""Learning rate schedules by name, counted in updates of the weights: one `step()` per update, whatever the process count."""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from library.errors import UserError, suggest
from library.optimizers import check_arguments, load_dotted, parse_literals, torch_classes

if TYPE_CHECKING:
    from library.option_groups import ScheduleOptions

logger = logging.getLogger(__name__)

SCHEDULERS: dict[str, str] = {
    "constant": "library.schedulers:constant",
    "constant_with_warmup": "transformers.optimization:get_constant_schedule_with_warmup",
    "linear": "transformers.optimization:get_linear_schedule_with_warmup",
    "cosine": "transformers.optimization:get_cosine_schedule_with_warmup",
    "cosine_with_restarts": "transformers.optimization:get_cosine_with_hard_restarts_schedule_with_warmup",
    "polynomial": "transformers.optimization:get_polynomial_decay_schedule_with_warmup",
    "piecewise_constant": "diffusers.optimization:get_piecewise_constant_schedule",
    "inverse_sqrt": "transformers.optimization:get_inverse_sqrt_schedule",
    "cosine_with_min_lr": "transformers.optimization:get_cosine_with_min_lr_schedule_with_warmup",
    "cosine_warmup_with_min_lr": "transformers.optimization:get_cosine_with_min_lr_schedule_with_warmup_lr_rate",
    "warmup_stable_decay": "transformers.optimization:get_wsd_schedule",
    "rex": "library.schedulers:rex",
    "adafactor": "library.schedulers:adafactor",
}
"""sd-scripts' names, rex and others of transformers -> module:function, imported when asked for.

A function gets those of `_keywords` it has parameters for."""


BY_LOSS = ("reduce_lr_on_plateau", "greedy")
"""transformers' schedules that look at a loss in each step."""


_UNSET: tuple[tuple[str, float | None, set[str]], ...] = (
    ("lr_warmup_steps", 0, {"num_warmup_steps"}),
    ("lr_decay_steps", 0, {"num_decay_steps"}),
    ("lr_scheduler_num_cycles", 1, {"num_cycles"}),
    ("lr_scheduler_power", 1.0, {"power"}),
    ("lr_scheduler_timescale", None, {"timescale"}),
    ("lr_scheduler_min_lr_ratio", None, {"min_lr_rate", "min_lr_ratio"}),
)
"""Flag, its value unless given, and the parameters of schedules that take it."""


def constant(optimizer: Optimizer) -> LRScheduler:
    """The rates as they are; also for optimizers that schedule themselves."""
    return LambdaLR(optimizer, lambda step: 1.0)


def rex(
    optimizer: Optimizer, num_warmup_steps: int, num_training_steps: int, min_lr_rate: float = 0.0, depth: float = 0.5
) -> LRScheduler:
    """Slow at first, ever faster towards the end (Chen et al. 2021, arXiv 2107.04197): (1 - p) / (1 - depth * p) at progress p.

    depth: in [0, 1); 0 falls along a line, larger ones stay high for longer. min_lr_rate: where it ends, as a ratio.
    """

    def factor(step: int) -> float:
        if step < num_warmup_steps:
            return step / num_warmup_steps
        progress = (step - num_warmup_steps) / max(1, num_training_steps - num_warmup_steps)
        left = max(0.0, 1 - progress)
        return min_lr_rate + (1 - min_lr_rate) * left / (1 - depth * (1 - left))

    return LambdaLR(optimizer, factor)


def adafactor(optimizer: Optimizer) -> LRScheduler:
    """Shows the rate Adafactor makes for itself."""
    from transformers.optimization import AdafactorSchedule

    class AdafactorRates(AdafactorSchedule):
        """transformers' class reads the rate only while gradients are there; the loop has cleared them by then."""

        optimizer: Any

        def get_lr(self) -> list[float | Tensor]:
            rates: list[float | Tensor] = []
            for group, start in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
                state = self.optimizer.state.get(group["params"][0])
                rates.append(float(self.optimizer._get_lr(group, state)) if state else start)
            return rates

    return AdafactorRates(optimizer)


def count_updates(value: int | float, total: int, flag: str) -> int:
    """Updates meant by `value`: a float below 1 is a share of `total`, anything else a count."""
    if value < 0 or (isinstance(value, float) and value >= 1 and not value.is_integer()):
        raise UserError(f"{flag} is {value}: give a number of steps, or a share of all steps between 0 and 1.")
    if isinstance(value, float) and value < 1:
        return int(value * total)
    return int(value)


def create_scheduler(options: ScheduleOptions, optimizer: Optimizer, num_update_steps: int) -> LRScheduler:
    """The schedule `options` names over `num_update_steps` updates. Also sets every group's rate for the first one."""
    given = parse_literals(options.lr_scheduler_args or (), "--lr_scheduler_args")
    if options.lr_scheduler_type:
        return _custom(options.lr_scheduler_type, optimizer, given)
    if _schedules_itself(optimizer):
        logger.info("--lr_scheduler %s is not used: the optimizer makes its own schedule", options.lr_scheduler)
        return constant(optimizer)
    name = options.lr_scheduler.lower()
    if name in BY_LOSS:
        raise UserError(
            f"--lr_scheduler {name}: lowers the rate by the loss of each step, which is too noisy here. Use cosine or rex, or "
            "end the run by the validation loss (--early_stopping_patience)."
        )
    if name not in SCHEDULERS:
        raise UserError(
            f"--lr_scheduler: unknown schedule '{name}'. Known: {', '.join(SCHEDULERS)}.{suggest(name, SCHEDULERS)}"
        )
    if optimizer.defaults.get("relative_step"):
        if name != "adafactor":
            logger.warning(
                "Adafactor makes its own rate, so neither --lr_scheduler %s nor a learning rate is used. "
                "--optimizer_args relative_step=False makes it use yours",
                name,
            )
        name = "adafactor"
    elif name == "adafactor":
        raise UserError("--lr_scheduler adafactor needs --optimizer_type Adafactor with relative_step=True.")

    module, _, function = SCHEDULERS[name].partition(":")
    factory = getattr(importlib.import_module(module), function)
    check_arguments(factory, given, "--lr_scheduler_args", name)
    arguments = {**_keywords(options, name, factory, num_update_steps), **given}
    if "min_lr" in given:
        arguments.pop("min_lr_rate", None)
    return _made(f"--lr_scheduler {name}", factory, optimizer, arguments)


def _keywords(options: ScheduleOptions, name: str, factory: Callable[..., Any], total: int) -> dict[str, Any]:
    """What the flags say, under the names of `factory`'s parameters."""
    warmup = count_updates(options.lr_warmup_steps or 0, total, "--lr_warmup_steps")
    decay = count_updates(options.lr_decay_steps or 0, total, "--lr_decay_steps")
    if warmup + decay > total:
        raise UserError(f"--lr_warmup_steps {warmup} and --lr_decay_steps {decay} are together more than the {total} steps.")
    takes = inspect.signature(factory).parameters
    ratio = options.lr_scheduler_min_lr_ratio or 0.0
    cycles: float = options.lr_scheduler_num_cycles
    keywords: dict[str, Any] = {
        "num_warmup_steps": warmup,
        "num_training_steps": total,
        "power": options.lr_scheduler_power,
        "timescale": options.lr_scheduler_timescale,
    }
    if name == "cosine_with_restarts":
        keywords["num_cycles"] = cycles
    elif name == "rex":
        keywords["min_lr_rate"] = ratio
    elif name in ("cosine_with_min_lr", "cosine_warmup_with_min_lr"):
        keywords |= {"num_cycles": cycles / 2, "min_lr_rate": ratio}  # a cycle of ours is half a wave: once down
    elif name == "warmup_stable_decay":
        del keywords["num_training_steps"]
        keywords |= {"num_decay_steps": decay, "num_stable_steps": total - warmup - decay}
        keywords |= {"num_cycles": cycles / 2, "min_lr_ratio": ratio}
    given = {key: value for key, value in keywords.items() if key in takes}
    for flag, unset, keys in _UNSET:
        if getattr(options, flag) != unset and not given.keys() & keys:
            logger.warning("--%s %s is not used by --lr_scheduler %s", flag, getattr(options, flag), name)
    return given


def _schedules_itself(optimizer: Optimizer) -> bool:
    """Schedule-free optimizers, which have a training and an evaluation point of their own."""
    return hasattr(optimizer, "eval") and hasattr(optimizer, "train")


def _custom(path: str, optimizer: Optimizer, arguments: dict[str, Any]) -> LRScheduler:
    """A class of torch.optim.lr_scheduler, or `module.Class`."""
    flag = "--lr_scheduler_type"
    if "." not in path:
        known = torch_classes(torch.optim.lr_scheduler, LRScheduler)
        if path.lower() not in known:
            raise UserError(f"{flag}: torch.optim.lr_scheduler has no '{path}'.{suggest(path, known.values())}")
        path = f"torch.optim.lr_scheduler.{known[path.lower()]}"
    cls = load_dotted(path, flag)
    check_arguments(cls.__init__, arguments, "--lr_scheduler_args", path)
    return _made(f"{flag} {path}", cls, optimizer, arguments)


def _made(what: str, factory: Callable[..., Any], optimizer: Optimizer, arguments: dict[str, Any]) -> LRScheduler:
    try:
        scheduler: LRScheduler = factory(optimizer, **arguments)
    except (TypeError, ValueError) as error:
        raise UserError(f"{what} does not accept {arguments}: {error}") from error
    return scheduler
