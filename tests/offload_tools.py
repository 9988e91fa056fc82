"""A small model for the swap tests, a training loop that traces everything, and plans that are wrong on purpose."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from library.activation_offload import ActivationOffload
from library.custom_offloading_utils import BlockGroup, BlockSwap, max_swappable
from library.offload_plan import Pass, RingPlan
from networks.lora import LoRA
from networks.network_args import NetworkArgs
from networks.network_targets import Layer, LayerSize

CPU = torch.device("cpu")
PAIRS = [(n, s) for n in range(2, 13) for s in range(max_swappable(n) + 1)]

# ---- plans that are wrong ----------------------------------------------------------------------------------------------


class LatePlan(RingPlan):
    def successor(self, block: int, running: Pass) -> int | None:
        return super().successor(block - 1, running) if block else None


class ForwardPlan(RingPlan):
    def successor(self, block: int, running: Pass) -> int | None:
        return None if running is Pass.BACKWARD else super().successor(block, running)


class EagerPlan(RingPlan):
    def successor(self, block: int, running: Pass) -> int | None:
        found = super().successor(block, running)
        return found if running is Pass.BACKWARD or found is not None else self.slot_of(block)


# ---- a model -----------------------------------------------------------------------------------------------------------

WIDTH = 8


class Block(nn.Module):
    """Weights of several dtypes, a transposed one, one used twice under two names, and a frozen int8 one."""

    calls: Tensor
    eighth: Tensor

    def __init__(self, index: int, mixed: bool) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(index)
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down, self.again = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.vec = nn.Linear(WIDTH, WIDTH)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=random) * 0.3
        self.down.weight.data = self.down.weight.data.t().contiguous().t()
        self.again.weight = self.vec.weight
        self.mixed = mixed
        if mixed:
            self.up.to(torch.bfloat16)
            self.stored = nn.Parameter(torch.randint(-9, 9, (WIDTH,), dtype=torch.int8, generator=random), requires_grad=False)
            self.register_buffer("eighth", torch.randn(WIDTH, generator=random).to(torch.float8_e4m3fn))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.inner_checkpoint = False

    def forward(self, x: Tensor, *, vec: Tensor) -> tuple[Tensor, Tensor]:
        if self.inner_checkpoint and torch.is_grad_enabled():
            out: tuple[Tensor, Tensor] = checkpoint(self.compute, x, vec, use_reentrant=False)
            return out
        return self.compute(x, vec)

    def compute(self, x: Tensor, vec: Tensor) -> tuple[Tensor, Tensor]:
        self.calls += 1
        hidden = self.again(self.norm(x)) + self.vec(vec)
        hidden = self.up(hidden.to(self.up.weight.dtype)).float()
        if self.mixed:
            hidden = hidden * (1 + 0.01 * torch.cat([self.stored.float(), self.eighth.float()]))
        return x + self.down(torch.tanh(hidden)), vec


class Model(nn.Module):
    """`head` shares its weight with `embed`; `shared` is in two blocks."""

    def __init__(self, num_blocks: int = 6, *, mixed: bool = False, checkpointing: str = "none") -> None:
        super().__init__()
        random = torch.Generator().manual_seed(99)
        self.embed, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.embed.weight.data = torch.randn(WIDTH, WIDTH, generator=random) * 0.3
        self.embed.bias.data, self.head.bias.data = torch.zeros(WIDTH), torch.zeros(WIDTH)
        self.head.weight = self.embed.weight
        self.list = nn.ModuleList(Block(index, mixed) for index in range(num_blocks))
        self.checkpointing = checkpointing
        for block in self.list:
            assert isinstance(block, Block)
            block.inner_checkpoint = checkpointing == "inside"

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        vec = torch.tanh(x)
        for block in self.list:
            if self.checkpointing in ("reentrant", "plain"):

                def call(x: Tensor, vec: Tensor, block: nn.Module = block) -> Any:
                    return block(x, vec=vec)

                x, vec = checkpoint(call, x, vec, use_reentrant=self.checkpointing == "reentrant")
            else:
                x, vec = block(x, vec=vec)
        return self.head(x)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    return list(model.get_submodule("list").children())


def adapters_on(model: nn.Module) -> nn.ModuleList:
    """LoRA on every Linear of the blocks, outside of the model; up is not zero, so that down learns too."""
    model.requires_grad_(False)
    adapters = nn.ModuleList()
    for number, block in enumerate(blocks_of(model)):
        for name in ("up", "down", "vec"):
            base = block.get_submodule(name)
            assert isinstance(base, nn.Linear)
            layer = Layer(f"{number}_{name}", "denoiser", base)
            adapter = LoRA(layer, LayerSize(2, 2.0), NetworkArgs(), torch.Generator().manual_seed(number))
            adapter.lora_up.weight.data.normal_(generator=torch.Generator().manual_seed(number))
            adapter.attach()
            adapters.append(adapter)
    return adapters


Made = tuple[Model, nn.Module]
"""The model, and the module whose parameters learn."""


def make(*, learning: bool, checkpointing: str = "none", mixed: bool = False, num_blocks: int = 6) -> Made:
    model = Model(num_blocks, mixed=mixed, checkpointing=checkpointing)
    return (model, model) if learning else (model, adapters_on(model))


# ---- a training loop ---------------------------------------------------------------------------------------------------

Optimizer = Callable[[Sequence[Tensor]], torch.optim.Optimizer]


def sgd(parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def adamw(parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01)


@dataclass
class Trace:
    """Everything that has to be equal, in order."""

    tensors: list[Tensor] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def add(self, *tensors: Tensor | None) -> None:
        self.tensors += [torch.zeros(0) if tensor is None else tensor.detach().float().clone() for tensor in tensors]


def same(first: Trace, second: Trace) -> bool:
    assert len(first.tensors) == len(second.tensors) > 10
    return all(torch.equal(a, b) for a, b in zip(first.tensors, second.tensors, strict=True))


def batch(step: int) -> Tensor:
    return torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(1000 + step)).requires_grad_()


def learners(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def train(
    made: Made, swap: BlockSwap | None, optimizer: Optimizer, *, steps: int = 5, micro: int = 1, previews: bool = False
) -> Trace:
    """Steps after backward. Traces outputs, gradients and weights of every step."""
    model, learns = made
    parameters = learners(learns)
    opt, trace = optimizer(parameters), Trace()
    for step in range(steps):
        for part in range(micro):
            x = batch(step * micro + part)
            out = model(x)
            trace.add(out)
            out.square().mean().backward()
            trace.add(x.grad)
        with swap.updating() if swap else nullcontext():
            trace.add(*(parameter.grad for parameter in parameters))
            opt.step()
            opt.zero_grad(set_to_none=True)
            trace.add(*parameters)
        if previews:
            with torch.no_grad():
                trace.add(model(batch(500 + step)), model(batch(600 + step)))
    with swap.host_weights() if swap else nullcontext():
        trace.add(*model.state_dict().values())
    return trace


def train_fused(made: Made, swap: BlockSwap | None, optimizer: Optimizer, *, steps: int = 5) -> Trace:
    """Each parameter is stepped as soon as it has its gradient."""
    model, learns = made
    trace, parameters = Trace(), learners(learns)
    optimizers = {id(parameter): optimizer([parameter]) for parameter in parameters}
    gradients: dict[int, Tensor] = {}

    def update(parameter: Tensor) -> None:
        assert parameter.grad is not None
        gradients[id(parameter)] = parameter.grad.clone()
        optimizers[id(parameter)].step()
        parameter.grad = None

    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(update)
    for step in range(steps):
        out = model(batch(step))
        trace.add(out)
        out.square().mean().backward()
        assert gradients.keys() == optimizers.keys()
        trace.add(*(gradients.pop(id(parameter)) for parameter in parameters))
    with swap.host_weights() if swap else nullcontext():
        trace.add(*model.state_dict().values())
    return trace


def swapped(made: Made, num_swapped: int, *, learning: bool, **kwargs: Any) -> BlockSwap:
    return BlockSwap(made[0], [BlockGroup(blocks_of(made[0]), num_swapped)], CPU, learning=learning, **kwargs)


@contextmanager
def offloading(model: nn.Module, active: bool) -> Iterator[ActivationOffload | None]:
    offload = ActivationOffload(model, CPU, min_bytes=0) if active else None
    yield offload
    if offload is not None:
        assert offload.offloaded_bytes > 0
        offload.close()


CHECKPOINTING = ["none", "plain", "reentrant", "inside"]
UPDATES = {"frozen": (False, train), "learning": (True, train), "fused": (True, train_fused)}
