"""Arithmetic on adapters' layers as they are in files: into a weight, with one another, from a weight, to another rank.

Everything is computed in float32. Layers are those of sd-scripts' names (`networks.file_formats.own_layers`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from library.errors import UserError
from library.rng import keyed_generator
from networks.initial_weights import principal_factors
from networks.lora import DOWN, UP, LoRA, without_mid
from networks.low_rank import LENGTHS
from networks.network_base import algorithm_of
from networks.network_files import writer_of
from networks.network_targets import Layer

ALPHA = "alpha"
PLAIN = frozenset({DOWN, UP, ALPHA})
"""Of LoRA without variants."""
SMALL = 256
"""Matrices up to this size are decomposed as fast wholly."""
LayerWeights = dict[str, Tensor]
"""Tensors of one layer of a file by their name in it."""


def _module(weight: Tensor) -> nn.Linear | nn.Conv2d:
    made: nn.Linear | nn.Conv2d
    if weight.ndim == 4:
        made = nn.Conv2d(weight.shape[1], weight.shape[0], tuple(weight.shape[2:]), bias=False, device="meta")  # type: ignore[arg-type]
    else:
        made = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    made.weight = nn.Parameter(weight, requires_grad=False)
    return made


@torch.no_grad()
def merged_weight(weight: Tensor, key: str, part: str, adapters: Sequence[tuple[Mapping[str, Tensor], float]]) -> Tensor:
    """A layer's float32 `weight`, which may be changed, with its adapters, of any algorithm, at their multipliers in it, one
    after the other. LoRA takes no further memory of the weight's size."""
    for tensors, multiplier in adapters:
        if not tensors.keys() - PLAIN:
            weight = weight.contiguous()
            factors, matrix = factors_of(key, tensors, weight.device), weight.view(len(weight), -1)
            if matrix.shape != (factors.up.shape[0], factors.down.shape[1]):
                theirs = (factors.up.shape[0], factors.down.shape[1])
                raise UserError(f"{key} is {tuple(matrix.shape)} in the model and {theirs} in the adapter: of another model.")
            matrix.addmm_(factors.up, factors.down, alpha=multiplier)
            continue
        algorithm = algorithm_of(key, tensors)
        layer = Layer(key, part, _module(weight))
        size = algorithm.size_of_part(algorithm.size_in_file(key, tensors), layer)
        adapter = algorithm.like_file(layer, size, algorithm.arguments(), keyed_generator("merging", key), tensors)
        adapter.load_file_tensors(dict(tensors), key)
        adapter.to(weight.device).float()
        adapter.multiplier = multiplier
        weight = adapter.merged(weight)
    return weight


# ---- LoRA as two matrices ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Factors:
    """up [out, r] and down [r, in * kernel], float32, whose product is what a layer adds, and the kernel."""

    up: Tensor
    down: Tensor
    kernel: tuple[int, ...] = ()

    @property
    def rank(self) -> int:
        return self.up.shape[1]

    @property
    def is_spatial(self) -> bool:
        """Of a convolution larger than 1x1."""
        return math.prod(self.kernel) > 1

    def norm(self) -> float:
        """Of the product, which is not made."""
        return max(float((self.up.T @ self.up * (self.down @ self.down.T)).sum()), 0.0) ** 0.5

    def tensors(self, scale: float = 1.0) -> LayerWeights:
        """As a file has them; alpha / rank is `scale`."""
        down = self.down.reshape(self.rank, -1, *self.kernel) if self.kernel else self.down
        up = (self.up / scale).reshape(*self.up.shape, *[1] * len(self.kernel))
        return {DOWN: down.contiguous(), UP: up.contiguous(), ALPHA: torch.tensor(float(self.rank) * scale)}


def factors_of(key: str, tensors: Mapping[str, Tensor], device: torch.device | str = "cpu") -> Factors:
    """alpha / rank is multiplied into `up`. Raises `UserError` for other algorithms than LoRA, and for DoRA."""
    writer = writer_of(tensors)
    if LENGTHS in tensors or (writer is not None and UP not in tensors):
        name = "DoRA" if writer is None or LENGTHS in tensors else writer.algorithm
        raise UserError(
            f"{key} is of {name}. Only plain LoRAs can be joined with one another and resized: merge it into a model "
            "(tools/merge_lora.py --model), and take a LoRA out of that (tools/extract_lora_from_models.py)."
        )
    scale, tensors = scale_of(key, tensors), without_mid(tensors)
    down, up = tensors[DOWN].to(device).float(), tensors[UP].to(device).float()
    return Factors(up.flatten(1) * scale, down.flatten(1), tuple(down.shape[2:]))


def scale_of(key: str, tensors: Mapping[str, Tensor]) -> float:
    """alpha / rank."""
    size = LoRA.size_in_file(key, tensors)
    return (size.alpha or size.rank) / size.rank


@dataclass(frozen=True)
class RankRule:
    """How many ranks are kept of singular values s_1 >= s_2 >= ..., never more than `most`.

    method: fixed (`most`); sv_ratio: those above s_1 / value; sv_cumulative: as few as sum to `value` of their sum; sv_fro: as
    few as have `value` of the Frobenius norm; energy: as few as have `value` of its square.
    """

    most: int
    method: str = "fixed"
    value: float = 0.0

    def __post_init__(self) -> None:
        if self.most < 1:
            raise UserError(f"a rank of {self.most}: at least 1 is needed.")
        if self.method == "sv_ratio" and self.value < 1:
            raise UserError(f"sv_ratio {self.value}: a ratio of singular values, at least 1.")
        if self.method not in ("fixed", "sv_ratio") and not 0 < self.value <= 1:
            raise UserError(f"{self.method} {self.value}: a share, more than 0 and at most 1.")

    def rank(self, values: Tensor) -> int:
        total = float(values.square().sum())
        if total == 0:
            return 1
        if self.method == "fixed":
            wanted = len(values)
        elif self.method == "sv_ratio":
            wanted = int((values > values[0] / self.value).sum())
        else:
            amounts = values if self.method == "sv_cumulative" else values.square()
            share = self.value**2 if self.method == "sv_fro" else self.value
            reached = amounts.double().cumsum(0) / amounts.double().sum()
            wanted = int((reached < share * (1 - 1e-9)).sum()) + 1
        return max(1, min(wanted, self.most, len(values)))


def _split(left: Tensor, values: Tensor, right: Tensor, rule: RankRule, kernel: tuple[int, ...]) -> Factors:
    rank = rule.rank(values)
    root = values[:rank].sqrt()
    return Factors(left[:, :rank] * root, root[:, None] * right[:rank], kernel)


@torch.no_grad()
def reduced(factors: Factors, rule: RankRule) -> Factors:
    """The best approximation of up @ down by fewer ranks; the product is never made."""
    left_basis, left_rest = torch.linalg.qr(factors.up)
    right_basis, right_rest = torch.linalg.qr(factors.down.T)
    left, values, right = torch.linalg.svd(left_rest @ right_rest.T, full_matrices=False)
    return _split(left_basis @ left, values, right @ right_basis.T, rule, factors.kernel)


@torch.no_grad()
def extracted(change: Tensor, rule: RankRule, key: str, *, exact: bool = False) -> Factors:
    """The best approximation of a weight's `change` [out, in, ...].

    A fixed rank of a large matrix is found by randomised subspace iteration unless `exact`; all else needs all singular values.
    """
    kernel, matrix = tuple(change.shape[2:]), change.float().flatten(1)
    if rule.method == "fixed" and not exact and min(matrix.shape) > SMALL:
        rank = min(rule.most, *matrix.shape)
        down, up = principal_factors(matrix, rank, keyed_generator("extract", key))
        return Factors(up, down, kernel)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return _split(left, values, right, rule, kernel)


def clamped(factors: Factors, quantile: float) -> Factors:
    """sd-scripts' `--clamp_quantile`: numbers beyond this quantile of all are cut to it."""
    numbers = torch.cat([factors.up.flatten(), factors.down.flatten()])
    limit = float(numbers.sort().values[min(int(quantile * len(numbers)), len(numbers) - 1)])
    return Factors(factors.up.clamp(-limit, limit), factors.down.clamp(-limit, limit), factors.kernel)


# ---- adapters with adapters --------------------------------------------------------------------------------------------


def concatenated(parts: Sequence[tuple[Factors, float]]) -> Factors:
    """The exact sum of adapters of one layer at their strengths; its rank is the sum of theirs."""
    up = torch.cat([factors.up * strength for factors, strength in parts], dim=1)
    return Factors(up, torch.cat([factors.down for factors, _ in parts]), parts[0][0].kernel)


def blended(key: str, parts: Sequence[tuple[Factors, float]]) -> Factors:
    """Factors added up, as sd-scripts does without `--concat`: not the sum of what the adapters do, but of the same rank.

    Each factor has the square root of the strength, whose sign `up` has. Raises `UserError` for ranks that differ.
    """
    ranks = {factors.rank for factors, _ in parts}
    if len(ranks) > 1:
        raise UserError(f"{key} has ranks {', '.join(map(str, sorted(ranks)))}, which only --method concat or svd can join.")
    roots = [math.sqrt(abs(strength)) for _, strength in parts]
    ups = [f.up * (root if strength >= 0 else -root) for (f, strength), root in zip(parts, roots, strict=True)]
    downs = [f.down * root for (f, _), root in zip(parts, roots, strict=True)]
    return Factors(torch.stack(ups).sum(0), torch.stack(downs).sum(0), parts[0][0].kernel)


def shuffled(factors: Factors, key: str) -> Factors:
    """The same with its ranks in another order."""
    order = torch.randperm(factors.rank, generator=keyed_generator("shuffle", key)).to(factors.up.device)
    return Factors(factors.up[:, order], factors.down[order], factors.kernel)


def cut(tensors: Mapping[str, Tensor], key: str, rank: int) -> LayerWeights:
    """The first ranks of a DyLoRA, at the strength alpha / sqrt(rank) they were trained with (`networks.dylora`)."""
    size = LoRA.size_in_file(key, tensors)
    if rank > size.rank:
        raise UserError(f"{key} has rank {size.rank}, which cannot be cut to {rank}.")
    alpha = (size.alpha or size.rank) * math.sqrt(rank / size.rank)
    return {DOWN: tensors[DOWN][:rank].clone(), UP: tensors[UP][:, :rank].clone(), ALPHA: torch.tensor(alpha)}


def is_finite(tensors: Mapping[str, Tensor]) -> bool:
    return all(bool(torch.isfinite(tensor.float()).all()) for tensor in tensors.values())
