"""LoRA: a low-rank weight beside a Linear or Conv2d layer, up @ down * alpha / rank (https://arxiv.org/abs/2106.09685)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.errors import UserError
from networks.network_args import NUMBER, NetworkArgs, arg
from networks.network_base import Adapter, Layer, LayerSize, bind
from networks.network_files import ALGORITHM_SIGNS
from networks.perturbation import Perturbation, disturbance, mean_row_norm

Matrix = nn.Linear | nn.Conv2d
DOWN, UP = "lora_down.weight", "lora_up.weight"


@dataclass(frozen=True, kw_only=True)
class LoRAArgs(NetworkArgs):
    """Arguments of every network, and LoRA's own."""

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

    @property
    def perturbation(self) -> Perturbation | None:
        return None if self.ggpo_sigma is None or self.ggpo_beta is None else Perturbation(self.ggpo_sigma, self.ggpo_beta)


class LoRA(Adapter):
    """`lora_down` maps to the rank (with a convolution's kernel, stride and padding), `lora_up` (1x1) to the output."""

    arguments = LoRAArgs
    plus_parameters = frozenset({UP})
    lora_down: Matrix
    lora_up: Matrix
    alpha: Tensor
    base_norm: Tensor
    deviations: Tensor
    scale: float
    _alpha: float

    def __init__(self, layer: Layer, size: LayerSize, args: NetworkArgs, generator: torch.Generator) -> None:
        super().__init__(layer, size, args, generator)
        base = layer.module
        if isinstance(base, nn.Conv2d) and (base.groups != 1 or base.padding_mode != "zeros"):
            raise UserError(f"{layer.key}: LoRA cannot adapt a convolution with groups or a padding mode other than zeros.")
        self.rank = size.rank
        self.rows = layer.rows
        self.dropout, self.rank_dropout = args.dropout or 0.0, args.rank_dropout or 0.0
        self.lora_down, self.lora_up = _matrices(base, size.rank, self.num_parts)
        nn.init.kaiming_uniform_(self.lora_down.weight, a=math.sqrt(5), generator=generator)
        nn.init.zeros_(self.lora_up.weight)
        self.register_buffer("alpha", torch.tensor(float(size.alpha or size.rank)))
        self.register_load_state_dict_post_hook(_read_scale)
        _read_scale(self)
        self.perturbation = args.perturbation if isinstance(args, LoRAArgs) else None
        if self.perturbation is not None:
            self.register_buffer("base_norm", mean_row_norm(base, layer.key), persistent=False)
            self.register_buffer("deviations", torch.zeros(base.weight.shape[0]))  # saved: the next step depends on it

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LoRA:
        """`.to(dtype)` and the like: `alpha` stays exact in float32, so that a resumed run has the very same scale."""
        super()._apply(fn, recurse)
        self.alpha = torch.tensor(self._alpha, device=self.alpha.device)
        return self

    def delta(self, x: Tensor) -> Tensor:
        own = self._low_rank(x)
        if self.perturbation is None or not self.training:
            return own
        return own + disturbance(self.base, x, self.deviations)

    def _low_rank(self, x: Tensor) -> Tensor:
        down, up = self.lora_down.weight.to(x.dtype), self.lora_up.weight.to(x.dtype)
        if isinstance(self.base, nn.Conv2d):
            hidden = F.conv2d(x, down, None, self.base.stride, self.base.padding, self.base.dilation)  # type: ignore[arg-type]
            return F.conv2d(self._drop(hidden, rank_dim=1) * self._strength, up)
        hidden = self._drop(F.linear(x, down), rank_dim=-1) * self._strength  # [B, ..., parts * r]
        if not self.rows:
            return F.linear(hidden, up)
        pairs = zip(hidden.chunk(self.num_parts, dim=-1), up.split(self.rows), strict=True)
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
    def _strength(self) -> float:
        """Applied at the rank-sized tensor, which is far smaller than the output."""
        return self.scale * self.multiplier

    def _drop(self, hidden: Tensor, rank_dim: int) -> Tensor:
        """`dropout` on single values, and `rank_dropout` on whole ranks of a sample; what is kept is scaled up."""
        if not self.training:
            return hidden
        if self.dropout:
            hidden = F.dropout(hidden, self.dropout)
        if self.rank_dropout:
            shape = [1] * hidden.ndim
            shape[0], shape[rank_dim] = hidden.shape[0], hidden.shape[rank_dim]
            kept = torch.rand(shape, device=hidden.device) >= self.rank_dropout
            hidden = hidden * kept.to(hidden.dtype) / (1 - self.rank_dropout)
        return hidden

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

    def delta_weight(self) -> Tensor:
        product = torch.cat([up @ down for up, down in self._pairs()])
        return (product * self._strength).view(self.base.weight.shape)

    def weight_norm(self) -> Tensor:
        """||up @ down||^2 = sum(up^T up * down down^T): rank-sized products instead of a whole weight."""
        squares = [((up.T @ up) * (down @ down.T)).sum() for up, down in self._pairs()]
        return torch.stack(squares).sum().clamp(min=0).sqrt() * abs(self.scale)

    def rescale(self, ratio: Tensor) -> None:
        root = ratio.sqrt()
        self.lora_up.weight.mul_(root)
        self.lora_down.weight.mul_(root)

    @classmethod
    def size_in_file(cls, key: str, tensors: Mapping[str, Tensor]) -> LayerSize:
        if foreign := [name for name in tensors if name not in (DOWN, UP, "alpha")]:
            wrote = next((ALGORITHM_SIGNS[name] for name in foreign if name in ALGORITHM_SIGNS), "another algorithm")
            raise UserError(
                f"{key} holds {foreign[0]}: the file was made by {wrote}, not by plain LoRA. "
                "Use the network module that made it (--network_module lycoris.kohya reads LyCORIS files)."
            )
        if DOWN not in tensors or UP not in tensors:
            raise UserError(f"{key} lacks {DOWN if DOWN not in tensors else UP}: the file is incomplete.")
        rank = tensors[DOWN].shape[0]
        return LayerSize(rank, float(tensors["alpha"]) if "alpha" in tensors else float(rank))

    def file_tensors(self) -> dict[str, Tensor]:
        """Of a split layer: one pair with a block-diagonal `up`, and `alpha` times the number of parts, so that every
        reader's alpha / rank is what was trained."""
        tensors = super().file_tensors()
        tensors.pop("deviations", None)
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
        return {DOWN: tensors[DOWN], UP: torch.cat(blocks), "alpha": alpha / self.num_parts}

    def load_file_tensors(self, tensors: Mapping[str, Tensor], source: str) -> None:
        size = self.size_in_file(self.key, tensors)
        if self.rows:
            tensors = self._without_zeros(tensors, source)
            size = LayerSize(size.rank // self.num_parts, float(tensors["alpha"]))
        if size.rank != self.rank:
            spatial = isinstance(self.base, nn.Conv2d) and self.base.kernel_size != (1, 1)
            option = "conv_dim" if spatial else "--network_dim"
            raise UserError(f"rank mismatch: file {size.rank}, {option} {self.rank} ({source}). Use --dim_from_weights.")
        state = {**self.state_dict(), "alpha": torch.tensor(size.alpha or size.rank)}
        for name, own in ((DOWN, self.lora_down.weight), (UP, self.lora_up.weight)):
            given = tensors[name]
            if _without_ones(given) != _without_ones(own):  # a 1x1 convolution is often stored as a matrix, and back
                raise UserError(
                    f"shape mismatch: {self.key}.{name} is {tuple(given.shape)} in {source}, "
                    f"this model needs {tuple(own.shape)}. The file was made for another model."
                )
            state[name] = given.reshape(own.shape)
        self.load_state_dict(state)


def _matrices(base: Matrix, rank: int, num_parts: int) -> tuple[Matrix, Matrix]:
    """Down and up, uninitialised: `skip_init` keeps torch's global generator out of it."""

    def make(kind: type[Matrix], *args: Any) -> Any:
        return nn.utils.skip_init(kind, *args, bias=False, dtype=torch.float32)

    if isinstance(base, nn.Conv2d):
        return make(nn.Conv2d, base.in_channels, rank, base.kernel_size), make(nn.Conv2d, rank, base.out_channels, 1)
    return make(nn.Linear, base.in_features, num_parts * rank), make(nn.Linear, rank, base.out_features)


def _without_ones(tensor: Tensor) -> tuple[int, ...]:
    """Shape as a matrix where trailing dimensions are 1."""
    return tuple(tensor.shape[:2]) + tuple(size for size in tensor.shape[2:] if size != 1)


def _read_scale(adapter: nn.Module, _keys: object = None) -> None:
    """alpha / rank as a plain number: read once per load, so that no step waits for the device."""
    assert isinstance(adapter, LoRA)
    adapter._alpha = float(adapter.alpha)
    adapter.scale = adapter._alpha / adapter.rank


factory = bind(LoRA)
create_network = factory.create_network
create_network_from_weights = factory.create_network_from_weights
