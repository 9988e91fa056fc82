"""Our files in other programs, and other programs' networks in our interface: diffusers' loader, the LyCORIS package."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from network_models import fill, predict, tiny_text_encoder, tiny_unet
from torch import nn

from library.errors import UserError
from library.optimizers import LearningRates
from networks import lora
from networks.external import ForeignNetwork, NetworkModule, load_network_module, wrap
from networks.lora_sd import ARCH
from networks.network_base import NetworkFactory

pytestmark = pytest.mark.usefixtures("quiet_lycoris")

RATES = LearningRates(1e-3, None, (5e-4,))


# diffusers reads what we write


@pytest.mark.parametrize("network_args", [{}, {"conv_dim": 2, "conv_alpha": 1}], ids=["linear", "conv"])
def test_diffusers_loads_our_file_whole_and_computes_the_same(
    tmp_path: Path, network_args: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    unet, encoder = tiny_unet(), tiny_text_encoder()
    network = lora.create_network(1.0, 4, 2.0, None, encoder, unet, **network_args)
    fill(network)
    network.save_weights(tmp_path / "style.safetensors", None, {"ss_network_dim": "4"})
    untouched = copy.deepcopy((unet, encoder))
    network.attach()
    ours = predict(unet, encoder)

    pipeline = StableDiffusionPipeline(
        vae=None,
        text_encoder=untouched[1],
        tokenizer=None,
        unet=untouched[0],
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    base = predict(*untouched)
    with caplog.at_level(logging.WARNING):
        pipeline.load_lora_weights(tmp_path, weight_name="style.safetensors")
    assert "unexpected" not in caplog.text.lower() and "missing" not in caplog.text.lower()
    counts = [sum(hasattr(m, "lora_A") for m in module.modules()) for module in (pipeline.unet, pipeline.text_encoder)]
    assert counts == [sum(a.key.startswith(prefix) for a in network.adapters()) for prefix in ("lora_unet_", "lora_te_")]
    theirs = predict(pipeline.unet, pipeline.text_encoder)
    assert (ours - base).abs().max() > 1e-2
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=0)


# modules by name


def test_our_module_is_found_by_name() -> None:
    module = load_network_module("networks.lora")
    assert isinstance(module, NetworkFactory) and module.name == "networks.lora"
    assert module.for_arch(ARCH).algorithm is lora.LoRA


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "networks.lore",
            "there is no network module 'networks.lore'. Known: networks.lora, networks.lora_flux, networks.lora_",
        ),
        ("nosuchpackage.kohya", "the package 'nosuchpackage' is not installed. Install it with: pip install nosuchpackage"),
        ("json", "'json' is not a network module: it has no create_network"),
    ],
)
def test_a_module_that_is_not_there_says_what_to_do(name: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_network_module(name)
    assert message in str(caught.value)


def test_a_missing_lycoris_is_installed_under_its_other_name(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    def absent(name: str) -> ModuleType:
        raise ModuleNotFoundError(f"No module named '{name}'", name="lycoris")

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(UserError, match="pip install lycoris-lora"):
        load_network_module("lycoris.kohya")


# LyCORIS


@pytest.fixture(scope="module")
def lycoris() -> NetworkModule:
    pytest.importorskip("lycoris")
    return load_network_module("lycoris.kohya").for_arch(ARCH)


@pytest.fixture
def model() -> tuple[nn.Module, nn.Module]:
    return tiny_unet(), tiny_text_encoder()


def make(module: NetworkModule, model: tuple[nn.Module, nn.Module], **kwargs: Any) -> ForeignNetwork:
    network = module.create_network(1.0, 4, 2.0, None, {"text_encoder": model[1]}, model[0], **kwargs)
    assert isinstance(network, ForeignNetwork)
    return network


@pytest.mark.parametrize("algo", ["lora", "lokr", "loha"])
def test_lycoris_trains_both_parts_and_writes_sd_scripts_names(
    lycoris: NetworkModule, model: Any, tmp_path: Path, algo: str
) -> None:
    from safetensors import safe_open

    unet, encoder = model
    base = predict(unet, encoder)
    network = make(lycoris, model, algo=algo, neuron_dropout=None)
    assert network.parts == {"denoiser", "text_encoder"}
    assert torch.equal(predict(unet, encoder), base)  # not attached yet
    network.attach()
    network.prepare_for_training()
    torch.testing.assert_close(predict(unet, encoder), base)
    groups = network.param_groups(RATES)
    assert {group.name: group.learning_rate for group in groups} == {"unet": 1e-3, "textencoder": 5e-4}
    optimizer = torch.optim.AdamW([{"params": group.params, "lr": group.learning_rate} for group in groups])
    losses = []
    for _ in range(3):
        loss = (predict(unet, encoder) - 1).square().mean()
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[2] < losses[0]
    assert all(p.grad is None for module in model for p in module.parameters())

    path = tmp_path / "style.safetensors"
    network.save_weights(path, torch.float32, {"ss_network_module": "lycoris.kohya"})
    with safe_open(path, "pt") as file:
        layers = {key.partition(".")[0] for key in file.keys()}  # noqa: SIM118 (a file, not a dict)
        assert {"sshs_model_hash", "sshs_legacy_hash", "ss_network_module"} <= file.metadata().keys()
    text_layers = {layer for layer in layers if layer.startswith("lora_te")}
    assert text_layers == {
        f"lora_te_text_model_encoder_layers_{i}_{layer}"
        for i in range(2)
        for layer in ("self_attn_q_proj", "self_attn_k_proj", "self_attn_v_proj", "self_attn_out_proj", "mlp_fc1", "mlp_fc2")
    }
    assert "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q" in layers

    trained = predict(unet, encoder)
    with network.reference():
        assert torch.equal(predict(unet, encoder), base)
    network.detach()
    assert torch.equal(predict(unet, encoder), base)
    loaded, _ = lycoris.create_network_from_weights(1.0, path, None, {"text_encoder": encoder}, unet)
    loaded.attach()
    torch.testing.assert_close(predict(unet, encoder), trained, atol=1e-5, rtol=1e-5)
    loaded.detach()


def test_lycoris_state_is_restored_bit_for_bit_even_where_its_file_folds_values(lycoris: NetworkModule, model: Any) -> None:
    network, again = (make(lycoris, model, algo="lora", use_scalar="True", init_seed=seed) for seed in (0, 1))
    fill(network)
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    assert any(name.endswith("scalar") for name in state)
    again.load_state_dict(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())


def test_lycoris_starts_from_the_seed_and_leaves_the_global_generator_alone(lycoris: NetworkModule, model: Any) -> None:
    state = torch.random.get_rng_state()
    first, again, other = (make(lycoris, model, init_seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    assert any(not torch.equal(tensor, other[name]) for name, tensor in first.items())


def test_lycoris_can_be_kept_to_the_denoiser(lycoris: NetworkModule, model: Any) -> None:
    network = make(lycoris, model, parts={"denoiser"})
    assert network.parts == {"denoiser"}
    assert [group.name for group in network.param_groups(RATES)] == ["unet"]
    assert all(name.startswith("lora_unet_") for name in network.file_state_dict(None))


@pytest.mark.parametrize("multiplier", [1.0, 0.5])
def test_a_plain_lora_merges_through_lycoris_as_through_ours(
    lycoris: NetworkModule, model: Any, tmp_path: Path, multiplier: float
) -> None:
    unet, encoder = model
    ours = lora.create_network(1.0, 4, 2.0, None, encoder, unet)
    fill(ours)
    ours.save_weights(tmp_path / "style.safetensors", None)
    twin = copy.deepcopy(model)
    lora.factory.merge_weights(multiplier, tmp_path / "style.safetensors", encoder, unet)
    lycoris.merge_weights(multiplier, tmp_path / "style.safetensors", twin[1], twin[0])
    torch.testing.assert_close(predict(*twin), predict(unet, encoder), atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match="changes nothing in this model"):
        lycoris.merge_weights(1.0, None, twin[1], twin[0], {"lora_unet_input_blocks_1.lora_up.weight": torch.zeros(1, 1)})


def test_max_norm_reaches_lycoris(lycoris: NetworkModule, model: Any) -> None:
    network = make(lycoris, model, algo="lora")
    fill(network)
    logged = network.after_step(0.01)
    assert logged["max_norm/keys_scaled"] > 0
    assert float(logged["max_norm/max_key_norm"]) <= 0.0101


def test_a_network_made_elsewhere_through_the_interface_can_be_wrapped(lycoris: NetworkModule, model: Any) -> None:
    import lycoris.kohya as kohya

    unet, encoder = model
    network = wrap(
        kohya.create_network(1.0, 4, 1.0, None, None, unet, preset="unet-transformer-only"), kohya, text_encoder=None, unet=unet
    )
    assert network.parts == {"denoiser"}
