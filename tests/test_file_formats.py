"""Adapter files of other programs: every format written and read in every family, and what would be ignored refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import CASES, make_workspace
from safetensors.torch import load_file, save_file
from tiny_denoisers import DENOISERS
from torch import Tensor, nn

from library.adapter_tools import read_adapter
from library.errors import UserError
from library.memory_tracker import MemoryTracker, simulated
from networks import loha, lora
from networks.file_formats import (
    FORMATS,
    arch_of,
    flat,
    in_format,
    in_kohya_names,
    mended,
    own_layers,
    weak_layers,
    write_adapter,
)
from networks.network_base import AdditiveAdapter, LayerNetwork
from networks.network_files import by_layer, read_weights

START = {"kohya": "lora_unet_", "comfy": "diffusion_model.", "diffusers": "", "peft": ""}


@pytest.fixture(scope="module")
def denoisers() -> dict[str, nn.Module]:
    return {name: denoiser.make() for name, denoiser in DENOISERS.items()}


def few_layers(family: str, model: nn.Module, factory: Any = lora.factory, **arguments: Any) -> LayerNetwork:
    """A filled network on three layers."""
    targets = {"exclude_patterns": ".*", "include_patterns": DENOISERS[family].few}
    network: LayerNetwork = factory.for_arch(DENOISERS[family].arch).create_network(
        1.0, 3, 2.0, None, None, model, **targets, **arguments
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return network


def deltas(network: LayerNetwork) -> dict[str, Tensor]:
    found = {}
    for adapter in network.adapters():
        assert isinstance(adapter, AdditiveAdapter)
        weight = adapter.base.weight.float()
        found[adapter.key] = adapter.merged(weight) - weight
    return found


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        torch.testing.assert_close(other[key], value, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("family", DENOISERS)
def test_what_is_written_in_a_format_comes_back(
    family: str, format: str, denoisers: dict[str, nn.Module], tmp_path: Path
) -> None:
    arch, model = DENOISERS[family].arch, denoisers[family]
    arguments = {"dora_wd": "true"} if format != "kohya" else {}
    network = few_layers(family, model, **arguments)
    path = tmp_path / ("folder" if format == "peft" else "file.safetensors")
    write_adapter(path, network.file_state_dict(None), {"ss_seed": "1"}, arch, format, None)
    tensors = read_weights(path)
    assert all(name.startswith(START[format]) for name in tensors)
    if format == "kohya" or arch.name == "flux":  # three layers in other names may be of several
        assert arch_of(by_layer(tensors), "x").name == arch.name
    again, _ = lora.factory.for_arch(arch).create_network_from_weights(1.0, path, None, None, model)
    assert_same(deltas(network), deltas(again))
    other = few_layers(family, model, **arguments)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_weights(path)
    assert_same(deltas(network), deltas(other))


@pytest.mark.parametrize("format", ["kohya", "comfy"])
def test_alpha_stays_exact_in_a_file_of_half_precision(format: str, denoisers: dict[str, nn.Module], tmp_path: Path) -> None:
    tensors = few_layers("flux", denoisers["flux"]).file_state_dict(None)
    tensors = {name: torch.tensor(0.3) if name.endswith("alpha") else tensor for name, tensor in tensors.items()}
    write_adapter(tmp_path / "a.safetensors", tensors, {}, DENOISERS["flux"].arch, format, torch.bfloat16)
    written = load_file(tmp_path / "a.safetensors")
    assert {tensor.dtype for name, tensor in written.items() if name.endswith("weight")} == {torch.bfloat16}
    assert {float(tensor) for name, tensor in written.items() if name.endswith("alpha")} == {float(torch.tensor(0.3))}


@pytest.mark.parametrize("format", FORMATS)
def test_a_file_is_read_where_a_run_is_simulated(format: str, denoisers: dict[str, nn.Module], tmp_path: Path) -> None:
    """Its numbers say what its layers are, and the network is one of tensors without numbers."""
    arch = DENOISERS["flux"].arch
    network = few_layers("flux", denoisers["flux"], network_reg_dims="linear1=6")
    path = tmp_path / ("folder" if format == "peft" else "file.safetensors")
    write_adapter(path, network.file_state_dict(None), {}, arch, format, None)
    real, _ = lora.factory.for_arch(arch).create_network_from_weights(1.0, path, None, None, denoisers["flux"])
    with simulated(), MemoryTracker():
        model = DENOISERS["flux"].make()
        again, _ = lora.factory.for_arch(arch).create_network_from_weights(1.0, path, None, None, model)
        again.load_weights(path)
        lora.factory.for_arch(arch).merge_weights(1.0, path, None, model)
    assert {name: tensor.shape for name, tensor in again.state_dict().items()} == {
        name: tensor.shape for name, tensor in real.state_dict().items()
    }
    assert type(next(again.parameters()).data) is not Tensor


@pytest.mark.parametrize("family", DENOISERS)
def test_another_algorithm_goes_into_comfy_names_and_not_into_those_of_peft(
    family: str, denoisers: dict[str, nn.Module]
) -> None:
    arch = DENOISERS[family].arch
    network = few_layers(family, denoisers[family], loha.factory)
    tensors = in_format(network.file_state_dict(None), arch, "comfy", "x")
    assert sum(name.endswith(".hada_w1_a") and name.startswith("diffusion_model.") for name in tensors) == 3
    again, _ = loha.factory.for_arch(arch).create_network_from_weights(1.0, None, None, None, denoisers[family], tensors)
    assert_same(deltas(network), deltas(again))
    with pytest.raises(UserError, match="diffusers and peft read LoRA alone"):
        in_format(network.file_state_dict(None), arch, "peft", "x")


KEYS = {
    "sd": {
        "kohya": "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q",
        "flat": "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
        "comfy": "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q",
        "diffusers": "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
    },
    "sdxl": {
        "kohya": "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
        "flat": "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q",
        "comfy": "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q",
        "diffusers": "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
    },
    "flux": {
        "kohya": "lora_unet_double_blocks_1_txt_mlp_0",
        "flat": "lora_unet_transformer_blocks_1_ff_context_net_0_proj",
        "comfy": "diffusion_model.double_blocks.1.txt_mlp.0",
        "diffusers": "transformer.transformer_blocks.1.ff_context.net.0.proj",
    },
    "sd3": {
        "kohya": "lora_unet_joint_blocks_7_context_block_mlp_fc2",
        "flat": "lora_unet_transformer_blocks_7_ff_context_net_2",
        "comfy": "diffusion_model.joint_blocks.7.context_block.mlp.fc2",
        "diffusers": "transformer.transformer_blocks.7.ff_context.net.2",
    },
}
TEXT_KEYS = {
    "sd": ("lora_te_{}", "lora_te_{}", "text_encoder.{}"),
    "sdxl": ("lora_te2_{}", "text_encoders.clip_g.transformer.{}", "text_encoder_2.{}"),
    "flux": ("lora_te1_{}", "text_encoders.clip_l.transformer.{}", "text_encoder.{}"),
    "sd3": ("lora_te2_{}", "text_encoders.clip_g.transformer.{}", "text_encoder_2.{}"),
}
TEXT_LAYER = "text_model.encoder.layers.3.mlp.fc1"


def plain(key: str, out: int = 6) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    down, up = torch.randn(2, 4, generator=generator), torch.randn(out, 2, generator=generator)
    return {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(2.0)}


@pytest.mark.parametrize("family", KEYS)
def test_the_names_of_a_layer(family: str) -> None:
    """Typed by hand, as the programs' own sources have them."""
    arch, keys = DENOISERS[family].arch, KEYS[family]
    kohya, comfy, diffusers = TEXT_KEYS[family]
    text = kohya.format(TEXT_LAYER.replace(".", "_"))
    tensors = plain(keys["kohya"]) | plain(text)
    for format, name in (("comfy", comfy), ("diffusers", diffusers)):
        layers = {key.rsplit(".lora_", 1)[0].removesuffix(".alpha") for key in in_format(tensors, arch, format, "x")}
        spelt = name.format(TEXT_LAYER if "." in name else TEXT_LAYER.replace(".", "_"))
        assert layers == {keys[format], spelt}
        assert by_layer(in_kohya_names(in_format(tensors, arch, format, "x"), arch, "x")).keys() == {keys["kohya"], text}
    assert own_layers(plain(keys["flat"]), arch, "x").keys() == {keys["kohya"]}


def split_file(*, alpha: float) -> dict[str, Tensor]:
    """FLUX.1's qkv and proj as sd-scripts' split_qkv leaves them, at rank 2: one lora_up of three blocks."""
    generator = torch.Generator().manual_seed(3)
    ups = [torch.randn(4, 2, generator=generator) for _ in range(3)]
    qkv, proj = "lora_unet_double_blocks_0_img_attn_qkv", "lora_unet_double_blocks_0_img_attn_proj"
    return plain(proj, 4) | {
        f"{qkv}.lora_down.weight": torch.randn(6, 4, generator=generator),
        f"{qkv}.lora_up.weight": torch.block_diag(*ups),
        f"{qkv}.alpha": torch.tensor(alpha),
    }


def test_a_split_file_of_sd_scripts_is_reported_and_mended(caplog: pytest.LogCaptureFixture) -> None:
    arch = DENOISERS["flux"].arch
    qkv = "lora_unet_double_blocks_0_img_attn_qkv"
    with caplog.at_level(logging.WARNING):
        layers = own_layers(split_file(alpha=2.0), arch, "theirs.safetensors")
    assert "theirs.safetensors: 1 fused layers" in caplog.text and "3 times weaker" in caplog.text
    assert weak_layers(layers, arch) == {qkv: 3}
    caplog.clear()
    better = mended(layers, weak_layers(layers, arch))
    assert float(better[qkv]["alpha"]) == 6 and not weak_layers(better, arch)
    with caplog.at_level(logging.WARNING):
        own_layers(split_file(alpha=6.0), arch, "ours.safetensors")
        own_layers(flat(better), arch, "mended.safetensors")
    assert caplog.text == ""


def test_parts_of_a_fused_layer_become_one_adapter_with_zeros_for_what_is_absent() -> None:
    arch = DENOISERS["flux"].arch
    names = [f"transformer.transformer_blocks.0.attn.{name}" for name in ("to_q", "to_k", "to_v")]
    layers = own_layers(plain(names[0], 4) | {k: v * 2 for k, v in plain(names[2], 4).items()}, arch, "x")
    (layer,) = layers.values()
    up, down, alpha = (layer[name] for name in ("lora_up.weight", "lora_down.weight", "alpha"))
    weight = up @ down * alpha / len(down)
    one = plain("x", 4)
    q = one["x.lora_up.weight"] @ one["x.lora_down.weight"]
    torch.testing.assert_close(weight, torch.cat([q, torch.zeros(4, 4), 8 * q]))
    with pytest.raises(UserError, match="only LoRA's parts of it can be joined"):
        own_layers({f"{name}.hada_w1_a": torch.ones(1, 1) for name in names}, arch, "x")


@pytest.mark.parametrize("format", FORMATS)
def test_a_key_that_no_program_would_read_is_not_written(format: str) -> None:
    arch = DENOISERS["flux"].arch
    with pytest.raises(UserError, match="lora_unet_double_blocks_0_img_attn_qqq"):
        in_format(plain("lora_unet_double_blocks_0_img_attn_qqq"), arch, format, "x")
    unknown = plain("lora_unet_img_in") | {"lora_unet_img_in.lora_side.weight": torch.ones(1)}
    with pytest.raises(UserError, match="lora_side"):
        in_format(unknown, arch, format, "x")


def test_peft_itself_reads_the_folder(denoisers: dict[str, nn.Module], tmp_path: Path) -> None:
    import copy

    from peft import PeftModel

    sd = DENOISERS["sd"]
    network = few_layers("sd", denoisers["sd"])
    write_adapter(tmp_path / "a", network.file_state_dict(None), {}, sd.arch, "peft", None)
    theirs = PeftModel.from_pretrained(copy.deepcopy(denoisers["sd"]), tmp_path / "a", subfolder="unet")
    network.attach()
    expected = sd.output(denoisers["sd"])
    network.detach()
    torch.testing.assert_close(sd.output(theirs), expected, atol=1e-5, rtol=1e-5)


def test_a_run_saves_for_peft_and_another_goes_on_from_it(tmp_path: Path) -> None:
    space, flags = make_workspace(CASES["flux"], tmp_path), ("--network_train_unet_only", "--max_train_steps=1")
    first = space.trainer("network", tmp_path / "one", "--save_format=peft", *flags)
    with torch.no_grad():
        for parameter in first.trainable.network.parameters():
            parameter.add_(0.1)
    assert first.trainable.suffix == ""
    first.trainable.check_savable()
    first.trainable.save(tmp_path / "tiny", dtype=torch.float32, metadata={"ss_seed": "7"})
    assert (tmp_path / "tiny" / "transformer" / "adapter_config.json").is_file()
    weights = ("--dim_from_weights", f"--network_weights={tmp_path / 'tiny'}", f"--base_weights={tmp_path / 'tiny'}")
    again = space.trainer("network", tmp_path / "two", *weights, *flags)
    assert again.trainable.suffix == ".safetensors"
    assert_same(deltas(first.trainable.network), deltas(again.trainable.network))


def test_pefts_own_scales_are_heeded(tmp_path: Path) -> None:
    names = ["base_model.model.double_blocks.0.img_attn.proj", "base_model.model.double_blocks.1.img_attn.proj"]
    weights = {f"{n}.lora_{side}.weight": torch.ones(2, 2) for n in names for side in "AB"}
    save_file(weights, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "lora_alpha": 3, "alpha_pattern": {"double_blocks.1.img_attn.proj": 5}, "use_rslora": True}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    layers = own_layers(read_weights(tmp_path), DENOISERS["flux"].arch, "x")
    alphas = [float(layer["alpha"]) for layer in layers.values()]
    assert alphas == pytest.approx([3 * 2**0.5, 5 * 2**0.5])
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3"}))
    with pytest.raises(UserError, match="describes IA3"):
        read_weights(tmp_path)
    assert load_file(tmp_path / "adapter_model.safetensors").keys() == weights.keys()


@pytest.mark.parametrize(
    ("layer", "width", "metadata", "family"),
    [
        ("transformer.transformer_blocks.0.attn.to_q", 3072, {}, "flux"),
        ("transformer.transformer_blocks.0.ff.net.2", 12288, {}, "flux"),
        ("transformer.transformer_blocks.0.attn.to_q", 1536, {}, "sd3"),
        ("base_model.model.transformer_blocks.0.norm1.linear", 2432, {}, "sd3"),
        ("transformer.transformer_blocks.0.attn.to_q", 64, {"ss_base_model_version": "flux1"}, "flux"),
        ("transformer.transformer_blocks.0.attn.to_q", 64, {"ss_base_model_version": "m"}, "sd3"),
        ("transformer.transformer_blocks.0.attn.to_q", 64, {"modelspec.architecture": "Flux-1-dev/lora"}, "flux"),
        ("transformer.transformer_blocks.0.attn.to_q", 3072, {"modelspec.architecture": "stable-diffusion-3-5-large"}, "sd3"),
        ("transformer.transformer_blocks.0.attn.to_q", 64, {}, None),
        ("transformer.transformer_blocks.0.attn.to_q", 64, {"ss_base_model_version": "a model to come"}, None),
    ],
)
def test_where_names_fit_two_families_the_file_says_which(
    layer: str, width: int, metadata: dict[str, str], family: str | None, tmp_path: Path
) -> None:
    path = tmp_path / "a.safetensors"
    save_file(
        {f"{layer}.lora_{side}.weight": torch.zeros(shape) for side, shape in (("A", (1, width)), ("B", (width, 1)))},
        path,
        metadata,
    )
    if family is not None:
        assert read_adapter(path).arch.name == family
        return
    with pytest.raises(UserError, match=r"may be for flux or sd3: .* Say it with --family\."):
        read_adapter(path)
    assert read_adapter(path, "flux").arch.name == "flux"
