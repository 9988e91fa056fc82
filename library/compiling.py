"""How the denoiser is computed: its attention back end, and its blocks compiled one by one.

`ComputePlan` is what the options ask for, checked before anything is loaded; `attach` makes it so for a model that is complete.
Of a block only `forward` is compiled: hooks of block swap stay outside, and no name in `state_dict` changes. Blocks of one kind
share their graphs, adapters included, and a graph serves every size of picture.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from library.attention import use_attention
from library.errors import UserError
from library.family_base import ModelFamily
from library.option_groups_attention import ATTENTION_BACKENDS

if TYPE_CHECKING:
    from library.option_groups import TrainOptions

UNET_BLOCKS = ("BasicTransformerBlock", "ResnetBlock2D")
"""Classes of diffusers' UNets in which nearly all of the time goes."""
MAX_GRAPHS = 64
"""Of one `forward`. torch gives up at 8 and goes on uncompiled; the residual blocks of a UNet have about 12 shapes, each with
and without gradients and, where a batch has one picture, for that."""


@dataclass(frozen=True)
class ComputePlan:
    """What one run computes its denoiser with."""

    attention: str = "sdpa"
    compiler: str | None = None

    @classmethod
    def of(cls, family: ModelFamily, options: TrainOptions, device: torch.device) -> ComputePlan:
        """Raises `UserError` for what this model or `device` cannot do. Reads no more than the headers of files."""
        plan = cls(options.attention_mode, options.attention.compiler)
        check_attention(plan.attention, device, family.head_widths(options))
        if plan.compiler is not None:
            check_compiler(plan.compiler, device)
        return plan

    def attach(self, denoiser: nn.Module) -> None:
        use_attention(denoiser, self.attention)
        if self.compiler is not None:
            compile_blocks(repeated_blocks(denoiser), self.compiler)


def check_attention(mode: str, device: torch.device, head_widths: Sequence[int]) -> None:
    """What the option rules cannot know: the device, and the widths of the model's heads."""
    needs = ATTENTION_BACKENDS[mode]
    name = f"attention by {mode} (--attn_mode)"
    if needs.cuda_only and device.type != "cuda":
        raise UserError(f"{name} needs a CUDA device, and this run uses '{device.type}'. Use sdpa.")
    low, high = needs.widths
    if unfit := [width for width in head_widths if not low <= width <= high or width % needs.width_step]:
        multiples = f", multiples of {needs.width_step}" if needs.width_step > 1 else ""
        raise UserError(f"{name} takes heads {low} to {high} wide{multiples}, and this model has {unfit[0]}. Use sdpa.")


def check_compiler(backend: str, device: torch.device) -> None:
    known = torch._dynamo.list_backends(exclude_tags=("debug",))
    if backend not in [*known, "eager", "aot_eager"]:
        raise UserError(f"--dynamo_backend {backend}: this torch knows {', '.join(known)}. Use inductor, or leave it out.")
    if backend != "inductor":
        return
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise UserError("--torch_compile needs the package triton (pip install triton; on Windows triton-windows).")
    candidates = ("cl",) if os.name == "nt" else ("g++", "clang++", "c++")
    if not any(shutil.which(name) for name in (os.environ.get("CXX"), *candidates) if name):
        raise UserError(f"--torch_compile needs a C++ compiler ({' or '.join(candidates)}). Install one, or leave it out.")


def repeated_blocks(denoiser: nn.Module) -> list[nn.Module]:
    """The blocks of a `Denoiser` or a diffusers UNet in which the time goes."""
    model: Any = denoiser
    if hasattr(model, "blocks"):
        return list(model.blocks())
    return [module for module in denoiser.modules() if type(module).__name__ in UNET_BLOCKS]


def compile_blocks(blocks: Sequence[nn.Module], backend: str) -> None:
    """Compile each block's `forward` when it first runs. Sizes of batches, pictures and captions stay variables from the start:
    a graph for each bucket would be compiled otherwise."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_GRAPHS)
    torch.fx.experimental._config.use_duck_shape = False  # the sides of a first, square picture are two variables, too
    for block in blocks:
        block.forward = torch.compile(block.forward, backend=backend, dynamic=True)  # type: ignore[method-assign]
