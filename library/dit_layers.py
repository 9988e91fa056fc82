"""Layers that the transformer denoisers share, and the contract they all keep.

Shapes: B batch, L tokens, D width, H heads, K head width.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

RunBlock = Callable[..., Any]
"""(block, *inputs) -> the block's output."""


def run_directly(block: nn.Module, *inputs: Any) -> Any:
    return block(*inputs)


def run_recomputing(block: nn.Module, *inputs: Any) -> Any:
    """Nothing of the block's inside is kept for the backward pass: it is computed again there."""
    if not torch.is_grad_enabled():
        return block(*inputs)
    return checkpoint(block, *inputs, use_reentrant=False)


class Denoiser(nn.Module, ABC):
    """A network of blocks, in its original parameter names.

    Memory policies (checkpointing, offloading) attach to `run_block`, or to `blocks()` with hooks; the network knows none.
    """

    run_block: RunBlock
    attention_mode: str
    """A key of `library.attention.BACKENDS`."""

    def __init__(self) -> None:
        super().__init__()
        self.run_block = run_directly
        self.attention_mode = "sdpa"

    @abstractmethod
    def block_groups(self) -> Sequence[Sequence[nn.Module]]:
        """The blocks in execution order, in groups of equal ones."""

    def blocks(self) -> Sequence[nn.Module]:
        """The blocks in execution order."""
        return [block for group in self.block_groups() for block in group]

    def canonical_name(self, module: nn.Module) -> str:
        """The published name of one of this network's modules. Raises `KeyError` for a foreign one."""
        for name, own in self.named_modules():
            if own is module:
                return name
        raise KeyError(type(module).__name__)

    def enable_gradient_checkpointing(self) -> None:
        self.run_block = run_recomputing


# ---- rotary position embedding ---------------------------------------------------------------------------------------


class Rotation(NamedTuple):
    """cos and sin of every pair's angle, each [B, L, 1, K / 2] float32."""

    cos: Tensor
    sin: Tensor

    def of(self, tokens: slice) -> Rotation:
        """Those of some of the L tokens."""
        return Rotation(self.cos[:, tokens], self.sin[:, tokens])


def rotary_embedding(ids: Tensor, axes: Sequence[int], theta: float = 10_000.0) -> Rotation:
    """Rotations (Su et al. 2021, arXiv 2104.09864) for positions with several axes. ids [B, L, len(axes)].

    axes: widths that add up to K; axis i turns its pairs by position * theta^(-2j / axes[i]). Angles are made in float64
    where the device has it: positions times frequencies lose digits in float32.
    """
    exact = torch.float32 if ids.device.type == "mps" else torch.float64
    angles = [
        ids[..., axis, None].to(exact) * theta ** -(torch.arange(0, width, 2, dtype=exact, device=ids.device) / width)
        for axis, width in enumerate(axes)
    ]
    joined = torch.cat(angles, dim=-1).unsqueeze(2)  # [B, L, 1, K / 2]
    return Rotation(joined.cos().float(), joined.sin().float())


def image_ids(height: int, width: int, device: torch.device | str) -> Tensor:
    """Positions of an image's tokens, [1, h/2 * w/2, 3]: (0, row, column). height and width of the latents."""
    rows, columns = (torch.arange(size // 2, device=device, dtype=torch.float32) for size in (height, width))
    grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1)  # [h/2, w/2, 2]
    return F.pad(grid, (1, 0)).flatten(0, 1).unsqueeze(0)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn neighbouring pairs of x [B, L, H, K], computed in float32."""
    cos, sin = rotation
    if not torch.compiler.is_compiling() and x.device.type != "mps":  # complex numbers are not fused, or not there
        return cast(Tensor, _Rotate.apply(x, torch.complex(cos, sin)))
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # [B, L, H, K / 2]
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return turned.flatten(-2).to(x.dtype)


class _Rotate(Function):
    """Pairs as complex numbers: one pass instead of five. Gradients are turned back; autograd would copy them once more."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, turn: Tensor) -> Tensor:
        """x [B, L, H, K], turn [B, L, 1, K / 2] complex."""
        ctx.save_for_backward(turn)
        return _turned(x, turn)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (turn,) = ctx.saved_tensors
        return _turned(gradients[0], turn.conj()), None


def _turned(x: Tensor, turn: Tensor) -> Tensor:
    # gradients of attention come in any order; where they are rounded as well, both are put right in one pass
    exact = x.to(torch.float32, memory_format=torch.contiguous_format).contiguous()
    pairs = torch.view_as_complex(exact.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)


# ---- norms and modulation --------------------------------------------------------------------------------------------


def _for_norms(x: Tensor) -> tuple[Tensor, AbstractContextManager[object]]:
    """x as norms take it, and what they run under. On a GPU they compute in float32 and round once by themselves: autocast
    would have them read, write and keep float32 copies, which takes several times as long. Elsewhere they sum up gradients in
    the dtype of x, so that it has to be float32."""
    return (x, torch.autocast("cuda", enabled=False)) if x.is_cuda else (x.float(), nullcontext())


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in float32."""
    taken, context = _for_norms(x)
    with context:
        return F.rms_norm(taken, weight.shape, weight.to(taken.dtype), eps).to(x.dtype)


class RMSNorm(nn.Module):
    """`rms_norm`; its weight is called `scale`, as FLUX.1 has it."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.scale, self.eps)


class WeightRMSNorm(nn.Module):
    """`rms_norm`; its weight is called `weight`, as most have it."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class QKNorm(nn.Module):
    """RMS norms of queries and keys."""

    def __init__(self, head_width: int) -> None:
        super().__init__()
        self.query_norm = RMSNorm(head_width)
        self.key_norm = RMSNorm(head_width)

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self.query_norm(q), self.key_norm(k)


def layer_norm(width: int) -> nn.LayerNorm:
    """A layer norm without weights of its own: shift and scale come from the modulation."""
    return nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)


def modulated(norm: nn.LayerNorm, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """norm(x) * (1 + scale) + shift in one pass, computed in float32: each sample has them for the weights of the norm, which
    has none of its own. x [B, L, D]; shift and scale [B, 1, D]."""
    taken, context = _for_norms(x)
    weights, biases = (1 + scale).to(taken.dtype), shift.to(taken.dtype)
    with context:
        samples = [
            F.layer_norm(sample, norm.normalized_shape, weight[0], bias[0], norm.eps)
            for sample, weight, bias in zip(taken, weights, biases, strict=True)
        ]
    return (torch.stack(samples) if len(samples) > 1 else samples[0].unsqueeze(0)).to(x.dtype)


def gated(x: Tensor, gate: Tensor, change: Tensor) -> Tensor:
    """x + gate * change in one pass. x and change [B, L, D]; gate [B, 1, D]."""
    return torch.addcmul(x, gate, change)


class Modulation(nn.Module):
    """`count` vectors of shift, scale and gate from one embedding (adaptive layer norm, Peebles & Xie 2022)."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.lin = nn.Linear(width, count * width)

    def forward(self, vec: Tensor) -> Tensor:
        """[B, D] -> [B, count, D]."""
        return self.lin(F.silu(vec)).unflatten(-1, (self.count, -1))


# ---- time ------------------------------------------------------------------------------------------------------------


def timestep_embedding(t: Tensor, width: int, *, factor: float = 1000.0, max_period: float = 10_000.0) -> Tensor:
    """Sinusoids of t [...] in [0, 1] -> [..., width], cosines first. Always float32: rounded times are other times."""
    half = width // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = (t.float() * factor)[..., None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class MLPEmbedder(nn.Module):
    """Two linear layers with SiLU between."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(inputs, width)
        self.out_layer = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(x)))


class SiluMLP(nn.Module):
    """The same two layers as `mlp.0` and `mlp.2`, as SD3 and Lumina have them."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.mlp(x)
        return out
