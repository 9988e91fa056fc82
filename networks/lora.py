"""LoRA: a low-rank weight beside a Linear or Conv2d layer, up @ down * alpha / rank (https://arxiv.org/abs/2106.09685).

Of its variants here: LoRA-FA (https://arxiv.org/abs/2308.03303) never trains `down`, so that no layer's input is kept for it.
PiSSA (https://arxiv.org/abs/2404.02948) starts from the weight's own largest part. The base stays as it is, and what the
factors were at the start is taken off again: W + up @ down - up_0 @ down_0, which files hold as one pair of twice the rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.errors import UserError
from networks.fused_linear import COMPUTED, is_frozen_linear, linear_with_low_rank
from networks.initial_weights import orthogonal, principal_factors, uniform
from networks.low_rank import LENGTHS, LowRankAdapter, LowRankArgs
from networks.network_args import BOOLEAN, NUMBER, Kind, NetworkArgs, arg, one_of
from networks.network_base import Adapter, Layer, LayerSize, bind
from networks.network_files import check_names
from networks.perturbation import Perturbation, disturbance, mean_row_norm
from networks.weight_norms import column_squares, row_squares

Matrix = nn.Linear | nn.Conv2d
DOWN, UP, MID = "lora_down.weight", "lora_up.weight", "lora_mid.weight"
START = Kind("uniform, orthogonal or pissa", one_of("uniform", "orthogonal", "pissa"))


@dataclass(frozen=True, kw_only=True)
class LoRAArgs(LowRankArgs):
    """Arguments of every network, and LoRA's own."""

    init: str | None = arg(START, "where down starts: uniform, orthogonal, or (up as well) pissa (uniform)")
    freeze_down: bool | None = arg(BOOLEAN, "LoRA-FA: train up only (false)")
    ggpo_sigma: float | None = arg(NUMBER, "disturb weights in training by this times their norm (needs ggpo_beta); about 0.03")
    ggpo_beta: float | None = arg(NUMBER, "and by this times their gradient's squared norm (needs ggpo_sigma); about 0.01")

    def __post_init__(self) -> None:
        super().__post_init__()
        given = {"ggpo_sigma": self.ggpo_sigma, "ggpo_beta": self.ggpo_beta}
        for name, value in given.items():
            if value is not None and value < 0:
                raise UserError(f"--network_args {name}={value}: a factor, at least 0.")
        absent = [name for name, value in given.items() if value is None]
        if len(absent) == 1:
            raise UserError(f"--network_args has one of ggpo_sigma and ggpo_beta. Add {absent[0]}=0.01, for example.")
        if self.init == "pissa":
            unfit = {"dropout": self.dropout, "rank_dropout": self.rank_dropout, "ggpo_sigma": self.ggpo_sigma}
            if wrong := [name for name, value in unfit.items() if value]:
                raise UserError(f"--network_args init=pissa trains the weight's own largest part: remove {wrong[0]}.")

    @property
    def perturbation(self) -> Perturbation | None:
        return None if self.ggpo_sigma is None or self.ggpo_beta is None else Perturbation(self.ggpo_sigma, self.ggpo_beta)


class LoRA(LowRankAdapter):
    """`lora_down` maps to the rank (with a convolution's kernel, stride and padding), `lora_up` (1x1) to the output."""

    arguments = LoRAArgs
    plus_parameters = frozenset({UP})
    lora_down: Matrix
    lora_up: Matrix
    first_down: Tensor | None
    first_up: Tensor | None
    base_norm: Tensor
    deviations: Tensor

    def __init__(self, layer: Layer, size: LayerSize, args: NetworkArgs, generator: torch.Generator) -> None:
        super().__init__(layer, size, args, generator)
        own = args if isinstance(args, LoRAArgs) else LoRAArgs()
        base = layer.module
        self.rows = layer.rows
        self.freeze_down = bool(own.freeze_down)
        self.lora_down, self.lora_up = _matrices(base, size.rank, self.num_parts)
        (orthogonal if own.init == "orthogonal" else uniform)(self.lora_down.weight, generator)
        nn.init.zeros_(self.lora_up.weight)
        for name in ("first_down", "first_up"):
            self.register_buffer(name, None)
        if own.init == "pissa":
            self._start_principal(generator)
        self.perturbation = own.perturbation
        if self.perturbation is not None:
            self.register_buffer("base_norm", mean_row_norm(base, layer.key), persistent=False)
            self.register_buffer("deviations", torch.zeros(base.weight.shape[0]))  # saved: the next step depends on it

    def _start_principal(self, generator: torch.Generator) -> None:
        weight = self.base.weight.detach().float() / self.scale
        if self.rank > min(weight[0].numel(), *(self.rows or weight.shape[:1])):
            raise UserError(f"{self.key}: --network_args init=pissa with rank {self.rank}, which is more than the weight has.")
        parts = weight.split(self.rows) if self.rows else (weight,)
        downs, ups = zip(*(principal_factors(part, self.rank, generator) for part in parts), strict=True)
        self.first_down = torch.cat(downs).to(self.lora_down.weight.device)
        self.first_up = torch.cat(ups).view(self.lora_up.weight.shape).to(self.first_down.device)
        with torch.no_grad():
            self.lora_down.weight.copy_(self.first_down)
            self.lora_up.weight.copy_(self.first_up)

    @classmethod
    def size_of_part(cls, in_file: LayerSize, layer: Layer) -> LayerSize:
        """A file holds the adapters of a fused layer's parts as one of their joint rank and alpha."""
        count = len(layer.rows) or 1
        if in_file.rank % count:
            raise UserError(
                f"{layer.key} has rank {in_file.rank} in the file, which does not divide into {count}: not split_qkv."
            )
        return LayerSize(in_file.rank // count, in_file.alpha / count)

    @property
    def frozen_parameters(self) -> frozenset[str]:
        return frozenset({DOWN}) if self.freeze_down else frozenset()

    def factors(self) -> tuple[Tensor, Tensor]:
        """(down, up) as they are used now."""
        return self.lora_down.weight, self.lora_up.weight

    def delta(self, x: Tensor, multiplier: float = 1.0) -> Tensor:
        own = self._low_rank(x, *self.factors(), self.scale * multiplier)
        if self.first_down is not None and self.first_up is not None:
            own = own - self._low_rank(x, self.first_down, self.first_up, self.scale * multiplier)
        if self.perturbation is None or not self.training:
            return own
        return own + disturbance(self.base, x, self.deviations)

    def adapted(self, x: Tensor) -> Tensor:
        """In one operation with the layer where nothing stands between: no dropout, no other adapter. What is compiled is fused
        by the compiler."""
        if (
            self.dora_scale is not None
            or not self._is_plain
            or self._drops
            or torch.compiler.is_compiling()
            or not is_frozen_linear(self.base, self._replaced)
            or x.dtype not in COMPUTED
        ):
            return super().adapted(x)
        assert isinstance(self.base, nn.Linear)
        return linear_with_low_rank(self.base, x, *self.factors(), self.scale * self.multiplier, self.rows)

    @property
    def _is_plain(self) -> bool:
        """Whether the two factors are all there is."""
        return self.first_down is None and (self.perturbation is None or not self.training)

    def add_to(self, out: Tensor, x: Tensor) -> Tensor:
        if self.rows or not self._is_plain:
            return super().add_to(out, x)
        return self._through(x, *self.factors(), self.scale * self.multiplier, onto=out)

    def _add_scaled(self, out: Tensor, x: Tensor, gains: Tensor) -> Tensor:
        """The gains go into `up`, which is far smaller than the output."""
        if self.rows or not self._is_plain:
            return super()._add_scaled(out, x, gains)
        down, up = self.factors()
        return self._through(x, down, up * gains.view(-1, *[1] * (up.ndim - 1)), self.scale, onto=out)

    def _added_lengths(self) -> Tensor:
        weight = self.base.weight.detach().flatten(1)
        pairs = self._pairs()
        if self.first_down is not None and self.first_up is not None:  # what is taken off, as further ranks
            first = self._parts_of(-self.first_up, self.first_down)
            pairs = [(torch.cat([up, u], dim=1), torch.cat([down, d])) for (up, down), (u, d) in zip(pairs, first, strict=True)]
        pairs = [(up * self.scale, down) for up, down in pairs]
        parts = list(zip(weight.split(self.rows) if self.rows else (weight,), pairs, strict=True))
        spatial = [1] * (self.base.weight.ndim - 2)
        if self.on_output:
            return torch.cat([row_squares(rows, *pair) for rows, pair in parts]).sqrt().view(-1, 1, *spatial)
        squares = torch.stack([column_squares(rows, *pair) for rows, pair in parts]).sum(0)
        return squares.view(self.base.weight.shape[1], -1).sum(1).sqrt().view(1, -1, *spatial)

    def _low_rank(self, x: Tensor, down: Tensor, up: Tensor, strength: float) -> Tensor:
        if not self.rows:
            return self._through(x, down, up, strength)
        hidden = self._drop(F.linear(x, down.to(x.dtype)), rank_dim=-1) * strength  # [B, ..., parts * r]
        pairs = zip(hidden.chunk(self.num_parts, dim=-1), up.to(x.dtype).split(self.rows), strict=True)
        return torch.cat([F.linear(part, rows) for part, rows in pairs], dim=-1)

    @property
    def num_parts(self) -> int:
        """Parts of a fused layer that have a rank-sized space each: `lora_down` holds theirs one below the other,
        `lora_up` each part's rows for its own space."""
        return len(self.rows) or 1

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        """(up, down) of each part as float32 matrices."""
        return self._parts_of(self.lora_up.weight, self.lora_down.weight)

    def _parts_of(self, up: Tensor, down: Tensor) -> list[tuple[Tensor, Tensor]]:
        up, down = up.float().flatten(1), down.float().flatten(1)
        return list(zip(up.split(self.rows) if self.rows else (up,), down.chunk(self.num_parts), strict=True))

    @property
    def watches_gradients(self) -> bool:
        return self.perturbation is not None

    @torch.no_grad()
    def note_gradients(self) -> None:
        """Gradients that overflowed, with which no step is made, change nothing."""
        up, down = self.lora_up.weight.grad, self.lora_down.weight.grad
        if self.perturbation is None or up is None or down is None:
            return
        found = self.perturbation.deviations(self._pairs(), self._parts_of(up, down), self.base_norm.float(), self.scale)
        self.deviations.copy_(torch.where(found.isfinite().all(), found, self.deviations))

    def delta_weight(self, multiplier: float = 1.0) -> Tensor:
        product = torch.cat([up @ down for up, down in self._pairs()])
        if self.first_down is not None and self.first_up is not None:  # exactly 0 at the start
            product = product - torch.cat([up @ down for up, down in self._parts_of(self.first_up, self.first_down)])
        return (product * (self.scale * multiplier)).view(self.base.weight.shape)

    def weight_norm(self) -> Tensor:
        """||up @ down||^2 = sum(up^T up * down down^T): rank-sized products instead of a whole weight."""
        if self.first_down is not None:
            return super().weight_norm()
        squares = [((up.T @ up) * (down @ down.T)).sum() for up, down in self._pairs()]
        return torch.stack(squares).sum().clamp(min=0).sqrt() * abs(self.scale)

    def rescale(self, ratio: Tensor) -> None:
        if self.first_down is not None:
            raise UserError(
                "--scale_weight_norms shrinks the product of two factors, and init=pissa trains a difference. Remove one."
            )
        root = ratio.sqrt()
        self.lora_up.weight.mul_(root)
        self.lora_down.weight.mul_(root)

    @classmethod
    def size_in_file(cls, key: str, tensors: Mapping[str, Tensor]) -> LayerSize:
        check_names(key, tensors, required=(DOWN, UP), known=(MID, LENGTHS, "alpha"), algorithm="plain LoRA")
        rank = tensors[UP].shape[1] if MID in tensors else tensors[DOWN].shape[0]
        return LayerSize(rank, float(tensors["alpha"]) if "alpha" in tensors else float(rank))

    def file_tensors(self) -> dict[str, Tensor]:
        """Of PiSSA: one pair of twice the rank, the second half what is taken off. Of a split layer: one pair with a
        block-diagonal `up`. In both `alpha` grows as the rank does, so that every reader's alpha / rank is what was trained."""
        tensors = {k: v for k, v in super().file_tensors().items() if k not in ("deviations", "first_down", "first_up")}
        if self.first_down is not None and self.first_up is not None:
            downs = zip(tensors[DOWN].chunk(self.num_parts), self.first_down.chunk(self.num_parts), strict=True)
            tensors[DOWN] = torch.cat([half for pair in downs for half in pair])
            tensors[UP] = torch.cat([tensors[UP], -self.first_up], dim=1)
            tensors["alpha"] = tensors["alpha"] * 2
        if self.rows:
            tensors[UP] = torch.block_diag(*tensors[UP].split(self.rows))
            tensors["alpha"] = tensors["alpha"] * self.num_parts
        return tensors

    def _without_zeros(self, tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
        """The reverse of `file_tensors`. Raises `UserError` for a file whose parts share their ranks."""
        up, rank = tensors[UP], tensors[DOWN].shape[0] // self.num_parts
        blocks = [rows[:, i * rank : (i + 1) * rank] for i, rows in enumerate(up.split(self.rows))]
        if tensors[DOWN].shape[0] % self.num_parts or not torch.equal(torch.block_diag(*blocks), up):
            raise UserError(f"{self.key} in {source} was not trained with split_qkv. Remove split_qkv from --network_args.")
        alpha = tensors["alpha"] if "alpha" in tensors else torch.tensor(float(tensors[DOWN].shape[0]))
        return {**tensors, DOWN: tensors[DOWN], UP: torch.cat(blocks), "alpha": alpha / self.num_parts}

    def _with_first(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """PiSSA's reverse of `file_tensors`."""
        quarters = tensors[DOWN].chunk(2 * self.num_parts)
        up, first_up = tensors[UP].chunk(2, dim=1)
        own = {DOWN: torch.cat(quarters[::2]), UP: up, "first_down": torch.cat(quarters[1::2]), "first_up": -first_up}
        return {**tensors, **own}

    @classmethod
    def like_file(
        cls, layer: Layer, size: LayerSize, args: NetworkArgs, generator: torch.Generator, tensors: Mapping[str, Tensor]
    ) -> Adapter:
        """The factors come from the file: a PiSSA goes on as a LoRA of twice the rank."""
        if isinstance(args, LoRAArgs):
            args = replace(args, init=None)
        return super().like_file(layer, size, args, generator, tensors)

    def load_file_tensors(self, tensors: Mapping[str, Tensor], source: str) -> None:
        tensors = without_mid(tensors)
        size = self.size_in_file(self.key, tensors)
        if self.rows:
            tensors = self._without_zeros(tensors, source)
            size = LayerSize(size.rank // self.num_parts, float(tensors["alpha"]))
        if self.first_down is not None:
            if size.rank != 2 * self.rank:
                raise UserError(
                    f"rank mismatch: file {size.rank}, and init=pissa with --network_dim {self.rank} needs {2 * self.rank} "
                    f"({source}). Use --dim_from_weights, and leave init=pissa out."
                )
            tensors, size = self._with_first(tensors), LayerSize(self.rank, size.alpha / 2)
        if size.rank != self.rank:
            spatial = isinstance(self.base, nn.Conv2d) and self.base.kernel_size != (1, 1)
            option = "conv_dim" if spatial else "--network_dim"
            raise UserError(f"rank mismatch: file {size.rank}, {option} {self.rank} ({source}). Use --dim_from_weights.")
        self._take({**tensors, "alpha": torch.tensor(size.alpha or size.rank)}, source)


def without_mid(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """A LoCon with a CP decomposition, up [out, r] . mid [r, q, k, k] . down [q, in], as up . down of the same rank: mid and
    down are one kernel [r, in, k, k]."""
    if MID not in tensors:
        return tensors
    kernel = torch.einsum("rqkl,qi->rikl", tensors[MID].float(), tensors[DOWN].float().flatten(1)).to(tensors[DOWN].dtype)
    return {**{name: tensor for name, tensor in tensors.items() if name != MID}, DOWN: kernel}


class _Linear(nn.Linear):
    def reset_parameters(self) -> None:
        """Left to the adapter: here torch's global generator would be used."""


class _Conv2d(nn.Conv2d):
    def reset_parameters(self) -> None:
        """As above."""


def _matrices(base: Matrix, rank: int, num_parts: int) -> tuple[Matrix, Matrix]:
    """Down and up."""

    def make(kind: Callable[..., Matrix], *args: Any) -> Matrix:
        return kind(*args, bias=False, dtype=torch.float32)

    if isinstance(base, nn.Conv2d):
        return make(_Conv2d, base.in_channels, rank, base.kernel_size), make(_Conv2d, rank, base.out_channels, 1)
    return make(_Linear, base.in_features, num_parts * rank), make(_Linear, rank, base.out_features)


factory = bind(LoRA)
create_network = factory.create_network
create_network_from_weights = factory.create_network_from_weights
