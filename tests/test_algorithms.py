"""Laws that every algorithm keeps: on every kind of layer, and on a tiny model of every family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from network_models import fill
from offload_tools import Made, Model, blocks_of, same, sgd, swapped, train
from test_quantization import layer_pair
from torch import Tensor, nn
from torch.func import functional_call

from networks.external import load_network_module
from networks.lora import LoRA
from networks.network_args import parse_network_args
from networks.network_base import Adapter, Layer, LayerSize, NetworkFactory
from networks.oft import OutputTurner
from networks.rotations import limited_skew


@dataclass(frozen=True)
class Algorithm:
    """A network module with arguments."""

    module: str
    arguments: dict[str, Any] = field(default_factory=dict)
    rank: int = 2
    alpha: float = 1.0
    frozen: tuple[str, ...] = ()
    """Parameters that never learn."""
    count: Callable[[int, int, int], int] = lambda rows, columns, rank: rank * (rows + columns)
    """Parameters of a Linear with these many rows and columns, at this rank: docs/adapters.md."""
    added: Callable[[int], int] | None = None
    """Rank of what it adds to a weight; None: as many as the weight has."""
    has_ranks: bool = False
    """Whether `rank_dropout` has a meaning."""
    steady: dict[str, Any] = field(default_factory=dict)
    """Arguments with which it draws nothing in training but dropout."""

    def factory(self) -> NetworkFactory:
        module = load_network_module(self.module)
        assert isinstance(module, NetworkFactory)
        return module

    def adapter(self, layer: nn.Module, *, rows: tuple[int, ...] = (), **more: Any) -> Adapter:
        factory = self.factory()
        args = parse_network_args(factory.algorithm.arguments, {**self.arguments, **more}, module=self.module)
        place = Layer("lora_unet_x", "denoiser", layer, rows)  # type: ignore[arg-type]
        return factory.algorithm(place, LayerSize(self.rank, self.alpha), args, torch.Generator().manual_seed(1))


def pair(width: int, factor: int) -> tuple[int, int]:
    """LoKr's two sides of a width that `factor` divides."""
    return min(factor, width // factor), max(factor, width // factor)


def nearest_to_root(width: int) -> int:
    return max(side for side in range(1, width + 1) if width % side == 0 and side * side <= width)


def lokr_count(o: int, i: int, r: int, *, factor: int, both: bool = False) -> int:
    (a, b), (c, d) = pair(o, factor), pair(i, factor)
    return (r * (a + c) if both else a * c) + r * (b + d)


def whole_lokr_count(o: int, i: int, r: int) -> int:
    (a, b), (c, d) = pair(o, nearest_to_root(o)), pair(i, nearest_to_root(i))
    return a * c + b * d


def boft_count(o: int, i: int, r: int) -> int:
    """Stages, one more than the power of two that the blocks are, of o outputs in blocks of b."""
    b = max(size for size in range(2, r + 1, 2) if o % size == 0 and (o // size).bit_count() == 1)
    return (o // b).bit_length() * o * b


def oft_v2_count(o: int, i: int, r: int) -> int:
    b = max(size for size in range(1, r + 1) if i % size == 0)
    return i * (b - 1) // 2


def plain_rank(r: int) -> int:
    return r


DOWN = ("lora_down.weight",)
PLAIN: dict[str, Any] = {"added": plain_rank, "has_ranks": True}
ALGORITHMS = {
    "lora": Algorithm("networks.lora", **PLAIN),
    "orthogonal": Algorithm("networks.lora", {"init": "orthogonal"}, **PLAIN),
    "pissa": Algorithm("networks.lora", {"init": "pissa"}, added=lambda r: 2 * r),
    "rslora": Algorithm("networks.lora", {"rs_lora": "true"}, **PLAIN),
    "dora": Algorithm("networks.lora", {"dora_wd": "true"}, count=lambda o, i, r: r * (o + i) + o, has_ranks=True),
    "dora-columns": Algorithm(
        "networks.lora", {"dora_wd": "true", "wd_on_output": "false"}, count=lambda o, i, r: r * (o + i) + i, has_ranks=True
    ),
    "loha": Algorithm("networks.loha", count=lambda o, i, r: 2 * r * (o + i), added=lambda r: r * r, has_ranks=True),
    "loha-dense": Algorithm("networks.loha", rank=4, count=lambda o, i, r: 2 * r * (o + i), has_ranks=True),
    "loha-dora": Algorithm("networks.loha", {"dora_wd": "true"}, count=lambda o, i, r: 2 * r * (o + i) + o, has_ranks=True),
    "lokr": Algorithm("networks.lokr", {"factor": "2"}, count=partial(lokr_count, factor=2), has_ranks=True),
    "lokr-both": Algorithm(
        "networks.lokr",
        {"factor": "4", "decompose_both": "true"},
        rank=1,
        count=partial(lokr_count, factor=4, both=True),
        has_ranks=True,
    ),
    "lokr-full": Algorithm("networks.lokr", {"full_matrix": "true"}, count=whole_lokr_count, has_ranks=True),
    "lokr-dora": Algorithm(
        "networks.lokr",
        {"factor": "2", "dora_wd": "true"},
        count=lambda o, i, r: lokr_count(o, i, r, factor=2) + o,
        has_ranks=True,
    ),
    "ia3": Algorithm("networks.ia3", count=lambda o, i, r: o),
    "ia3-input": Algorithm("networks.ia3", {"train_on_input": "true"}, count=lambda o, i, r: i),
    "dylora": Algorithm("networks.dylora", {"unit": "2"}, rank=4, **PLAIN, steady={"unit": "4"}),
    "oft": Algorithm("networks.oft", alpha=0.01, count=lambda o, i, r: r * (o // r) ** 2),
    "oft-free": Algorithm("networks.oft", rank=4, alpha=0.0, count=lambda o, i, r: r * (o // r) ** 2),
    "oft-list": Algorithm("networks.oft_flux", alpha=0.0, count=lambda o, i, r: r * (o // r) ** 2),
    "boft": Algorithm("networks.boft", alpha=0.0, count=boft_count),
    "boft-limited": Algorithm("networks.boft", alpha=0.01, rank=5, count=boft_count),
    "oft-v2": Algorithm("networks.oft_v2", rank=4, count=oft_v2_count),
    "glora": Algorithm("networks.glora", count=lambda o, i, r: r * (3 * i + o)),
    "lora-fa": Algorithm("networks.lora_fa", frozen=DOWN, **PLAIN),
    "lora-fa-argument": Algorithm("networks.lora", {"freeze_down": "true"}, frozen=DOWN, **PLAIN),
}


def layers() -> dict[str, nn.Module]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made: dict[str, nn.Module] = {
            "linear": nn.Linear(12, 8),
            "no-bias": nn.Linear(12, 8, bias=False),
            "1x1": nn.Conv2d(12, 8, 1),
            "3x3": nn.Conv2d(12, 8, 3, stride=2, padding=1),
        }
    return {name: layer.requires_grad_(False) for name, layer in made.items()}


def sample(layer: nn.Module) -> Tensor:
    x = torch.randn(2, 12, 6, 6, generator=torch.Generator().manual_seed(0))
    return x if isinstance(layer, nn.Conv2d) else x.flatten(2).transpose(1, 2)


def change(adapter: nn.Module) -> None:
    """Move every parameter away from where it starts."""
    start = {name: parameter.detach().clone() for name, parameter in adapter.named_parameters()}
    fill(adapter)
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            parameter += start[name]


@pytest.mark.parametrize("kind", layers())
@pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=ALGORITHMS)
def test_an_adapter_starts_as_its_layer_and_merges_as_it_computes(algorithm: Algorithm, kind: str) -> None:
    layer = layers()[kind]
    x = sample(layer)
    base = layer(x)
    adapter = algorithm.adapter(layer).eval()
    adapter.attach()
    torch.testing.assert_close(layer(x), base, atol=1e-6, rtol=0)
    change(adapter)
    adapted = layer(x)
    assert (adapted - base).abs().max() > 5e-3
    adapter.multiplier = 0.0
    assert torch.equal(layer(x), base)
    for multiplier in (1.0, 0.4):
        adapter.multiplier = multiplier
        weight, expected = adapter.merged(adapter.base.weight), layer(x)
        adapter.detach()
        merged = functional_call(layer, {"weight": weight}, (x,))
        torch.testing.assert_close(merged, expected, atol=1e-5, rtol=1e-5)
        adapter.attach()


@pytest.mark.parametrize("kind", layers())
@pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=ALGORITHMS)
def test_a_file_gives_back_the_adapter_in_a_new_one_and_in_one_made_for_it(algorithm: Algorithm, kind: str) -> None:
    layer = layers()[kind]
    x = sample(layer)
    adapter, again = algorithm.adapter(layer), algorithm.adapter(layer)
    change(adapter)
    tensors = {name: tensor.detach().clone() for name, tensor in adapter.file_tensors().items()}
    again.load_file_tensors(tensors, "a file")
    kind_of = type(adapter)
    made = kind_of.like_file(
        Layer("lora_unet_x", "denoiser", layer),  # type: ignore[arg-type]
        kind_of.size_in_file("lora_unet_x", tensors),
        kind_of.arguments(),
        torch.Generator(),
        tensors,
    )
    made.load_file_tensors(tensors, "a file")
    outputs = []
    for one in (adapter, again, made):
        one.eval().attach()
        outputs.append(layer(x))
        one.detach()
    assert torch.equal(outputs[0], outputs[1])
    torch.testing.assert_close(outputs[2], outputs[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=ALGORITHMS)
def test_gradients_reach_all_that_learns_and_the_parameters_are_as_many_as_the_formula_says(algorithm: Algorithm) -> None:
    layer = layers()["linear"]
    adapter = algorithm.adapter(layer)
    change(adapter)
    assert adapter.frozen_parameters == set(algorithm.frozen)
    assert sum(parameter.numel() for parameter in adapter.parameters()) == algorithm.count(8, 12, algorithm.rank)
    for name, parameter in adapter.named_parameters():
        parameter.requires_grad_(name not in adapter.frozen_parameters)
    adapter.attach()
    layer(sample(layer)).square().mean().backward()
    learned = {name for name, parameter in adapter.named_parameters() if parameter.grad is not None and parameter.grad.any()}
    assert learned == {name for name, _ in adapter.named_parameters()} - set(algorithm.frozen)
    assert all(parameter.grad is None for parameter in layer.parameters())


@pytest.mark.parametrize("scheme", ["fp8", "int8", "nf4"])
@pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=ALGORITHMS)
def test_a_layer_in_few_bits_is_adapted_as_one_with_its_weight(algorithm: Algorithm, scheme: str) -> None:
    quantised, plain = layer_pair(layers()["linear"], scheme)
    x, found = sample(plain), []
    for layer in (quantised, plain):
        adapter = algorithm.adapter(layer).eval()
        change(adapter)
        adapter.attach()
        out = layer(x)
        out.square().mean().backward()
        found.append((out, {name: parameter.grad for name, parameter in adapter.named_parameters()}))
        adapter.detach()
        adapter.merge_into_base()
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    assert isinstance(plain, nn.Linear)
    merged = plain.weight  # of the quantised weight; that of the other is quantised anew
    assert (quantised.weight - merged).norm() < (0.15 if scheme == "nf4" else 0.06) * merged.norm()


@pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=ALGORITHMS)
def test_an_adapter_on_blocks_that_are_swapped_learns_as_on_blocks_that_stay(algorithm: Algorithm) -> None:
    def made() -> Made:
        model, adapters = Model(4, checkpointing="plain").requires_grad_(False), nn.ModuleList()
        for block in blocks_of(model):
            for name in ("up", "down"):
                adapter = algorithm.adapter(block.get_submodule(name))
                change(adapter)
                for path, parameter in adapter.named_parameters():
                    parameter.requires_grad_(path not in adapter.frozen_parameters)
                adapter.attach()
                adapters.append(adapter)
        return model, adapters

    traces = []
    for swaps in (False, True):
        pair = made()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            traces.append(train(pair, swapped(pair, 2, learning=False) if swaps else None, sgd, steps=2))
    assert same(*traces)


@pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=ALGORITHMS)
def test_a_forward_pass_is_one_graph(algorithm: Algorithm) -> None:
    layer = layers()["linear"]
    adapter = algorithm.adapter(layer).train()
    change(adapter)
    adapter.attach()
    x = sample(layer)
    torch._dynamo.reset()
    outputs = []
    for run in (torch.compile(layer, backend="eager", fullgraph=True), layer):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            outputs.append(run(x))
    torch.testing.assert_close(*outputs)


def test_dylora_computes_with_the_first_ranks_alone_and_the_last_unit_of_them_learns() -> None:
    layer = nn.Linear(6, 6, bias=False).requires_grad_(False)
    adapter = Algorithm("networks.dylora", {"unit": "2"}, rank=6, alpha=6.0).adapter(layer)
    assert isinstance(adapter, LoRA)
    with torch.no_grad():
        adapter.lora_up.weight.copy_(torch.eye(6))  # the output shows the ranks
    drawn = set()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for _ in range(30):
            adapter.zero_grad()
            out = adapter.delta(torch.ones(1, 6))
            out.square().sum().backward()
            assert adapter.lora_down.weight.grad is not None and adapter.lora_up.weight.grad is not None
            used = int((out[0] != 0).sum())
            drawn.add(used)
            torch.testing.assert_close(out[0, :used], adapter.eval().delta(torch.ones(1, 6))[0, :used] * (6 / used) ** 0.5)
            adapter.train()
            learns = torch.arange(6).ge(used - 2) & torch.arange(6).lt(used)
            assert torch.equal(adapter.lora_down.weight.grad.any(1), learns)
            assert torch.equal(adapter.lora_up.weight.grad.any(0), learns)
    assert drawn == {2, 4, 6}


def test_turning_keeps_lengths_and_its_limit() -> None:
    layer = nn.Linear(8, 8, bias=False)
    for name, alpha in (("networks.oft", 0.0), ("networks.boft", 0.0), ("networks.oft", 0.02)):
        adapter = Algorithm(name, alpha=alpha).adapter(layer)
        fill(adapter, scale=1.0)
        turned = adapter.merged(layer.weight)
        torch.testing.assert_close(turned.T @ turned, layer.weight.T @ layer.weight)  # of columns, and angles between them
        assert isinstance(adapter, OutputTurner)
        skew = limited_skew(next(adapter.parameters()), adapter._alpha * 8)
        assert (skew.norm() <= 0.02 * 8 + 1e-6) == (alpha > 0)
