"""Our adapters: what they compute and what they train."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from network_models import CONV, fill, make, predict, tiny_text_encoder, tiny_unet
from torch import nn

from library.errors import UserError
from library.optimizers import LearningRates
from networks import lora
from networks.lora_sd import ARCH


def test_an_untrained_network_changes_nothing_and_detaching_leaves_no_trace(shared_model: Any) -> None:
    unet, encoder = shared_model
    keys, expected = list(unet.state_dict()), predict(unet, encoder)
    network = make(shared_model, **CONV)
    network.attach()
    assert torch.equal(predict(unet, encoder), expected)
    assert list(unet.state_dict()) == keys
    network.detach()
    assert not any("forward" in module.__dict__ for module in itertools.chain(unet.modules(), encoder.modules()))


def test_making_a_network_leaves_the_global_generator_alone_and_depends_on_seed_and_name_only(shared_model: Any) -> None:
    state = torch.random.get_rng_state()
    first, again = make(shared_model, init_seed=7), make(shared_model, init_seed=7, **CONV)
    other = make(shared_model, init_seed=8)
    assert torch.equal(torch.random.get_rng_state(), state)
    key = "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight"
    assert torch.equal(first.state_dict()[key], again.state_dict()[key])
    assert not torch.equal(first.state_dict()[key], other.state_dict()[key])


@pytest.mark.parametrize("linear_projection", [False, True])
def test_merged_weights_give_what_the_adapters_give(linear_projection: bool) -> None:
    unet, encoder = tiny_unet(linear_projection=linear_projection), tiny_text_encoder()
    base = predict(unet, encoder)
    network = make((unet, encoder), **CONV)
    fill(network)
    network.set_multiplier(0.7)
    network.attach()
    adapted = predict(unet, encoder)
    assert (adapted - base).abs().max() > 1e-2
    network.merge_into_base()
    torch.testing.assert_close(predict(unet, encoder), adapted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(6, 5),
        nn.Conv2d(6, 5, 1),
        nn.Conv2d(6, 5, 3, stride=2, padding=1),
        nn.Conv2d(6, 5, 3, padding=0),
        nn.Conv2d(6, 5, (3, 1), padding="same", dilation=2),
    ],
    ids=["linear", "1x1", "3x3-stride", "3x3-no-padding", "3x1-dilated"],
)
def test_delta_of_every_layer_kind_equals_its_weight(layer: nn.Module) -> None:
    adapter = lora.LoRA(lora.Layer("x", "denoiser", layer), lora.LayerSize(2, 1.0), lora.NetworkArgs(), torch.Generator())
    fill(adapter, scale=1.0)
    x = torch.randn(2, 6, 8, 8, generator=torch.Generator().manual_seed(0))
    x = x.flatten(2).transpose(1, 2) if isinstance(layer, nn.Linear) else x
    before = layer(x)
    adapter.attach()
    adapted = layer(x)
    torch.testing.assert_close(adapted - before, adapter.delta(x))
    adapter.detach()
    adapter.merge_into_base()
    torch.testing.assert_close(layer(x), adapted, atol=1e-5, rtol=1e-5)


def test_reference_is_exactly_the_frozen_model_and_gives_the_multiplier_back(shared_model: Any) -> None:
    expected = predict(*shared_model)
    network = make(shared_model)
    fill(network)
    network.set_multiplier(0.5)
    network.attach()
    with network.reference():
        assert torch.equal(predict(*shared_model), expected)
    assert network.multiplier == 0.5
    assert not torch.equal(predict(*shared_model), expected)
    network.detach()


@pytest.mark.parametrize(("given", "scale"), [(None, 1 / 4), (0, 1.0), (2, 0.5), (4, 1.0)])
def test_alpha_over_rank_scales_and_zero_means_the_rank(shared_model: Any, given: float | None, scale: float) -> None:
    network = make(shared_model, alpha=given)
    assert {adapter.scale for adapter in network.adapters()} == {scale}  # type: ignore[attr-defined]


def test_adapters_are_float32_beside_a_half_precision_model_and_keep_its_dtype() -> None:
    layer = nn.Linear(8, 8, dtype=torch.bfloat16)
    adapter = lora.LoRA(lora.Layer("x", "denoiser", layer), lora.LayerSize(2, 1.0), lora.NetworkArgs(), torch.Generator())
    fill(adapter)
    adapter.attach()
    x = torch.ones(1, 8, dtype=torch.bfloat16)
    out = layer(x)
    out.sum().backward()
    assert out.dtype == torch.bfloat16
    assert adapter.lora_down.weight.dtype == torch.float32 and adapter.lora_down.weight.grad.dtype == torch.float32
    adapter.detach()
    adapter.merge_into_base()
    assert layer.weight.dtype == torch.bfloat16


def test_networks_stack_and_come_off_in_reverse_order(shared_model: Any) -> None:
    expected = predict(*shared_model)
    first, second = make(shared_model), make(shared_model)
    fill(first, 1)
    fill(second, 2)
    first.attach()
    one = predict(*shared_model)
    second.attach()
    assert not torch.allclose(predict(*shared_model), one)
    with pytest.raises(AssertionError):
        first.detach()
    second.detach()
    assert torch.equal(predict(*shared_model), one)
    first.detach()
    assert torch.equal(predict(*shared_model), expected)


# names and targets


def test_keys_are_those_of_sd_scripts(shared_model: Any) -> None:
    keys = {name.partition(".")[0] for name in make(shared_model).file_state_dict(None)}
    block = "lora_unet_down_blocks_0_attentions_0"
    attention = [
        f"{block}_transformer_blocks_0_{a}_{p}" for a in ("attn1", "attn2") for p in ("to_q", "to_k", "to_v", "to_out_0")
    ]
    feed_forward = [f"{block}_transformer_blocks_0_ff_net_0_proj", f"{block}_transformer_blocks_0_ff_net_2"]
    expected = {f"{block}_proj_in", f"{block}_proj_out", *attention, *feed_forward}
    assert {key for key in keys if key.startswith(f"{block}_")} == expected
    assert {key for key in keys if key.startswith("lora_te_")} == {
        f"lora_te_text_model_encoder_layers_{i}_{layer}"
        for i in range(2)
        for layer in ("self_attn_q_proj", "self_attn_k_proj", "self_attn_v_proj", "self_attn_out_proj", "mlp_fc1", "mlp_fc2")
    }
    # 192 UNet and 72 text encoder layers in SD1; here 6 transformers of 12 layers and 2 CLIP layers of 6
    assert len(keys) == 6 * 12 + 12


def test_conv_dim_adds_resnets_and_samplers_with_1x1_and_linear_layers_at_the_network_rank(shared_model: Any) -> None:
    plain, both = make(shared_model).file_state_dict(None), make(shared_model, **CONV).file_state_dict(None)
    added = {name: tensor for name, tensor in both.items() if name not in plain}
    layers = {name.partition(".")[0] for name in added}
    assert "lora_unet_down_blocks_0_downsamplers_0_conv" in layers and "lora_unet_up_blocks_0_upsamplers_0_conv" in layers
    assert not any("conv_in" in layer or "time_embedding" in layer for layer in layers)
    resnet = "lora_unet_up_blocks_1_resnets_0"
    assert added[f"{resnet}_conv1.lora_down.weight"].shape == (3, 24, 3, 3)
    assert added[f"{resnet}_conv1.lora_up.weight"].shape == (8, 3, 1, 1)
    assert added[f"{resnet}_conv_shortcut.lora_down.weight"].shape[0] == 4
    assert added[f"{resnet}_time_emb_proj.lora_down.weight"].shape[0] == 4
    assert added[f"{resnet}_conv1.alpha"] == 1 and added[f"{resnet}_time_emb_proj.alpha"] == 2


def test_block_ranks_and_zero_rates_decide_layer_by_layer(shared_model: Any) -> None:
    dims = [4] * 12 + [6] + [0] * 12
    network = make(shared_model, block_dims=",".join(map(str, dims)), block_alphas=[1.0] * 25, down_lr_weight="zeros")
    tensors = network.file_state_dict(None)
    unet_keys = {name for name in tensors if name.startswith("lora_unet")}
    assert unet_keys and all(name.startswith("lora_unet_mid_block") for name in unet_keys)
    assert tensors["lora_unet_mid_block_attentions_0_proj_in.lora_down.weight"].shape[0] == 6
    assert tensors["lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"].shape[0] == 4


def test_a_block_list_of_the_wrong_length_says_how_many(shared_model: Any) -> None:
    with pytest.raises(UserError, match="block_dims has 3 values, this model has 25 blocks"):
        make(shared_model, block_dims="1,2,3")


def test_a_part_can_be_left_out_by_not_passing_it_or_by_name(shared_model: Any) -> None:
    unet, encoder = shared_model
    assert lora.create_network(1.0, 4, 1.0, None, None, unet).parts == {"denoiser"}
    assert lora.create_network(1.0, 4, 1.0, None, [encoder], unet, parts={"text_encoder"}).parts == {"text_encoder"}
    assert lora.create_network(1.0, 4, 1.0, None, {"text_encoder": encoder}, None).parts == {"text_encoder"}
    network = make(shared_model)
    network.apply_to(encoder, unet, apply_text_encoder=False)
    assert network.parts == {"denoiser"}
    network.detach()


def test_a_table_that_matches_no_layer_is_an_error(shared_model: Any) -> None:
    with pytest.raises(UserError, match="no layer to adapt in denoiser .*Transformer2DModel"):
        lora.factory.for_arch(ARCH).create_network(1.0, 4, 1.0, None, shared_model[1], nn.Linear(2, 2))
    with pytest.raises(UserError, match="no network table fits this model"):
        lora.create_network(1.0, 4, 1.0, None, None, nn.Linear(2, 2))


def test_unknown_network_args_are_errors(shared_model: Any) -> None:
    with pytest.raises(UserError, match="Did you mean 'rank_dropout'"):
        make(shared_model, rank_droput=0.1)
    with pytest.raises(UserError, match="--network_dropout 0.1 and --network_args dropout=0.2 differ"):
        make(shared_model, neuron_dropout=0.1, dropout=0.2)


# training


def rates(default: float = 1e-3, denoiser: float | None = None, *encoders: float | None) -> LearningRates:
    return LearningRates(default, denoiser, encoders)


def test_groups_have_sd_scripts_names_and_hold_every_parameter_once(shared_model: Any) -> None:
    network = make(shared_model)
    groups = network.param_groups(rates(1e-3, 2e-3, None))
    assert {group.name: group.learning_rate for group in groups} == {"unet": 2e-3, "textencoder": 1e-3}
    assert sorted(id(p) for group in groups for p in group.params) == sorted(map(id, network.parameters()))


def test_loraplus_puts_the_up_matrices_in_groups_of_their_own(shared_model: Any) -> None:
    network = make(shared_model, loraplus_lr_ratio=4, loraplus_text_encoder_lr_ratio=16)
    groups = {group.name: group for group in network.param_groups(rates(1e-3))}
    assert {name: group.learning_rate for name, group in groups.items()} == pytest.approx(
        {"unet": 1e-3, "unet plus": 4e-3, "textencoder": 1e-3, "textencoder plus": 16e-3}
    )
    ups = {id(p) for name, p in network.named_parameters() if "lora_up" in name and "lora_unet" in name}
    assert {id(p) for p in groups["unet plus"].params} == ups


def test_block_rates_give_one_group_per_block(shared_model: Any) -> None:
    network = make(shared_model, mid_lr_weight="0.5", up_lr_weight="linear")
    groups = {group.name: group.learning_rate for group in network.param_groups(rates(1e-2))}
    assert groups["unet_block12"] == pytest.approx(5e-3)
    assert groups["unet_block18"] == pytest.approx(1e-2 * 5 / 11)
    assert "unet_block13" not in groups and "unet" not in groups


def test_a_part_at_rate_zero_is_left_out_and_frozen(shared_model: Any) -> None:
    network = make(shared_model)
    assert [group.name for group in network.param_groups(rates(1e-3, None, 0.0))] == ["unet"]
    assert all(p.requires_grad == name.startswith("lora_unet") for name, p in network.named_parameters())
    with pytest.raises(UserError, match="nothing would learn"):
        network.param_groups(rates(0.0))
    with pytest.raises(UserError, match="2 values, this model has 1 text encoders"):
        network.param_groups(rates(1e-3, None, 1e-4, 1e-4))


def test_sd_scripts_interface_gives_torch_groups(shared_model: Any) -> None:
    network = make(shared_model)
    groups, names = network.prepare_optimizer_params([1e-4], 2e-4, 1e-3)
    torch.optim.AdamW(groups)
    assert names == ["unet", "textencoder"]
    assert [group["lr"] for group in groups] == [2e-4, 1e-4]
    assert len(network.get_trainable_params()) == sum(len(group["params"]) for group in groups)
    assert network.is_mergeable()


def test_gradients_reach_both_parts_and_no_base_weight(shared_model: Any) -> None:
    network = make(shared_model, **CONV)
    fill(network)
    network.attach()
    predict(*shared_model).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())
    assert all(p.grad is None for module in shared_model for p in module.parameters())
    network.detach()


@pytest.mark.parametrize("kind", [{"neuron_dropout": 0.5}, {"rank_dropout": "0.5"}, {"module_dropout": 0.5}])
def test_dropout_acts_in_training_only_and_follows_the_default_generator(shared_model: Any, kind: dict[str, Any]) -> None:
    plain, network = make(shared_model, **CONV), make(shared_model, **CONV, **kind)
    fill(plain)
    fill(network)
    plain.attach()
    expected = predict(*shared_model)
    plain.detach()
    network.attach()
    outputs = []
    with torch.random.fork_rng(devices=[]):
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            outputs.append(predict(*shared_model))
    network.eval()
    assert torch.equal(predict(*shared_model), expected)
    network.detach()
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])


def test_rank_dropout_drops_whole_ranks_of_a_sample_and_keeps_the_mean() -> None:
    layer = nn.Linear(4, 8, bias=False)
    args = lora.NetworkArgs(rank_dropout=0.25)
    adapter = lora.LoRA(lora.Layer("x", "denoiser", layer), lora.LayerSize(8, 8.0), args, torch.Generator())
    with torch.no_grad():
        adapter.lora_up.weight.copy_(torch.eye(8))  # the output shows the ranks
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        out = adapter.delta(torch.ones(4000, 3, 4))  # [samples, tokens, features]
    kept = out != 0
    assert torch.equal(kept, kept[:, :1].expand_as(kept))
    assert kept[:, 0].float().mean() == pytest.approx(0.75, abs=0.01)
    torch.testing.assert_close(out.mean((0, 1)), adapter.eval().delta(torch.ones(1, 4))[0], rtol=0.05, atol=0.01)


GGPO = {"ggpo_sigma": "0.5", "ggpo_beta": 0.25}


@pytest.mark.parametrize(
    "layer",
    [nn.Linear(6, 40), nn.Conv2d(6, 40, 3, padding=1), nn.Linear(6, 40, dtype=torch.bfloat16)],
    ids=["linear", "conv", "bf16"],
)
@pytest.mark.parametrize("rows", [(), (10, 30)], ids=["whole", "split"])
def test_ggpo_disturbs_each_row_by_its_weights_and_gradients_norms(layer: Any, rows: tuple[int, ...]) -> None:
    if rows and isinstance(layer, nn.Conv2d):
        return
    args = lora.LoRAArgs(ggpo_sigma=0.5, ggpo_beta=0.25)
    adapter = lora.LoRA(lora.Layer("x", "denoiser", layer, rows), lora.LayerSize(2, 1.0), args, torch.Generator())
    fill(adapter, scale=1.0)
    for parameter in adapter.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    weight = adapter.delta_weight().flatten(1).detach()
    up, down = adapter.lora_up.weight, adapter.lora_down.weight
    eps = 1e-3  # of a step along the gradients: the slope is what the adapter's weight does then
    with torch.no_grad():
        up += eps * up.grad
        down += eps * down.grad
        ahead = adapter.delta_weight().flatten(1)
        up -= 2 * eps * up.grad
        down -= 2 * eps * down.grad
        slope = (ahead - adapter.delta_weight().flatten(1)) / (2 * eps)
        up += eps * up.grad
        down += eps * down.grad
    base = layer.weight.float().flatten(1).norm(dim=1).mean()
    expected = (0.5 * (base**2 + weight.norm(dim=1) ** 2).sqrt() + 0.25 * slope.norm(dim=1) ** 2) / 40**0.5

    x = torch.randn(2, 6, 8, 8, generator=torch.Generator().manual_seed(0)).to(layer.weight.dtype)
    x = x if isinstance(layer, nn.Conv2d) else x.flatten(2).transpose(1, 2)
    calm = adapter.eval().delta(x)
    assert torch.equal(adapter.train().delta(x), calm)  # nothing is known of gradients before the first update
    adapter.note_gradients()
    torch.testing.assert_close(adapter.deviations, expected, rtol=1e-3, atol=1e-4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        added = torch.stack([(adapter.delta(x) - calm).float() for _ in range(300)]).detach()
    assert adapter.delta(x).dtype == layer.weight.dtype
    if isinstance(layer, nn.Linear):  # E[(x n_i)^2] = ||x||^2 deviation_i^2, and the mean is 0
        found = added.square().mean(0) / x.float().square().sum(-1, keepdim=True)
        torch.testing.assert_close(found.mean((0, 1)), expected.square(), rtol=0.25, atol=0)
        assert (added.mean(0) / added.std(0)).abs().mean() < 0.1  # 1 / sqrt(300), times 0.8
    torch.testing.assert_close(adapter.eval().delta(x), calm, rtol=0, atol=0)


def test_ggpo_is_restored_with_a_state_and_leaves_no_trace_in_files(shared_model: Any) -> None:
    network = make(shared_model, **CONV, **GGPO)
    fill(network)
    keys = make(shared_model, **CONV).file_state_dict(None).keys()
    assert make(shared_model).on_gradients is None and network.on_gradients is not None
    network.attach()
    predict(*shared_model).square().mean().backward()
    network.on_gradients()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        disturbed = predict(*shared_model)
        again = make(shared_model, **CONV, **GGPO)
        again.load_state_dict(network.state_dict())
        network.detach()
        again.attach()
        torch.manual_seed(0)
        assert torch.equal(predict(*shared_model), disturbed)
        again.eval()
        assert not torch.equal(predict(*shared_model), disturbed)
    again.detach()
    assert network.file_state_dict(None).keys() == keys
    again.load_file_state_dict(make(shared_model, **CONV).file_state_dict(None), "a file")


def test_ggpo_keeps_its_deviations_when_gradients_overflow(shared_model: Any) -> None:
    network = make(shared_model, **GGPO)
    fill(network)
    for parameter in network.parameters():
        parameter.grad = torch.full_like(parameter, torch.inf)
    network.on_gradients()  # type: ignore[misc]
    assert all(not adapter.deviations.any() for adapter in network.adapters())  # type: ignore[union-attr]


def test_max_norm_shrinks_only_what_exceeds_it_and_reports_sd_scripts_rows(shared_model: Any) -> None:
    network = make(shared_model, **CONV)
    fill(network)
    norms = torch.stack([adapter.delta_weight().norm().detach() for adapter in network.adapters()])
    limit = float(norms.median())
    before = network.file_state_dict(None)
    before = {name: tensor.clone() for name, tensor in before.items()}
    assert network.after_step(None) == {}
    logged = network.after_step(limit)
    after = torch.stack([adapter.delta_weight().norm().detach() for adapter in network.adapters()])
    torch.testing.assert_close(after, norms.clamp(max=limit), atol=1e-4, rtol=1e-4)
    assert logged["max_norm/keys_scaled"] == (norms > limit).sum()
    assert logged["norm/avg_key_norm"] == pytest.approx(float(after.mean()), rel=1e-4)
    assert logged["max_norm/max_key_norm"] == pytest.approx(limit, rel=1e-4)
    kept = next(a.key for a, norm in zip(network.adapters(), norms, strict=True) if norm < limit * 0.9)
    name = f"{kept}.lora_up.weight"
    assert torch.equal(network.file_state_dict(None)[name], before[name])
