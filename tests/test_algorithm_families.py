"""Every algorithm on a few layers of a tiny denoiser of every family: its laws through names, files and merging."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from test_algorithms import ALGORITHMS, change
from tiny_denoisers import DENOISERS
from torch import nn

from library.errors import UserError
from library.optimizers import LearningRates

RATES = LearningRates(1e-3, None, ())
CHOSEN = ("lora", "pissa", "dora", "loha", "lokr", "ia3", "dylora", "oft", "boft", "oft-v2", "glora", "lora-fa")
"""One of each algorithm."""
BOFT_RANK = 64


@pytest.fixture(scope="module")
def denoisers() -> dict[str, nn.Module]:
    """No test changes one for good."""
    return {name: denoiser.make() for name, denoiser in DENOISERS.items()}


@pytest.mark.parametrize("name", ["lora", "dylora", "loha", "lokr", "glora", "ia3", "oft", "boft", "oft-v2"])
def test_loraplus_has_its_rate_for_every_algorithm_with_a_pair_of_matrices(name: str, denoisers: dict[str, nn.Module]) -> None:
    algorithm, rank = ALGORITHMS[name], BOFT_RANK if name == "boft" else ALGORITHMS[name].rank
    factory, model = algorithm.factory().for_arch(DENOISERS["flux"].arch), denoisers["flux"]

    def make() -> Any:
        return factory.create_network(1.0, rank, 1.0, None, None, model, **algorithm.arguments, loraplus_lr_ratio=4)

    if not factory.algorithm.plus_parameters:
        with pytest.raises(UserError, match="no pair of matrices"):
            make()
        return
    groups = {group.name: group for group in make().param_groups(RATES)}
    assert {name: group.learning_rate for name, group in groups.items()} == pytest.approx({"unet": 1e-3, "unet plus": 4e-3})


@pytest.mark.parametrize("family", DENOISERS)
@pytest.mark.parametrize("name", CHOSEN)
def test_an_algorithm_keeps_its_laws_in_a_family(
    name: str, family: str, denoisers: dict[str, nn.Module], tmp_path: Path
) -> None:
    algorithm, denoiser, model = ALGORITHMS[name], DENOISERS[family], denoisers[family]
    factory = algorithm.factory().for_arch(denoiser.arch)
    rank = BOFT_RANK if name == "boft" else algorithm.rank
    targets = {"exclude_patterns": ".*", "include_patterns": denoiser.few}
    network: Any = factory.create_network(1.0, rank, algorithm.alpha, None, None, model, **algorithm.arguments, **targets)
    assert len(list(network.adapters())) == 3
    keys = [layer for layer, _ in model.named_modules()]
    base = denoiser.output(model)
    network.attach()
    network.eval()
    torch.testing.assert_close(denoiser.output(model), base, atol=1e-5, rtol=0)
    assert [layer for layer, _ in model.named_modules()] == keys

    groups = network.param_groups(RATES)
    change(network)
    adapted = denoiser.output(model)
    assert (adapted - base).abs().max() > 1e-3
    adapted.square().mean().backward()
    learns = {id(parameter) for group in groups for parameter in group.params}
    for path, parameter in network.named_parameters():
        frozen = path.partition(".")[2] in algorithm.frozen
        assert (id(parameter) in learns) != frozen, path
        assert (parameter.grad is not None and bool(parameter.grad.any())) != frozen, path
    assert all(parameter.grad is None for parameter in model.parameters())

    network.set_multiplier(0.0)
    assert torch.equal(denoiser.output(model), base)
    network.set_multiplier(1.0)
    network.detach()
    network.save_weights(tmp_path / "a.safetensors", None)
    loaded, tensors = factory.create_network_from_weights(
        1.0, tmp_path / "a.safetensors", None, None, model, for_inference=True
    )
    assert len({key.partition(".")[0] for key in tensors}) == 3
    loaded.attach()
    torch.testing.assert_close(denoiser.output(model), adapted, atol=1e-5, rtol=1e-5)
    loaded.detach()
    merged = copy.deepcopy(model)
    factory.merge_weights(1.0, None, None, merged, tensors)
    torch.testing.assert_close(denoiser.output(merged), adapted, atol=1e-5, rtol=1e-5)
