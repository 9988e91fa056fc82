"""Laws of every algorithm in every family: names and sizes from the family's table, files, merging, extraction, dropout.

A family's layers are three of its tiny denoiser (`tiny_denoisers`), each computed for inputs of its own; that what a table
names is where the denoiser computes is seen on whole denoisers, with a few algorithms.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from test_algorithms import ALGORITHMS, Algorithm, change
from tiny_denoisers import DENOISERS, TinyDenoiser, randn
from torch import Tensor, nn

from library.errors import UserError
from library.optimizers import LearningRates
from networks import lora
from networks.merging import RankRule, extracted
from networks.network_base import LayerNetwork

RATES = LearningRates(1e-3, None, ())
IN_WHOLE = ("lora", "oft", "oft-v2")
"""What is added to outputs, what turns them, and what gives the layer another input."""
BOFT_RANK = 64
SAMPLES = 3000
PAIRS = [(name, family) for family in DENOISERS for name in ALGORITHMS]


@pytest.fixture(scope="module")
def denoisers() -> dict[str, nn.Module]:
    """No test changes one for good."""
    return {name: denoiser.make() for name, denoiser in DENOISERS.items()}


class Case:
    """An algorithm on the three layers of a family's denoiser."""

    def __init__(self, name: str, family: str, model: nn.Module) -> None:
        self.algorithm: Algorithm = ALGORITHMS[name]
        self.rank = BOFT_RANK if name.startswith("boft") else self.algorithm.rank
        self.denoiser: TinyDenoiser = DENOISERS[family]
        self.model = model
        self.factory = self.algorithm.factory().for_arch(self.denoiser.arch)

    def network(self, **more: Any) -> LayerNetwork:
        targets = {"exclude_patterns": ".*", "include_patterns": self.denoiser.few}
        arguments = {**self.algorithm.arguments, **more, **targets}
        made = self.factory.create_network(1.0, self.rank, self.algorithm.alpha, None, None, self.model, **arguments)
        assert len(list(made.adapters())) == 3
        return made


def outputs(network: LayerNetwork, copies: int = 0) -> list[Tensor]:
    """Of the network's layers, each for four inputs of its own, or for so many copies of the first; adapted where the network
    is attached."""
    found = []
    for adapter in network.adapters():
        x = randn(4, adapter.base.weight.shape[1], key=adapter.key)
        found.append(adapter.base(x[:1].expand(copies, -1) if copies else x))
    return found


def assert_close(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def parts_of(adapter: Any) -> Iterator[int]:
    """Rows of each part that counts for itself: OFT's in parts, else the layer."""
    yield from adapter.rows if type(adapter).splits_fused else adapter.base.weight.shape[:1]


@pytest.mark.parametrize("name", ["lora", "dylora", "loha", "lokr", "glora", "ia3", "oft", "boft", "oft-v2"])
def test_loraplus_has_its_rate_for_every_algorithm_with_a_pair_of_matrices(name: str, denoisers: dict[str, nn.Module]) -> None:
    case = Case(name, "flux", denoisers["flux"])
    if not case.factory.algorithm.plus_parameters:
        with pytest.raises(UserError, match="no pair of matrices"):
            case.network(loraplus_lr_ratio=4)
        return
    groups = {group.name: group for group in case.network(loraplus_lr_ratio=4).param_groups(RATES)}
    assert {name: group.learning_rate for name, group in groups.items()} == pytest.approx({"unet": 1e-3, "unet plus": 4e-3})


@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_an_adapter_starts_as_its_layer_learns_alone_and_has_as_many_numbers_as_the_formula_says(
    name: str, family: str, denoisers: dict[str, nn.Module]
) -> None:
    case = Case(name, family, denoisers[family])
    network = case.network()
    base = outputs(network)
    counts = [
        sum(case.algorithm.count(rows, adapter.base.weight.shape[1], case.rank) for rows in parts_of(adapter))
        for adapter in network.adapters()
    ]
    assert [sum(parameter.numel() for parameter in adapter.parameters()) for adapter in network.adapters()] == counts
    assert sum(parameter.nbytes for parameter in network.parameters()) == 4 * sum(counts)
    network.attach()
    assert_close(outputs(network), base)
    groups = network.param_groups(RATES)
    change(network)
    adapted = outputs(network)
    torch.stack([out.square().mean() for out in adapted]).sum().backward()
    learns = {id(parameter) for group in groups for parameter in group.params}
    for path, parameter in network.named_parameters():
        frozen = path.partition(".")[2] in case.algorithm.frozen
        assert (id(parameter) in learns) != frozen, path
        assert (parameter.grad is not None and bool(parameter.grad.any())) != frozen, path
    assert all(parameter.grad is None for parameter in case.model.parameters())
    assert all((one - other).abs().max() > 1e-3 for one, other in zip(adapted, base, strict=True))
    network.set_multiplier(0.0)
    assert all(torch.equal(one, other) for one, other in zip(outputs(network), base, strict=True))
    network.detach()


@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_an_adapter_comes_back_from_its_file_from_a_merged_weight_and_from_what_is_extracted(
    name: str, family: str, denoisers: dict[str, nn.Module], tmp_path: Path
) -> None:
    case = Case(name, family, denoisers[family])
    network = case.network().eval()
    change(network)
    network.attach()
    adapted = outputs(network)
    network.detach()
    network.save_weights(tmp_path / "a.safetensors", None)
    made, tensors = case.factory.create_network_from_weights(
        1.0, tmp_path / "a.safetensors", None, None, case.model, for_inference=True
    )
    assert len({key.partition(".")[0] for key in tensors}) == 3
    made.attach()
    assert_close(outputs(made), adapted)
    made.detach()

    before = [adapter.base.weight.clone() for adapter in network.adapters()]
    weights = [adapter.base.weight for adapter in network.adapters()]
    case.factory.merge_weights(1.0, None, None, case.model, tensors)
    after = [weight.clone() for weight in weights]
    merged = outputs(network)
    with torch.no_grad():
        for weight, old in zip(weights, before, strict=True):
            weight.copy_(old)
    assert_close(merged, adapted)

    found = {}
    for adapter, old, new in zip(network.adapters(), before, after, strict=True):
        most = case.algorithm.added(case.rank) if case.algorithm.added else min(old.flatten(1).shape)
        taken = extracted(new - old, RankRule(min(most, *old.flatten(1).shape)), adapter.key, exact=True)
        found |= {f"{adapter.key}.{inner}": tensor for inner, tensor in taken.tensors().items()}
    again, _ = lora.factory.for_arch(case.denoiser.arch).create_network_from_weights(1.0, None, None, None, case.model, found)
    again.attach()
    for one, other in zip(outputs(again), adapted, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)
    again.detach()


@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_rank_dropout_keeps_the_mean_or_is_refused(name: str, family: str, denoisers: dict[str, nn.Module]) -> None:
    case = Case(name, family, denoisers[family])
    if not case.algorithm.has_ranks:
        with pytest.raises(UserError, match="rank_dropout"):
            case.network(rank_dropout=0.25)
        return
    network = case.network(rank_dropout=0.25, **case.algorithm.steady)
    change(network)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = outputs(network, 1)
        network.attach()
        dropped = outputs(network, SAMPLES)
        network.eval()
        expected = outputs(network, 1)
        network.detach()
    for one, other, plain in zip(dropped, expected, base, strict=True):
        assert (one - one[:1]).abs().max() > 1e-3
        torch.testing.assert_close(one.mean(0, keepdim=True), other, rtol=0, atol=0.05 * float((other - plain).abs().max()))


@pytest.mark.parametrize("family", DENOISERS)
@pytest.mark.parametrize("name", IN_WHOLE)
def test_what_a_table_names_is_where_the_denoiser_computes(name: str, family: str, denoisers: dict[str, nn.Module]) -> None:
    case = Case(name, family, denoisers[family])
    keys = [layer for layer, _ in case.model.named_modules()]
    base = case.denoiser.output(case.model)
    network = case.network().eval()
    network.attach()
    assert_close([case.denoiser.output(case.model)], [base])
    assert [layer for layer, _ in case.model.named_modules()] == keys
    network.param_groups(RATES)
    change(network)
    adapted = case.denoiser.output(case.model)
    assert (adapted - base).abs().max() > 1e-3
    adapted.square().mean().backward()
    frozen = set(case.algorithm.frozen)
    learned = {path for path, parameter in network.named_parameters() if parameter.grad is not None and parameter.grad.any()}
    assert learned == {path for path, _ in network.named_parameters() if path.partition(".")[2] not in frozen}
    assert all(parameter.grad is None for parameter in case.model.parameters())
    network.detach()
    merged = copy.deepcopy(case.model)
    case.factory.merge_weights(1.0, None, None, merged, network.file_state_dict(None))
    assert_close([case.denoiser.output(merged)], [adapted])
