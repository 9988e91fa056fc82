"""Softmax attention through one of several back ends.

A model is told its back end once, makes an `Attention` of it at every call, which brings the mask into the form that the back
end takes, and hands that to its blocks. `option_groups_attention.ATTENTION_BACKENDS` says what each back end needs.

Shapes: B batch, L tokens, S tokens attended to, H heads, K head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def _over_queries(mask: Tensor) -> Tensor:
    """[B, S] -> [B, 1, 1, S]."""
    return mask[:, None, None, :]


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """[B, L, H * K] -> [B, L, H, K]."""
    return x.unflatten(-1, (num_heads, -1))


def _heads_first(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[B, L, H, K] each -> [B, H, L, K]."""
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    q, k, v = _heads_first(q, k, v)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def _math(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    """The definition, step by step: what the others are tested against."""
    q, k, v = _heads_first(q, k, v)
    scores = (q.float() @ k.float().transpose(-1, -2)) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ v.float()).to(v.dtype).transpose(1, 2)


# ---- flex ------------------------------------------------------------------------------------------------------------


def _block_mask(mask: Tensor) -> Any:
    """For every query the same keys; which blocks of keys are empty is found once a call."""
    from torch.nn.attention.flex_attention import create_block_mask

    def attended(row: Tensor, _head: Tensor, _query: Tensor, key: Tensor) -> Tensor:
        return mask[row, key]

    return create_block_mask(attended, len(mask), None, mask.shape[1], mask.shape[1], device=str(mask.device))


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def _flex(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    """Fused only where it is compiled: inside of a compiled block, or by itself. On a CPU it has no backward pass."""
    from torch.nn.attention.flex_attention import flex_attention

    compute: Any = flex_attention if torch.compiler.is_compiling() or not q.is_cuda else _compiled_flex()
    out: Tensor = compute(*_heads_first(q, k, v), block_mask=mask)
    return out.transpose(1, 2)


# ---- packages --------------------------------------------------------------------------------------------------------


def _xformers(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    from xformers.ops import memory_efficient_attention

    bias = None
    if mask is not None:
        # kernels want rows of the bias to begin at multiples of 16 bytes: a slice of something longer
        length = mask.shape[-1]
        additive = torch.zeros_like(F.pad(mask, (0, -length % 8)), dtype=q.dtype)[..., :length].masked_fill_(~mask, -torch.inf)
        bias = additive.expand(-1, q.shape[2], q.shape[1], -1)
    out: Tensor = memory_efficient_attention(q, k, v, attn_bias=bias)
    return out


class Packing(NamedTuple):
    """Keys of every row, those attended to first, as sequences one after the other: for each row one that its queries attend
    to, and one of the rest that no query does. Nothing has to be counted on the host, and nothing is copied but keys and
    values."""

    order: Tensor
    """[B, S]: where each key comes from."""
    query_starts: Tensor
    """[2 B + 1] int32."""
    key_starts: Tensor
    """[2 B + 1] int32."""


def pack_keys(mask: Tensor) -> Packing:
    batch, length = mask.shape
    order = torch.argsort(~mask, dim=1, stable=True)
    row_starts = torch.arange(batch + 1, device=mask.device, dtype=torch.int32) * length
    attended = mask.sum(1, dtype=torch.int32)
    key_starts = torch.stack([row_starts[:-1], row_starts[:-1] + attended], dim=1).flatten()
    query_starts = torch.stack([row_starts[:-1], row_starts[1:]], dim=1).flatten()
    return Packing(order, torch.cat([query_starts, row_starts[-1:]]), torch.cat([key_starts, row_starts[-1:]]))


def attend_packed(varlen: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
    """[B, L, H, K] each -> the same, through a function of flash-attention's `flash_attn_varlen_func` arguments. L = S."""
    index = packing.order[:, :, None, None]
    k, v = (torch.take_along_dim(x, index, dim=1).flatten(0, 1) for x in (k, v))
    starts = packing.query_starts, packing.key_starts
    out = varlen(q.flatten(0, 1), k, v, *starts, q.shape[1], packing.order.shape[1])
    return _first(out).unflatten(0, (len(packing.order), -1))


def _first(out: Any) -> Tensor:
    """flash-attention 3 gave the log of the softmax's sum with the output, until it did not."""
    found: Tensor = out[0] if isinstance(out, tuple) else out
    return found


def _flash(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    return _through_flash(flash_attn_func, flash_attn_varlen_func, q, k, v, mask)


def _flash3(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    from flash_attn_interface import flash_attn_func, flash_attn_varlen_func

    return _through_flash(flash_attn_func, flash_attn_varlen_func, q, k, v, mask)


def _through_flash(plain: Callable[..., Any], varlen: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    return _first(plain(q, k, v)) if mask is None else attend_packed(varlen, q, k, v, mask)


# ---- choosing one ----------------------------------------------------------------------------------------------------


class Backend(NamedTuple):
    compute: Callable[[Tensor, Tensor, Tensor, Any], Tensor]
    """q [B, L, H, K], k and v [B, S, H, K], a prepared mask or None -> [B, L, H, K]."""
    prepare: Callable[[Tensor], Any] = _over_queries
    """mask [B, S] bool -> the form that `compute` takes."""


BACKENDS: dict[str, Backend] = {
    "sdpa": Backend(_sdpa),
    "math": Backend(_math),
    "xformers": Backend(_xformers),
    "flash": Backend(_flash, pack_keys),
    "flash3": Backend(_flash3, pack_keys),
    "flex": Backend(_flex, _block_mask),
}


@dataclass(frozen=True)
class Attention:
    """Attention of one call of a model: the same mask in every block."""

    mode: str = "sdpa"
    mask: Any = None
    """As `mode` takes it."""

    @classmethod
    def of(cls, mode: str, mask: Tensor | None = None) -> Attention:
        """mask [B, S] bool: tokens that may be attended to, in every row at least one."""
        return cls(mode, None if mask is None else BACKENDS[mode].prepare(mask))

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [B, L, H, K], k and v [B, S, H, K] -> [B, L, H * K]."""
        return BACKENDS[self.mode].compute(q, k, v, self.mask).flatten(2)


# ---- diffusers' UNets ------------------------------------------------------------------------------------------------


class UnetAttention:
    """A processor of diffusers' `Attention` as the blocks of its UNets have it: plain self- and cross-attention, unmasked."""

    def __init__(self, mode: str) -> None:
        self.attend = Attention.of(mode)

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **unused: Any,
    ) -> Tensor:
        """hidden_states [B, L, D], encoder_hidden_states [B, M, D']."""
        if attention_mask is not None:
            raise ValueError("attention masks of a UNet are not supported")
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        projected = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        out: Tensor = attn.to_out[0](self.attend(*(split_heads(x, attn.heads) for x in projected)))
        return attn.to_out[1](out)


def use_attention(denoiser: nn.Module, mode: str) -> None:
    """Make a `Denoiser` or a diffusers UNet compute its attention by `mode`."""
    model: Any = denoiser
    if hasattr(model, "attention_mode"):
        model.attention_mode = mode
    elif mode != "sdpa":  # which is diffusers' own choice
        if unlike := [name for name, module in denoiser.named_modules() if hasattr(module, "set_processor") and _more(module)]:
            raise ValueError(f"attention by {mode}: {unlike[0]} does more than self- and cross-attention")
        model.set_attn_processor(UnetAttention(mode))


def _more(attn: Any) -> bool:
    """Whether diffusers' `Attention` has what `UnetAttention` does not do."""
    parts = attn.group_norm, attn.spatial_norm, attn.norm_q, attn.norm_k, attn.norm_cross, attn.add_k_proj
    return attn.residual_connection or attn.rescale_output_factor != 1 or any(part is not None for part in parts)
