"""peft's tuners as our adapters, and OFTv2 as peft computes it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_algorithms import ALGORITHMS, change, layers, sample
from torch import nn
from torch.func import functional_call

from library.errors import UserError
from networks import peft_adapter
from networks.network_args import parse_network_args
from networks.network_base import Layer, LayerSize
from networks.peft_adapter import PeftAdapter, PeftArgs

TUNERS: dict[str, dict[str, Any]] = {
    "lora": {},
    "hra": {},
    "delora": {},
    "randlora": {},
    "boft": {"boft_block_size": 4},
}
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:peft"),
]


def make(layer: nn.Module, tuner: str, seed: int = 0, **more: Any) -> PeftAdapter:
    args = parse_network_args(
        PeftArgs, {"tuner": tuner, "config": TUNERS.get(tuner, {}), **more}, module="networks.peft_adapter"
    )
    place = Layer("lora_unet_x", "denoiser", layer)  # type: ignore[arg-type]
    return PeftAdapter(place, LayerSize(2, 1.0), args, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("tuner", TUNERS)
def test_a_tuner_keeps_the_laws_of_an_adapter(tuner: str) -> None:
    layer = layers()["linear"]
    x, keys, state = sample(layer), list(layer.state_dict()), torch.random.get_rng_state()
    base = layer(x)
    adapter, again = make(layer, tuner), make(layer, tuner, seed=5)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert list(layer.state_dict()) == keys and not any("base_layer" in name for name in adapter.state_dict())
    adapter.attach()
    torch.testing.assert_close(layer(x), base, atol=1e-5, rtol=0)
    change(adapter)
    adapted = layer(x)
    assert (adapted - base).abs().max() > 1e-3
    adapted.square().mean().backward()
    learned = [parameter.grad is not None and bool(parameter.grad.any()) for parameter in adapter.parameters()]
    assert any(learned) and all(parameter.grad is None for parameter in layer.parameters())
    for multiplier in (1.0, 0.5, 0.0):
        adapter.multiplier = multiplier
        expected, weight = layer(x), adapter.merged(adapter.base.weight)
        adapter.detach()
        torch.testing.assert_close(functional_call(layer, {"weight": weight}, (x,)), expected, atol=1e-5, rtol=1e-4)
        adapter.attach()
    adapter.multiplier = 1.0
    adapter.detach()
    tensors = {name: tensor.detach().clone() for name, tensor in adapter.file_tensors().items()}
    assert PeftAdapter.size_in_file("lora_unet_x", tensors) == LayerSize(2, 1.0)
    again.load_file_tensors(tensors, "a file")
    again.attach()
    torch.testing.assert_close(layer(x), adapted)
    with pytest.raises(UserError, match="another tuner or config"):
        make(layer, "lora" if tuner == "hra" else "hra").load_file_tensors(tensors, "a file")


def test_a_tuner_that_scales_the_bias_cannot_be_merged() -> None:
    layer = layers()["linear"]
    adapter = make(layer, "ia3", config={"feedforward_modules": []})
    change(adapter)
    with pytest.raises(UserError, match="changes the bias as well"):
        adapter.merged(adapter.base.weight)


def test_what_peft_is_told_is_checked() -> None:
    layer = layers()["linear"]
    with pytest.raises(UserError, match="tuner=lorra: one of peft's tuners is needed.*Did you mean 'lora'"):
        make(layer, "lorra")
    with pytest.raises(UserError, match="hra has no 'ranks'"):
        make(layer, "hra", config='{"ranks": 3}')
    with pytest.raises(UserError, match="config=.*expected a JSON object"):
        make(layer, "hra", config="r=3")
    with pytest.raises(UserError, match="peft's vera cannot adapt lora_unet_x: .*shared"):
        make(layer, "vera")
    with pytest.raises(UserError, match="--network_args tuner=None: one of peft's tuners"):
        peft_adapter.factory.parse({})


def test_oft_v2_computes_what_peft_does_with_its_file() -> None:
    layer, other = layers()["linear"], layers()["linear"]
    ours, theirs = ALGORITHMS["oft-v2"].adapter(layer), make(other, "oft", config={"r": 0, "oft_block_size": 4})
    change(ours)
    theirs.load_file_tensors({**ours.file_tensors(), "rank": torch.tensor(2.0), "alpha": torch.tensor(1.0)}, "a file")
    ours.attach()
    theirs.attach()
    torch.testing.assert_close(other(sample(other)), layer(sample(layer)), atol=1e-5, rtol=1e-4)
