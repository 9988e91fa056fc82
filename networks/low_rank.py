"""What LoRA, LoHa and LoKr share: a rank, `alpha / rank`, dropout, rsLoRA's scale, and DoRA's lengths.

rsLoRA (https://arxiv.org/abs/2312.03732) scales by alpha / sqrt(rank). Files then hold alpha * sqrt(rank), so that every
reader's alpha / rank is what was trained.

DoRA (https://arxiv.org/abs/2402.09353, equation 5) learns the lengths m of a weight's rows apart from their directions:
W' = m (W + dW) / ||W + dW||. As in its section 4.3 gradients take the norm for a constant. The multiplier leads in a straight
line from W (0) to W' (1).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.errors import UserError
from networks.exact_alpha import ExactAlpha
from networks.network_args import BOOLEAN, NetworkArgs, arg
from networks.network_base import Adapter, AdditiveAdapter, Layer, LayerSize

LENGTHS = "dora_scale"


@dataclass(frozen=True, kw_only=True)
class LowRankArgs(NetworkArgs):
    """Arguments of every network, and those of algorithms with a rank."""

    rs_lora: bool | None = arg(BOOLEAN, "rsLoRA: scale by alpha / sqrt(rank) (false)")
    dora_wd: bool | None = arg(BOOLEAN, "DoRA: learn the lengths of a weight's rows apart from their directions (false)")
    wd_on_output: bool | None = arg(BOOLEAN, "false: DoRA's lengths are those of a weight's columns (true)")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.wd_on_output is not None and not self.dora_wd:
            raise UserError(f"--network_args wd_on_output={self.wd_on_output} has no meaning without dora_wd=true.")


class LowRankAdapter(ExactAlpha, AdditiveAdapter):
    """An added weight in factors, scaled by alpha / rank; with `dora_wd`, the sum's lengths are learned as well."""

    arguments = LowRankArgs
    dora_scale: nn.Parameter | None

    def __init__(self, layer: Layer, size: LayerSize, args: NetworkArgs, generator: torch.Generator) -> None:
        super().__init__(layer, size, args, generator)
        base = layer.module
        if isinstance(base, nn.Conv2d) and (base.groups != 1 or base.padding_mode != "zeros"):
            name = type(self).__name__
            raise UserError(f"{layer.key}: {name} cannot adapt a convolution with groups or a padding mode other than zeros.")
        own = args if isinstance(args, LowRankArgs) else LowRankArgs()
        self.rank = size.rank
        self.dropout, self.rank_dropout = args.dropout or 0.0, args.rank_dropout or 0.0
        alpha = float(size.alpha or size.rank)
        self._set_alpha(alpha * math.sqrt(size.rank) if own.rs_lora else alpha)
        self.on_output = own.wd_on_output is not False
        self.register_parameter(LENGTHS, None)
        if own.dora_wd:
            self.dora_scale = nn.Parameter(self._lengths(base.weight.detach().float()))

    @property
    def scale(self) -> float:
        return self._alpha / self.rank

    # ---- DoRA

    def _lengths(self, weight: Tensor) -> Tensor:
        """Of the rows [out, 1, ...] or columns [1, in, ...] of `weight`."""
        other = [dim for dim in range(weight.ndim) if dim != (0 if self.on_output else 1)]
        return torch.linalg.vector_norm(weight, dim=other, keepdim=True)

    def _added_lengths(self) -> Tensor:
        """Of the rows or columns of W + dW, float32."""
        return self._lengths(self.base.weight.float() + self.delta_weight())

    def _gains(self, lengths: Tensor) -> Tensor:
        """m / ||W + dW||, [out, 1, ...] or [1, in, ...]; as LyCORIS has it, a norm of 0 divides too."""
        assert self.dora_scale is not None
        return self.dora_scale.float() / (lengths + torch.finfo(torch.float32).eps)

    def adapted(self, x: Tensor) -> Tensor:
        if self.dora_scale is None:
            return super().adapted(x)
        with torch.autocast(x.device.type, enabled=False):
            with torch.no_grad():
                lengths = self._added_lengths()
            gains = self._gains(lengths).flatten()
        spatial = (1, 1) if isinstance(self.base, nn.Conv2d) else ()
        if not self.on_output:
            return self._adapted_by_columns(x, gains.view(-1, *spatial))
        out, kept = self.base_forward(x), gains  # of what the layer gives without its bias
        if self.multiplier != 1:
            gains = self.multiplier * gains
            kept = 1 - self.multiplier + gains
        kept = kept.to(out.dtype).view(-1, *spatial)
        if self.base.bias is None:
            return self._add_scaled(out * kept, x, gains)
        bias = self.base.bias.to(out.dtype).view(-1, *spatial)
        return self._add_scaled(torch.addcmul(bias * (1 - kept), out, kept), x, gains)

    def _add_scaled(self, out: Tensor, x: Tensor, gains: Tensor) -> Tensor:
        """`out` and `delta` of `x`, each of its outputs times one of `gains` [out]."""
        spatial = (1, 1) if isinstance(self.base, nn.Conv2d) else ()
        return out + gains.to(out.dtype).view(-1, *spatial) * self.delta(x).to(out.dtype)

    def _adapted_by_columns(self, x: Tensor, gains: Tensor) -> Tensor:
        """Scaling a column is scaling what it is multiplied with."""
        out = self.base_forward(x + x * (self.multiplier * (gains - 1)).to(x.dtype))
        return out + self.delta(x * gains.to(x.dtype), self.multiplier).to(out.dtype)

    def merged(self, weight: Tensor) -> Tensor:
        if self.dora_scale is None:
            return super().merged(weight)
        added = weight + self.delta_weight()
        return weight + self.multiplier * (added * self._gains(self._lengths(added)) - weight)

    # ---- dropout

    @property
    def _drops(self) -> bool:
        return self.training and bool(self.dropout or self.rank_dropout)

    def _drop(self, hidden: Tensor, rank_dim: int) -> Tensor:
        """`dropout` on single values, and `rank_dropout` on whole ranks of a sample; what is kept is scaled up."""
        if not self._drops:
            return hidden
        if self.dropout:
            hidden = F.dropout(hidden, self.dropout)
        if self.rank_dropout:
            shape = [1] * hidden.ndim
            shape[0], shape[rank_dim] = hidden.shape[0], hidden.shape[rank_dim]
            kept = torch.rand(shape, device=hidden.device) >= self.rank_dropout
            hidden = hidden * kept.to(hidden.dtype) / (1 - self.rank_dropout)
        return hidden

    def _through(self, x: Tensor, down: Tensor, up: Tensor, strength: float, onto: Tensor | None = None) -> Tensor:
        """up(down(x)) for matrices or, of a convolution, kernels [r, in, k, k] and [out, r, 1, 1]; added to `onto`.

        `strength` is applied at the rank-sized tensor, which is far smaller than the output. A matrix product adds its result
        to `onto` as it goes, which saves writing and reading an output.
        """
        down, up = down.to(x.dtype), up.to(x.dtype)
        if isinstance(self.base, nn.Conv2d):
            added = F.conv2d(_times(self._drop(self._convolve(x, down), rank_dim=1), strength), up)
            return added if onto is None else onto + added.to(onto.dtype)
        hidden = _times(self._drop(F.linear(x, down), rank_dim=-1), strength)
        if onto is None:
            return F.linear(hidden, up)
        if onto.dtype != hidden.dtype:
            return onto + F.linear(hidden, up).to(onto.dtype)
        rows = torch.addmm(onto.reshape(-1, onto.shape[-1]), hidden.reshape(-1, hidden.shape[-1]), up.t())
        return rows.view(onto.shape)

    def _convolve(self, x: Tensor, kernel: Tensor) -> Tensor:
        """With the base layer's stride, padding and dilation."""
        base = self.base
        return F.conv2d(x, kernel, None, base.stride, base.padding, base.dilation)  # type: ignore[arg-type]

    # ---- files

    @classmethod
    def like_file(
        cls, layer: Layer, size: LayerSize, args: NetworkArgs, generator: torch.Generator, tensors: Mapping[str, Tensor]
    ) -> Adapter:
        """The file's alpha is final, and it has lengths or has none."""
        if isinstance(args, LowRankArgs):
            lengths = tensors.get(LENGTHS)
            by_columns = lengths is not None and lengths.shape[0] == 1 != layer.module.weight.shape[0]
            args = replace(args, rs_lora=None, dora_wd=lengths is not None, wd_on_output=False if by_columns else None)
        return cls(layer, size, args, generator)

    def _take(self, tensors: Mapping[str, Tensor], source: str) -> None:
        """Load tensors named as here; the shape of a 1x1 convolution and that of its matrix are the same to us."""
        state = self.state_dict()
        if (LENGTHS in tensors) != (self.dora_scale is not None):
            has, wants = ("has", "was not made") if LENGTHS in tensors else ("lacks", "was made")
            raise UserError(f"{self.key} in {source} {has} DoRA's {LENGTHS}, and this network {wants} with dora_wd=true.")
        for name, given in tensors.items():
            own = state[name]
            if name != "alpha" and _without_ones(given) != _without_ones(own):
                raise UserError(
                    f"shape mismatch: {self.key}.{name} is {tuple(given.shape)} in {source}, "
                    f"this model needs {tuple(own.shape)}. The file was made for another model, or with other --network_args."
                )
            state[name] = given.reshape(own.shape)
        self.load_state_dict(state)


def _times(tensor: Tensor, factor: float) -> Tensor:
    return tensor if factor == 1 else tensor * factor


def without_core(tensors: Mapping[str, Tensor], core: str, a: str, b: str) -> dict[str, Tensor]:
    """A convolution's Tucker decomposition: `core` [i, j, k, k], `a` [i, out], `b` [j, in] become `a` [out, i] and
    `b` [i, in * k * k]."""
    found = dict(tensors)
    if core in found:
        columns = torch.einsum("ijkl,jr->irkl", found.pop(core).float(), tensors[b].float())
        found |= {a: tensors[a].T, b: columns.flatten(1).to(tensors[b].dtype)}
    return found


def _without_ones(tensor: Tensor) -> tuple[int, ...]:
    """Shape as a matrix where trailing dimensions are 1."""
    return tuple(tensor.shape[:2]) + tuple(size for size in tensor.shape[2:] if size != 1)
