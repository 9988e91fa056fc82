"""LoKr: a Kronecker product (LyCORIS, https://arxiv.org/abs/2309.14859, section 3; KronA, https://arxiv.org/abs/2212.10650).

dW = w1 (x) w2 * alpha / rank with w1 [a, c] and w2 [b, d] for a weight [a b, c d]; either may be the product of two factors of
the rank. It is never built: (w1 (x) w2) x = w1 X w2^T with x as a matrix X [c, d]. Where neither is factored the scale is 1, as
in every reader. Files are LyCORIS'; a convolution's kernel belongs to w2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.errors import UserError
from networks.low_rank import LENGTHS, LowRankAdapter, LowRankArgs, without_core
from networks.network_args import BOOLEAN, INTEGER, NetworkArgs, arg
from networks.network_base import Adapter, Layer, LayerSize, bind
from networks.network_files import check_names

W1, W2, CORE = "lokr_w1", "lokr_w2", "lokr_t2"
FIRST, SECOND = (f"{W1}_a", f"{W1}_b"), (f"{W2}_a", f"{W2}_b")
NAMES = (W1, *FIRST, W2, *SECOND)


@dataclass(frozen=True, kw_only=True)
class LoKrArgs(LowRankArgs):
    """Arguments of every network with a rank, and LoKr's own, under LyCORIS' names."""

    factor: int | None = arg(INTEGER, "side of w1, or a layer's nearest smaller divisor; at most the width's root (-1)")
    decompose_both: bool | None = arg(BOOLEAN, "factor w1, too, where it is large enough (false)")
    full_matrix: bool | None = arg(BOOLEAN, "factor neither; the rank has no meaning (false)")
    unbalanced_factorization: bool | None = arg(BOOLEAN, "w1 has the larger part of the rows (false)")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.factor is not None and self.factor != -1 and self.factor < 1:
            raise UserError(f"--network_args factor={self.factor}: at least 1, or -1 for a layer's own root.")


def split_width(width: int, factor: int) -> tuple[int, int]:
    """(smaller, larger) whose product is `width`: the smaller is `factor` where that divides it, else the largest divisor of at
    most that and the root; -1: of at most the root."""
    if factor > 0 and width % factor == 0:
        return min(factor, width // factor), max(factor, width // factor)
    most = min(math.isqrt(width), factor if factor > 0 else width)
    smaller = max(divisor for divisor in range(1, most + 1) if width % divisor == 0)
    return smaller, width // smaller


def shapes_of(weight: torch.Size, rank: int, args: LoKrArgs) -> dict[str, tuple[int, ...]]:
    """Parameters of a layer whose weight has this shape, by name."""
    factor = args.factor or -1
    (a, b), (c, d) = split_width(weight[0], factor), split_width(weight[1], factor)
    if args.unbalanced_factorization:
        a, b = b, a
    shapes: dict[str, tuple[int, ...]] = {}
    if args.decompose_both and not args.full_matrix and rank < max(a, c) / 2:
        shapes |= dict(zip(FIRST, ((a, rank), (rank, c)), strict=True))
    else:
        shapes[W1] = (a, c)
    if args.full_matrix or rank >= max(b, d) / 2:
        shapes[W2] = (b, d, *weight[2:])
    else:
        shapes |= dict(zip(SECOND, ((b, rank), (rank, d * math.prod(weight[2:]))), strict=True))
    return shapes


class LoKr(LowRankAdapter):
    """`lokr_w1` [a, c] or its factors `_a` [a, rank] and `_b` [rank, c]; `lokr_w2` [b, d, k, k] or its factors [b, rank] and
    [rank, d k k]."""

    arguments = LoKrArgs
    plus_parameters = frozenset({W2, SECOND[1]})

    def __init__(self, layer: Layer, size: LayerSize, args: NetworkArgs, generator: torch.Generator) -> None:
        super().__init__(layer, size, args, generator)
        own = args if isinstance(args, LoKrArgs) else LoKrArgs()
        self._make(shapes_of(layer.module.weight.shape, size.rank, own), generator)

    def _make(self, shapes: Mapping[str, tuple[int, ...]], generator: torch.Generator) -> None:
        self.names = tuple(shapes)
        for name in NAMES:
            parameter = None
            if name in shapes:
                parameter = nn.Parameter(torch.zeros(shapes[name]))
                if name not in (W2, SECOND[1]):
                    nn.init.kaiming_uniform_(parameter, a=math.sqrt(5), generator=generator)
            self.register_parameter(name, parameter)

    @property
    def strength(self) -> float:
        return 1.0 if {W1, W2} <= set(self.names) else self.scale

    def _first(self) -> Tensor:
        """w1 [a, c]."""
        whole: Tensor | None = getattr(self, W1)
        return getattr(self, FIRST[0]) @ getattr(self, FIRST[1]) if whole is None else whole

    def _second(self) -> Tensor:
        """w2 as a matrix [b, d k k]."""
        whole: Tensor | None = getattr(self, W2)
        return getattr(self, SECOND[0]) @ getattr(self, SECOND[1]) if whole is None else whole.flatten(1)

    def delta(self, x: Tensor, multiplier: float = 1.0) -> Tensor:
        first = (self._first() * (self.strength * multiplier)).to(x.dtype)
        groups = first.shape[1]
        if not isinstance(self.base, nn.Conv2d):
            hidden = self._through_second(x.unflatten(-1, (groups, -1)))  # [..., c, b]
            return (first @ hidden).flatten(-2)
        hidden = self._through_second(x.unflatten(1, (groups, -1)).flatten(0, 1))  # [B c, b, h, w]
        return torch.einsum("ac,ncbhw->nabhw", first, hidden.unflatten(0, (-1, groups))).flatten(1, 2)

    def _through_second(self, x: Tensor) -> Tensor:
        """w2 on the last dimension of `x`, or as a convolution."""
        whole: Tensor | None = getattr(self, W2)
        if whole is None:
            up, down = getattr(self, SECOND[0]), getattr(self, SECOND[1])
            if isinstance(self.base, nn.Conv2d):
                up, down = up[:, :, None, None], down.view(down.shape[0], -1, *self.base.kernel_size)
            return self._through(x, down, up, 1.0)
        if isinstance(self.base, nn.Conv2d):
            return self._drop(self._convolve(x, whole.to(x.dtype)), rank_dim=1)
        return self._drop(F.linear(x, whole.to(x.dtype)), rank_dim=-1)

    def delta_weight(self, multiplier: float = 1.0) -> Tensor:
        product = torch.kron(self._first().float(), self._second().float())
        return (product * (self.strength * multiplier)).view(self.base.weight.shape)

    def weight_norm(self) -> Tensor:
        """||w1 (x) w2|| = ||w1|| ||w2||."""
        return self._first().float().norm() * self._second().float().norm() * abs(self.strength)

    def rescale(self, ratio: Tensor) -> None:
        for name in self.names:
            getattr(self, name).mul_(ratio ** (1 / len(self.names)))

    @classmethod
    def size_in_file(cls, key: str, tensors: Mapping[str, Tensor]) -> LayerSize:
        required = [name for whole, pair in ((W1, FIRST), (W2, SECOND)) for name in ((whole,) if whole in tensors else pair)]
        check_names(key, tensors, required=required, known=(CORE, LENGTHS, "alpha"), algorithm="LoKr")
        rank = next((tensors[name].shape[0] for name in (SECOND[1], FIRST[1]) if name in tensors), 1)
        if {W1, W2} <= tensors.keys() or "alpha" not in tensors:
            return LayerSize(rank, float(rank))
        return LayerSize(rank, float(tensors["alpha"]))

    @classmethod
    def like_file(
        cls, layer: Layer, size: LayerSize, args: NetworkArgs, generator: torch.Generator, tensors: Mapping[str, Tensor]
    ) -> Adapter:
        adapter = super().like_file(layer, size, args, generator, tensors)
        assert isinstance(adapter, LoKr)
        kernel = layer.module.weight.shape[2:]
        found = {name: tuple(tensor.shape) for name, tensor in without_core(tensors, CORE, *SECOND).items() if name in NAMES}
        if W2 in found:
            found[W2] = (*found[W2][:2], *kernel)
        elif len(found[SECOND[1]]) > 2:
            found[SECOND[1]] = (found[SECOND[1]][0], math.prod(found[SECOND[1]][1:]))
        adapter._make(found, generator)
        return adapter

    def file_tensors(self) -> dict[str, Tensor]:
        tensors = super().file_tensors()
        return {**tensors, "alpha": torch.tensor(float(self.rank))} if {W1, W2} <= set(self.names) else tensors

    def load_file_tensors(self, tensors: Mapping[str, Tensor], source: str) -> None:
        size, given = self.size_in_file(self.key, tensors), without_core(tensors, CORE, *SECOND)
        if different := {name for name in given if name in NAMES} ^ set(self.names):
            raise UserError(
                f"{self.key} in {source} is factored in another way than here ({', '.join(sorted(different))}). "
                "Use --dim_from_weights, or its rank, factor, decompose_both and full_matrix."
            )
        if SECOND[1] in given:
            given[SECOND[1]] = given[SECOND[1]].flatten(1)
        self._take({**given, "alpha": torch.tensor(size.alpha or size.rank)}, source)


factory = bind(LoKr)
create_network = factory.create_network
create_network_from_weights = factory.create_network_from_weights
