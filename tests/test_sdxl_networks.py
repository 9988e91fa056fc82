"""Adapters of SDXL: files that diffusers reads, files that sd-scripts, diffusers and peft write, ranks and rates by block."""

from __future__ import annotations

import copy
import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import tiny_sdxl
import torch
from network_models import fill, tiny_unet
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from library.errors import UserError
from library.key_layout import KeyMap
from library.optimizers import LearningRates
from library.rng import keyed_generator
from library.strategy_sdxl import CLIP_L, OPEN_CLIP
from library.unet_names import SDXL_UNET_NAMES
from networks import lora
from networks.lora_sd import ARCH as SD_ARCH
from networks.lora_sdxl import ARCH, block_index
from networks.network_interface import AdapterNetwork
from networks.network_targets import infer_arch

FACTORY = lora.factory.for_arch(ARCH)
TRANSFORMER = "lora_unet_input_blocks_4_1_transformer_blocks_0_"


def randn(*shape: int, key: str) -> Tensor:
    return torch.randn(shape, generator=keyed_generator("test", key))


@pytest.fixture
def model() -> dict[str, Any]:
    return dict(tiny_sdxl.modules())


def encoders(model: dict[str, Any]) -> dict[str, nn.Module]:
    return {name: model[name] for name in (CLIP_L, OPEN_CLIP)}


def network_of(model: dict[str, Any], **kwargs: Any) -> AdapterNetwork:
    return FACTORY.create_network(1.0, 4, 2.0, None, encoders(model), model["denoiser"], **kwargs)


def loaded(model: dict[str, Any], path: Path) -> AdapterNetwork:
    """The network of a file, attached."""
    network, _ = FACTORY.create_network_from_weights(1.0, path, None, encoders(model), model["denoiser"])
    network.attach()
    return network


@torch.no_grad()
def predict(unet: Any, first: Any, second: Any) -> Tensor:
    """What the three give together for one fixed input: [2, 4, 8, 8]."""
    ids = torch.randint(0, 200, (2, 77), generator=keyed_generator("ids"))
    ids[:, -1] = first.config.eos_token_id
    outputs = [encoder(input_ids=ids, output_hidden_states=True) for encoder in (first, second)]
    context = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
    sizes = torch.tensor([[64.0, 64, 0, 8, 64, 64]]).repeat(2, 1)
    added = {"text_embeds": outputs[1].text_embeds, "time_ids": sizes}
    sample: Tensor = unet(
        randn(2, 4, 8, 8, key="x"), torch.tensor([10, 500]), encoder_hidden_states=context, added_cond_kwargs=added
    ).sample
    return sample


def predict_model(model: dict[str, Any]) -> Tensor:
    return predict(model["denoiser"], model[CLIP_L], model[OPEN_CLIP])


def make_pipeline(model: dict[str, Any]) -> Any:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return StableDiffusionXLPipeline(
            vae=model["vae"],
            text_encoder=model[CLIP_L],
            text_encoder_2=model[OPEN_CLIP],
            tokenizer=None,
            tokenizer_2=None,
            unet=model["denoiser"],
            scheduler=EulerDiscreteScheduler(),
            add_watermarker=False,
        )


# ---- ours in diffusers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network_args", [{}, {"conv_dim": 2, "conv_alpha": 1}], ids=["linear", "conv"])
def test_diffusers_loads_our_file_whole_and_computes_the_same(
    network_args: dict[str, Any], model: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    untouched = copy.deepcopy(model)
    network: Any = network_of(model, **network_args)
    fill(network, scale=0.1)
    network.save_weights(tmp_path / "style.safetensors", None, {"ss_network_dim": "4"})
    base = predict_model(model)
    network.attach()
    ours = predict_model(model)
    pipeline = make_pipeline(untouched)
    with caplog.at_level(logging.WARNING):
        pipeline.load_lora_weights(tmp_path, weight_name="style.safetensors")
    assert "unexpected" not in caplog.text.lower() and "missing" not in caplog.text.lower()
    read = (pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2)
    counts = [sum(hasattr(m, "lora_A") for m in module.modules()) for module in read]
    assert counts == [sum(a.key.startswith(p) for a in network.adapters()) for p in ("lora_unet_", "lora_te1_", "lora_te2_")]
    assert (ours - base).abs().max() > 1e-2
    torch.testing.assert_close(predict(*read), ours, atol=1e-4, rtol=0)


# ---- others' in ours -------------------------------------------------------------------------------------------------


def test_a_file_in_sd_scripts_layout_does_what_adding_it_to_the_checkpoint_does(model: dict[str, Any], tmp_path: Path) -> None:
    """Made by hand from the checkpoint's own names, none of which pass through our tables."""
    checkpoint = dict(tiny_sdxl.ldm_tensors())
    unet, first = "model.diffusion_model.", "conditioner.embedders.0.transformer."
    file: dict[str, Tensor] = {}
    merged = dict(checkpoint)
    for key, weight in checkpoint.items():
        in_unet = key.startswith(unet) and (
            ".transformer_blocks." in key or ".in_layers.2." in key or key.endswith(".op.weight")
        )
        in_text = key.startswith(first) and (".self_attn." in key or ".mlp." in key)
        if not key.endswith(".weight") or weight.ndim < 2 or not (in_unet or in_text):
            continue
        name = key.removeprefix(unet).removeprefix(first).removesuffix(".weight").replace(".", "_")
        layer = ("lora_unet_" if in_unet else "lora_te1_") + name
        down = randn(2, *weight.shape[1:], key=f"{key}.down") * 0.1
        up = randn(weight.shape[0], 2, *[1] * (weight.ndim - 2), key=f"{key}.up") * 0.1
        file |= {f"{layer}.lora_down.weight": down, f"{layer}.lora_up.weight": up, f"{layer}.alpha": torch.tensor(1.0)}
        merged[key] = weight + 0.5 * (up.flatten(1) @ down.flatten(1)).view(weight.shape)
    save_file(file, tmp_path / "made.safetensors")
    network: Any = loaded(model, tmp_path / "made.safetensors")
    assert len(list(network.adapters())) == len(file) // 3 > 100
    base = predict_model(dict(tiny_sdxl.modules()))
    ours = predict_model(model)

    from library.clip_parts import CLIP_NAMES
    from library.unet_names import unet_key_map_for

    expected = dict(tiny_sdxl.modules())
    tables: dict[str, tuple[str, KeyMap]] = {
        "denoiser": (unet, unet_key_map_for(tiny_sdxl.configs()["denoiser"])),
        CLIP_L: (first, CLIP_NAMES),
    }
    for part, (prefix, names) in tables.items():
        own = {k.removeprefix(prefix): v for k, v in merged.items() if k.startswith(prefix) and "position_ids" not in k}
        expected[part].load_state_dict(names.to_ours(own), strict=True)
    assert (ours - base).abs().max() > 1e-2
    torch.testing.assert_close(ours, predict_model(expected), atol=1e-4, rtol=0)


@pytest.mark.parametrize("alpha", [2.0, 4.0])
def test_a_file_by_diffusers_and_peft_is_read_with_its_alpha(alpha: float, model: dict[str, Any], tmp_path: Path) -> None:
    from diffusers import StableDiffusionXLPipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    theirs = copy.deepcopy(model)
    targets = {
        "denoiser": ["to_q", "to_k", "to_v", "to_out.0"],
        CLIP_L: ["q_proj", "k_proj", "v_proj", "out_proj"],
        OPEN_CLIP: ["q_proj", "k_proj", "v_proj", "out_proj"],
    }
    layers, metadata = {}, {}
    for part, names in targets.items():
        config = LoraConfig(r=4, lora_alpha=alpha, target_modules=names, init_lora_weights=False)
        theirs[part].add_adapter(config)
        for name, parameter in theirs[part].named_parameters():
            if "lora_" in name:
                parameter.data = randn(*parameter.shape, key=name) * 0.2
        state = get_peft_model_state_dict(theirs[part], adapter_name="default")
        layers[part] = convert_state_dict_to_diffusers(state) if part != "denoiser" else state
        metadata[part] = config.to_dict() | {"target_modules": names}
    StableDiffusionXLPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=layers["denoiser"],
        text_encoder_lora_layers=layers[CLIP_L],
        text_encoder_2_lora_layers=layers[OPEN_CLIP],
        unet_lora_adapter_metadata=metadata["denoiser"],
        text_encoder_lora_adapter_metadata=metadata[CLIP_L],
        text_encoder_2_lora_adapter_metadata=metadata[OPEN_CLIP],
    )
    base = predict_model(model)
    network: Any = loaded(model, tmp_path / "pytorch_lora_weights.safetensors")
    assert {adapter.scale for adapter in network.adapters()} == {alpha / 4}
    assert network.parts == {"denoiser", CLIP_L, OPEN_CLIP}
    ours = predict_model(model)
    assert (ours - base).abs().max() > 1e-2
    torch.testing.assert_close(ours, predict_model(theirs), atol=1e-4, rtol=0)


def test_a_file_in_diffusers_names_is_the_one_in_original_names(model: dict[str, Any], tmp_path: Path) -> None:
    network: Any = network_of(model, conv_dim=2)
    fill(network)
    tensors = network.file_state_dict(None)
    names = {_original(path): f"lora_unet_{path}".replace(".", "_") for path, _ in model["denoiser"].named_modules()}
    renamed: dict[str, Tensor] = {}
    for key, value in tensors.items():
        layer, _, inner = key.partition(".")
        renamed[f"{names.get(layer, layer)}.{inner}"] = value
    assert sum(key.startswith("lora_unet_down_blocks_") for key in renamed) > 50
    assert not any(key.startswith("lora_unet_input_blocks_") for key in renamed)
    save_file(renamed, tmp_path / "diffusers.safetensors")
    again: Any = network_of(model, conv_dim=2)
    again.load_weights(tmp_path / "diffusers.safetensors")
    same = again.file_state_dict(None)
    assert same.keys() == tensors.keys() and all(torch.equal(value, same[key]) for key, value in tensors.items())
    save_file({key: value.clone() for key, value in (renamed | tensors).items()}, tmp_path / "both.safetensors")
    with pytest.raises(UserError, match="has the layer lora_unet_.* twice"):
        again.load_weights(tmp_path / "both.safetensors")


def _original(path: str) -> str:
    return f"lora_unet_{SDXL_UNET_NAMES.their_name(path)}".replace(".", "_")


@pytest.mark.parametrize("algo", ["lora", "lokr"])
def test_a_lycoris_network_has_the_original_names_and_comes_back(algo: str, model: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("lycoris")
    from networks.external import load_network_module

    module = load_network_module("lycoris.kohya").for_arch(ARCH)
    network = module.create_network(1.0, 4, 2.0, None, encoders(model), model["denoiser"], algo=algo)
    fill(network, scale=0.1)
    network.attach()
    trained = predict_model(model)
    network.save_weights(tmp_path / "a.safetensors", torch.float32)
    network.detach()
    layers = {key.partition(".")[0] for key in load_file(tmp_path / "a.safetensors")}
    assert f"{TRANSFORMER}attn1_to_q" in layers and not any("_down_blocks_" in layer for layer in layers)
    assert any(layer.startswith("lora_te2_text_model_") for layer in layers)
    again, _ = module.create_network_from_weights(1.0, tmp_path / "a.safetensors", None, encoders(model), model["denoiser"])
    again.attach()
    assert not torch.allclose(trained, predict_model(dict(tiny_sdxl.modules())), atol=1e-3)
    torch.testing.assert_close(predict_model(model), trained, atol=1e-4, rtol=0)


# ---- ranks and rates -------------------------------------------------------------------------------------------------


def test_each_text_encoder_has_its_own_rate_and_layers_that_are_never_run_do_not_learn(model: dict[str, Any]) -> None:
    network: Any = network_of(model)
    network.leave_untrained((model[CLIP_L].encoder.layers[-1],))
    groups = network.param_groups(LearningRates(1e-3, None, (5e-4, 2e-4)))
    assert {group.name: group.learning_rate for group in groups} == {
        "unet": 1e-3,
        "textencoder1": 5e-4,
        "textencoder2": 2e-4,
    }
    assert sum(len(group.params) for group in groups if group.name == "textencoder1") == 6 * 2  # one of two layers
    assert any(key.startswith("lora_te1_text_model_encoder_layers_1_") for key in network.file_state_dict(None))
    with pytest.raises(UserError, match="--text_encoder_lr has 3 values, this model has 2 text encoders"):
        network.param_groups(LearningRates(1e-3, None, (1.0, 2.0, 3.0)))


def test_blocks_are_counted_as_sd_scripts_counts_them(model: dict[str, Any]) -> None:
    keys = {a.key: block_index(a.key) for a in network_of(model, conv_dim=1).adapters()}  # type: ignore[attr-defined]
    assert keys[f"{TRANSFORMER}attn1_to_q"] == 5
    assert keys["lora_unet_input_blocks_1_0_in_layers_2"] == 2
    assert keys["lora_unet_middle_block_1_proj_in"] == 11
    assert keys["lora_unet_output_blocks_8_0_skip_connection"] == 21
    assert keys["lora_te2_text_model_encoder_layers_0_mlp_fc1"] is None
    ends = ("lora_unet_time_embed_0", "lora_unet_label_emb_0_0", "lora_unet_out_2")
    assert [block_index(key) for key in ends] == [0, 0, 22]


def test_ranks_and_rates_by_block_take_sdxls_numbers(model: dict[str, Any]) -> None:
    dims = [0] * 23
    dims[5], dims[11] = 3, 1
    network: Any = network_of(model, block_dims=",".join(map(str, dims)))
    ranks = {block_index(a.key): a.rank for a in network.adapters() if a.key.startswith("lora_unet_")}
    assert ranks == {5: 3, 11: 1}
    with pytest.raises(UserError, match="block_dims has 25 values, this model has 23 blocks"):
        network_of(model, block_dims=",".join(["4"] * 25))
    rated: Any = network_of(
        model, down_lr_weight="1,1,1,1,0.5,1,1,1,1", mid_lr_weight="1,0,1", up_lr_weight=",".join(["1"] * 9)
    )
    groups = {g.name: g.learning_rate for g in rated.param_groups(LearningRates(1e-3, None, (0.0,)))}
    assert groups["unet_block5"] == pytest.approx(5e-4)
    assert "unet_block11" not in groups and groups["unet_block8"] == pytest.approx(1e-3)


def test_the_table_is_told_from_the_model_where_nobody_names_it(model: dict[str, Any]) -> None:
    assert infer_arch(encoders(model), model["denoiser"]) is ARCH
    assert infer_arch(None, tiny_unet()) is SD_ARCH


def test_a_trained_file_has_every_layer_name_of_the_original_network(tmp_path: Path, model: dict[str, Any]) -> None:
    network = network_of(model)
    network.save_weights(tmp_path / "a.safetensors", torch.float16)
    layers = {key.partition(".")[0] for key in load_file(tmp_path / "a.safetensors")}
    original = {
        "lora_unet_" + key.removeprefix("model.diffusion_model.").removesuffix(".weight").replace(".", "_")
        for key, value in tiny_sdxl.ldm_tensors().items()
        if key.startswith("model.diffusion_model.") and key.endswith(".weight") and value.ndim == 2
    }
    transformers = {name for name in original if "_transformer_blocks_" in name or name.endswith(("_1_proj_in", "_1_proj_out"))}
    assert {layer for layer in layers if layer.startswith("lora_unet_")} == transformers
