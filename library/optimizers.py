"""Optimizers by name, and the object that steps the weights."""

from __future__ import annotations

import ast
import importlib
import inspect
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from library.errors import UserError, suggest

if TYPE_CHECKING:
    from accelerate import Accelerator

    from library.number_check import NumberCheck
    from library.option_groups import OptimizerOptions
    from library.separate_steps import SeparateSteps

logger = logging.getLogger(__name__)


@dataclass
class ParamGroup:
    """Parameters that share a learning rate. `name` ("unet", "textencoder", ...) is kept in the optimizer's group and is what
    logs call it."""

    name: str
    params: list[nn.Parameter]
    learning_rate: float


@dataclass(frozen=True)
class LearningRates:
    """The rates the user asked for. None: `default`. What has a rate of 0 does not learn."""

    default: float
    denoiser: float | None
    text_encoders: tuple[float | None, ...]
    """One for each, or one for all."""

    @property
    def of_denoiser(self) -> float:
        return self.default if self.denoiser is None else self.denoiser

    def of_text_encoder(self, part: str, text_parts: Sequence[str]) -> tuple[str, float]:
        """Log name and learning rate of one of `text_parts`, all that the model has."""
        given = self.text_encoders or (None,)
        if len(given) not in (1, len(text_parts)):
            raise UserError(
                f"--text_encoder_lr has {len(given)} values, this model has {len(text_parts)} text encoders "
                f"({', '.join(text_parts)}). Give one for all, or one each."
            )
        index = text_parts.index(part)
        rate = given[index if len(given) > 1 else 0]
        return "textencoder" if len(text_parts) == 1 else f"textencoder{index + 1}", self.default if rate is None else rate


@dataclass(frozen=True)
class OptimizerSource:
    """Where an optimizer's class is, and what it is made with unless `--optimizer_args` says otherwise."""

    module: str
    attribute: str
    package: str
    """What to `pip install` for it."""
    defaults: Mapping[str, Any] = field(default_factory=dict)


def _bnb(attribute: str, **defaults: Any) -> OptimizerSource:
    return OptimizerSource("bitsandbytes.optim", attribute, "bitsandbytes", defaults)


def _dadapt(attribute: str, module: str = "dadaptation") -> OptimizerSource:
    return OptimizerSource(module, attribute, "dadaptation")


_NESTEROV = {"momentum": 0.9, "nesterov": True}

OPTIMIZERS: dict[str, OptimizerSource] = {
    "AdamW": OptimizerSource("torch.optim", "AdamW", "torch"),
    "AdamW8bit": _bnb("AdamW8bit"),
    "PagedAdamW": _bnb("PagedAdamW"),
    "PagedAdamW8bit": _bnb("PagedAdamW8bit"),
    "PagedAdamW32bit": _bnb("PagedAdamW32bit"),
    "Lion": OptimizerSource("lion_pytorch", "Lion", "lion-pytorch"),
    "Lion8bit": _bnb("Lion8bit"),
    "PagedLion8bit": _bnb("PagedLion8bit"),
    "SGDNesterov": OptimizerSource("torch.optim", "SGD", "torch", _NESTEROV),
    "SGDNesterov8bit": _bnb("SGD8bit", **_NESTEROV),
    "DAdaptation": _dadapt("DAdaptAdamPreprint", "dadaptation.experimental"),
    "DAdaptAdamPreprint": _dadapt("DAdaptAdamPreprint", "dadaptation.experimental"),
    "DAdaptAdaGrad": _dadapt("DAdaptAdaGrad"),
    "DAdaptAdam": _dadapt("DAdaptAdam"),
    "DAdaptAdan": _dadapt("DAdaptAdan"),
    "DAdaptAdanIP": _dadapt("DAdaptAdanIP", "dadaptation.experimental"),
    "DAdaptLion": _dadapt("DAdaptLion"),
    "DAdaptSGD": _dadapt("DAdaptSGD"),
    "Prodigy": OptimizerSource("prodigyopt", "Prodigy", "prodigyopt"),
    "Adafactor": OptimizerSource("transformers.optimization", "Adafactor", "transformers", {"relative_step": True}),
    "RAdamScheduleFree": OptimizerSource("schedulefree", "RAdamScheduleFree", "schedulefree"),
    "AdamWScheduleFree": OptimizerSource("schedulefree", "AdamWScheduleFree", "schedulefree"),
    "SGDScheduleFree": OptimizerSource("schedulefree", "SGDScheduleFree", "schedulefree"),
}
"""sd-scripts' names. Looked up without regard to case; any other name is a class of torch.optim or a dotted path."""

FUSABLE = (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD)
"""Classes with a one-kernel step on CUDA: several times faster than the default for an adapter's many small tensors."""

JOINT = frozenset({"lbfgs", "sam", "gsam", "wsam", "bsam", "looksam", "adahessian", "ranger21", "lomo", "adalomo"})
"""Lower-cased names of classes whose step of a parameter depends on the others, or that run the model again; beside those that
estimate the rate."""


def parse_literals(assignments: Sequence[str], flag: str) -> dict[str, Any]:
    """`["weight_decay=0.1", "betas=0.9,0.99"]` -> `{"weight_decay": 0.1, "betas": (0.9, 0.99)}`; `flag` is named in errors."""
    values = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key.strip().isidentifier():
            raise UserError(f"{flag}: '{assignment}' is not of the form key=value.")
        try:
            values[key.strip()] = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError) as error:
            raise UserError(
                f"{flag}: the value of {key} is not a Python literal: {text}. "
                f"Numbers, True, False, None, tuples like 0.9,0.99 and quoted text like {key}='\"text\"' can be given."
            ) from error
    return values


def check_arguments(call: Callable[..., Any], arguments: Mapping[str, Any], flag: str, name: str) -> None:
    """Raise `UserError` for an argument `call` does not take, before it could be lost or end in a traceback."""
    parameters = inspect.signature(call).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    known = [key for key in parameters if key not in ("self", "params", "optimizer")]
    for key in arguments:
        if key not in known:
            raise UserError(f"{flag}: {name} has no argument '{key}'. It has: {', '.join(known)}.{suggest(key, known)}")


def load_class(source: OptimizerSource, flag: str) -> Any:
    """The class at `source`; a `UserError` says which package to install."""
    try:
        module = importlib.import_module(source.module)
    except ModuleNotFoundError as error:
        raise UserError(
            f"{flag}: {source.attribute} is in the package {source.package}, which is not installed "
            f"({error}). Install it: pip install {source.package}"
        ) from error
    except ImportError as error:
        raise UserError(f"{flag}: {source.module} is installed but cannot be imported: {error}") from error
    if not hasattr(module, source.attribute):
        near = suggest(source.attribute, [name for name in dir(module) if not name.startswith("_")])
        raise UserError(f"{flag}: {source.module} has no '{source.attribute}'.{near}")
    return getattr(module, source.attribute)


def load_dotted(path: str, flag: str) -> Any:
    """The class `module.Class`."""
    module, _, attribute = path.rpartition(".")
    return load_class(OptimizerSource(module, attribute, module.split(".")[0]), flag)


def torch_classes(module: Any, base: type) -> dict[str, str]:
    """Lower-cased name -> name of `module`'s public subclasses of `base`."""
    found = (name for name, value in vars(module).items() if inspect.isclass(value) and issubclass(value, base))
    return {name.lower(): name for name in found if not name.startswith("_") and name != base.__name__}


def find_optimizer(name: str) -> OptimizerSource:
    """Where the optimizer called `name` is; a `UserError` has the nearest known name."""
    if "." in name:
        module, _, attribute = name.rpartition(".")
        return OptimizerSource(module, attribute, module.split(".")[0])
    known = {key.lower(): source for key, source in OPTIMIZERS.items()}
    if name.lower() in known:
        return known[name.lower()]
    in_torch = torch_classes(torch.optim, Optimizer)
    if name.lower() in in_torch:
        return OptimizerSource("torch.optim", in_torch[name.lower()], "torch")
    names = [*OPTIMIZERS, *in_torch.values()]
    nearest = suggest(name, names) or suggest(name.lower(), [n.lower() for n in names])
    raise UserError(
        f"--optimizer_type: unknown optimizer '{name}'. Known: {', '.join(OPTIMIZERS)}, "
        f"any class of torch.optim, or module.Class.{nearest}"
    )


def create_optimizer(options: OptimizerOptions, groups: Sequence[ParamGroup]) -> Optimizer:
    """The optimizer `options` names, with one group per non-empty `ParamGroup`, in order. Group names are kept."""
    filled = [group for group in groups if group.params]
    if not filled:
        raise UserError("nothing to train: no part of the model has a parameter that learns.")
    name = options.name
    source = find_optimizer(name)
    cls = load_class(source, "--optimizer_type")
    arguments = {**source.defaults, **parse_literals(options.optimizer_args or (), "--optimizer_args")}
    check_arguments(cls.__init__, arguments, "--optimizer_args", name)
    for key in ("lr", "params"):
        if key in arguments:
            raise UserError(f"--optimizer_args: '{key}' is not set here. Use --learning_rate, --unet_lr, --text_encoder_lr.")

    rates: list[dict[str, Any]] = [{"lr": group.learning_rate} for group in filled]
    rate: float | None = options.learning_rate
    if source.attribute == "Adafactor" and arguments.get("relative_step"):
        rates, rate = [{} for _ in filled], None  # it makes its own rate; schedulers.py shows it
    elif _estimates_rate(cls) and options.learning_rate <= 0.1:
        logger.warning(
            "%s estimates the learning rate and scales it by yours: use about 1.0, not %g", name, options.learning_rate
        )
    if cls in FUSABLE and not {"fused", "foreach"} & arguments.keys() and all(p.is_cuda for g in filled for p in g.params):
        arguments["fused"] = True
    params = [{"params": group.params, "name": group.name, **lr} for group, lr in zip(filled, rates, strict=True)]
    try:
        optimizer: Optimizer = cls(params, lr=rate, **arguments)
    except (TypeError, ValueError) as error:
        raise UserError(f"--optimizer_args: {name} does not accept {arguments}: {error}") from error
    if hasattr(optimizer, "train"):
        optimizer.train()
    return optimizer


def _estimates_rate(cls: type) -> bool:
    return cls.__name__.lower().startswith(("dadapt", "prodigy"))


def steps_jointly(cls: type) -> bool:
    """Whether optimizers of this class have to see all parameters at once."""
    return _estimates_rate(cls) or any(base.__name__.lower() in JOINT for base in cls.__mro__)


def describe_optimizer(options: OptimizerOptions) -> str:
    """`ss_optimizer`: `torch.optim.adamw.AdamW(weight_decay=0.1)`."""
    source = find_optimizer(options.name)
    cls = load_class(source, "--optimizer_type")
    given = {**source.defaults, **parse_literals(options.optimizer_args or (), "--optimizer_args")}
    arguments = ",".join(f"{key}={value}" for key, value in given.items())
    path = f"{cls.__module__}.{cls.__name__}"
    return f"{path}({arguments})" if arguments else path


def group_rates(optimizer: Optimizer) -> dict[str, float]:
    """What logs show: `lr/<group>`, and `lr/d*lr/<group>` for optimizers that estimate the rate as d."""
    rates = {}
    for index, group in enumerate(optimizer.param_groups):
        name = group.get("name", f"group{index}")
        if group["lr"] is not None:
            rates[f"lr/{name}"] = float(group["lr"])
            if "d" in group:
                rates[f"lr/d*lr/{name}"] = float(group["d"]) * float(group["lr"])
    return rates


def load_exactly(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """`optimizer.load_state_dict`, with every tensor in the dtype it was saved in: torch makes them the parameter's, so that
    what is kept in float32 beside a bf16 weight would be rounded."""
    optimizer.load_state_dict(dict(state))
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, saved in state["state"].items():
        loaded = optimizer.state[parameters[number]]
        for key, value in saved.items():
            if isinstance(value, torch.Tensor) and key in loaded and loaded[key].dtype != value.dtype:
                loaded[key] = value.to(loaded[key].device, copy=True)


@contextmanager
def weights_put_back(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Afterwards the parameters are what they were, bit for bit. The copies are in main memory."""
    before = [parameter.detach().to("cpu", copy=True) for parameter in parameters]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)


class UpdateRule(ABC):
    """When and how weights are stepped. The loop calls these in the order they stand here."""

    optimizer: Optimizer

    def before_last_batch(self, step: int, num_images: int, backward: Callable[[], object] | None = None) -> None:
        """Gradients are complete after the batch that comes now. `step`: updates made before this one; `num_images`: of this
        process in this update; `backward`: computes the batch's gradients as they will be, to look at them beforehand."""
        return

    def before_backward(self, loss: torch.Tensor) -> None:
        """Called with the loss of every micro-batch. Raises `NotFinite` where its backward pass would step weights."""
        return

    def after_backward(self, parameters: Sequence[nn.Parameter]) -> Sequence[nn.Parameter]:
        """Those of `parameters` whose gradients the processes have to average before `step`. Some weights may be stepped here:
        like `step`, it is called where weights and gradients are together (`BlockSwap.updating`)."""
        return parameters

    def logs(self) -> dict[str, torch.Tensor]:
        """Of the last step, to be logged."""
        return {}

    def watch(self, on_gradients: Callable[[], None]) -> None:
        """Have `on_gradients` called when all gradients of an update are there, as they are stepped with."""
        raise UserError(
            "--fused_backward_pass frees gradients one by one, and ggpo_sigma and ggpo_beta in --network_args need those of a "
            "layer together. Remove --fused_backward_pass."
        )

    @abstractmethod
    def step(self, parameters: Sequence[nn.Parameter], loss: torch.Tensor) -> bool:
        """Make the update, whose loss is `loss`, and clear the gradients. False when fp16 overflowed and nothing was stepped.

        Raises `NotFinite`, with weights and optimizer as they were unless that says otherwise.
        """

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """The weights to save, validate and preview with: schedule-free optimizers train at another point.

        Afterwards they are what they were, bit for bit: going there and back is only nearly so, and previews and saves must
        not change what is learned. A state to resume from is saved *outside* of this.
        """
        inner: Any = getattr(self.optimizer, "optimizer", self.optimizer)
        if not hasattr(inner, "eval"):
            yield
            return
        with weights_put_back([parameter for group in inner.param_groups for parameter in group["params"]]):
            inner.eval()
            try:
                yield
            finally:
                inner.train()


@dataclass
class StandardUpdate(UpdateRule):
    """Weights are stepped after the whole backward pass, with the norm of all gradients together clipped."""

    optimizer: Optimizer
    """As `accelerator.prepare` gave it, so that the loss scaling of fp16 is undone and overflows are skipped."""
    max_grad_norm: float
    """0: no clipping."""
    accelerator: Accelerator
    numbers: NumberCheck
    steps: SeparateSteps | None = None
    """For weights in bf16 that are stepped in float32, a portion at a time."""
    norm: torch.Tensor | None = None
    """Of the last step's gradients before clipping, on the device."""
    on_gradients: Callable[[], None] | None = None
    add_up: Callable[[torch.Tensor], None] | None = None
    """Sums a tensor over the processes, in place, where each has a part of every gradient; None where it has them whole."""

    def watch(self, on_gradients: Callable[[], None]) -> None:
        self.on_gradients = on_gradients

    def logs(self) -> dict[str, torch.Tensor]:
        return {} if self.norm is None else {"norm/gradient": self.norm}

    def before_last_batch(self, step: int, num_images: int, backward: Callable[[], object] | None = None) -> None:
        if self.steps is not None:
            self.steps.begin(step)

    def step(self, parameters: Sequence[nn.Parameter], loss: torch.Tensor) -> bool:
        if self.max_grad_norm > 0:
            self.norm = self._clip(parameters)
        else:
            self.accelerator.unscale_gradients()  # as clipping does
            self.norm = self._norm(parameters)
        bad = self.numbers.ask(loss, self.norm)
        inner: Any = getattr(self.optimizer, "optimizer", self.optimizer)
        if self._obeys(inner):
            inner.found_inf = bad
        else:
            self.numbers.settle()
        if self.on_gradients is not None:
            self.on_gradients()
        if self.steps is None:
            self.optimizer.step()
        else:
            self.steps.step_all()
        self.numbers.settle()
        self.optimizer.zero_grad()
        return not self.accelerator.optimizer_step_was_skipped

    def _clip(self, parameters: Sequence[nn.Parameter]) -> torch.Tensor:
        if self.add_up is None:
            norm: torch.Tensor = self.accelerator.clip_grad_norm_(parameters, self.max_grad_norm)
            return norm
        norm = self._norm(parameters)
        torch.nn.utils.clip_grads_with_norm_(parameters, self.max_grad_norm, norm)
        return norm

    def _norm(self, parameters: Sequence[nn.Parameter]) -> torch.Tensor:
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.add_up is None:
            return norm
        square = norm.float().square()
        self.add_up(square)
        return square.sqrt()

    def _obeys(self, inner: Any) -> bool:
        """Whether this optimizer leaves weights and state as they are where a number on the device says so."""
        alone = self.steps is None and self.on_gradients is None and self.accelerator.scaler is None
        return alone and type(inner) in FUSABLE and all(group["fused"] for group in inner.param_groups)
