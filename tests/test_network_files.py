"""Files and states of our adapters: what they hold, what comes back, what does not fit."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from network_models import CONV, fill, make, predict, tiny_text_encoder, tiny_unet
from safetensors.torch import save_file
from torch import Tensor, nn

from library.adapter_tools import read_adapter
from library.errors import UserError
from networks import lora


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt", "pt"])
def test_a_saved_network_gives_the_same_output_when_loaded(shared_model: Any, tmp_path: Path, suffix: str) -> None:
    network = make(shared_model, **CONV)
    fill(network)
    network.attach()
    expected = predict(*shared_model)
    network.detach()
    path = tmp_path / f"style.{suffix}"
    network.save_weights(path, None, {"ss_network_dim": "4"})
    again = make(shared_model, alpha=7, **CONV)
    again.load_weights(path)
    again.attach()
    assert torch.equal(predict(*shared_model), expected)
    again.detach()
    unet, encoder = shared_model
    from_file, tensors = lora.create_network_from_weights(1.0, path, None, encoder, unet)
    assert tensors.keys() == network.file_state_dict(None).keys()
    from_file.attach()
    assert torch.equal(predict(*shared_model), expected)
    from_file.detach()


def test_module_state_restores_exactly_and_takes_alpha_along(shared_model: Any) -> None:
    network, again = make(shared_model), make(shared_model, alpha=9, init_seed=5)
    fill(network)
    again.load_state_dict(network.state_dict())
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in network.state_dict().items())
    assert {adapter.scale for adapter in again.adapters()} == {0.5}  # type: ignore[attr-defined]


def test_alpha_stays_exact_when_the_network_is_cast_so_that_resuming_keeps_the_scale(shared_model: Any) -> None:
    network, again = (make(shared_model, alpha=0.3).to(torch.bfloat16) for _ in range(2))
    again.load_state_dict(network.state_dict())
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    scales = [{adapter.scale for adapter in n.adapters()} for n in (make(shared_model, alpha=0.3), network)]  # type: ignore[attr-defined]
    resumed = {adapter.scale for adapter in again.adapters()}  # type: ignore[attr-defined]
    assert scales[0] == scales[1] and resumed == {float(torch.tensor(0.3)) / 4}
    assert scales[0] == resumed


def test_under_autocast_the_adapter_computes_as_its_layer_does_and_learns_in_float32() -> None:
    layer = nn.Conv2d(4, 4, 3, padding=1)
    adapter = lora.LoRA(lora.Layer("x", "denoiser", layer), lora.LayerSize(2, 1.0), lora.NetworkArgs(), torch.Generator())
    fill(adapter)
    adapter.attach()
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(torch.ones(1, 4, 5, 5))
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in adapter.parameters())


def test_saving_in_half_precision_rounds_the_file_and_not_the_network(shared_model: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    network = make(shared_model)
    network.save_weights(tmp_path / "half.safetensors", torch.float16, {})
    assert {tensor.dtype for tensor in load_file(tmp_path / "half.safetensors").values()} == {torch.float16}
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
    tensors = make(shared_model, dim=8, rs_lora=True).file_state_dict(torch.bfloat16)
    assert {tensor.dtype for name, tensor in tensors.items() if not name.endswith("alpha")} == {torch.bfloat16}
    key = "lora_unet_mid_block_attentions_0_proj_in.alpha"
    assert float(tensors[key]) == pytest.approx(2 * 8**0.5, rel=1e-6)  # which bfloat16 would make 5.66


def test_hashes_in_the_file_are_those_of_its_bytes(tmp_path: Path) -> None:
    from safetensors import safe_open

    unet = tiny_unet()
    network = lora.create_network(1.0, 512, 1.0, None, None, unet)  # over 1 MiB, so that the old hash covers something
    fill(network)
    metadata = {"ss_network_dim": "512", "modelspec.title": "a title"}
    path = tmp_path / "style.safetensors"
    network.save_weights(path, torch.float32, metadata)
    with safe_open(path, "pt") as file:
        written = file.metadata()
    data = path.read_bytes()
    assert len(data) > 0x110000
    header_size = int.from_bytes(data[:8], "little")
    assert written["sshs_model_hash"] == hashlib.sha256(data[8 + header_size :]).hexdigest()
    # the old hash is of a file that has the ss_ rows only: rebuild that header, padded to 8 bytes as the format wants
    header = json.loads(data[8 : 8 + header_size])
    header["__metadata__"] = {"ss_network_dim": "512"}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    alone = len(text).to_bytes(8, "little") + text + data[8 + header_size :]
    assert written["sshs_legacy_hash"] == hashlib.sha256(alone[0x100000:0x110000]).hexdigest()[:8]
    assert metadata == {"ss_network_dim": "512", "modelspec.title": "a title"}


def sd_scripts_file(path: Path, rank: int = 2) -> dict[str, Tensor]:
    """A small file as sd-scripts writes it, made by hand: names and shapes only, no code of ours."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(9)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.3

    layers = {
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k": (random(rank, 16), random(8, rank)),
        "lora_unet_mid_block_attentions_0_proj_in": (random(rank, 16, 1, 1), random(16, rank, 1, 1)),
        "lora_unet_down_blocks_0_resnets_0_conv1": (random(rank, 8, 3, 3), random(8, rank, 1, 1)),
        "lora_unet_conv_in": (random(rank, 4, 3, 3), random(8, rank, 1, 1)),
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj": (random(rank, 16), random(16, rank)),
    }
    tensors = {}
    for name, (down, up) in layers.items():
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(1.0)}
    save_file(tensors, path, {"ss_network_dim": str(rank)})
    return tensors


def test_a_file_of_sd_scripts_is_loaded_merged_and_adds_what_its_tensors_say(tmp_path: Path) -> None:
    tensors = sd_scripts_file(tmp_path / "style.safetensors")
    unet, encoder = tiny_unet(), tiny_text_encoder()
    network, _ = lora.create_network_from_weights(0.5, tmp_path / "style.safetensors", None, encoder, unet)
    assert network.parts == {"denoiser", "text_encoder"}
    network.attach()
    adapted = predict(unet, encoder)
    network.detach()
    key = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    layer = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_k
    before = layer.weight.clone()
    lora.factory.merge_weights(0.5, tmp_path / "style.safetensors", encoder, unet)
    expected = before + 0.5 * 0.5 * tensors[f"{key}.lora_up.weight"] @ tensors[f"{key}.lora_down.weight"]
    torch.testing.assert_close(layer.weight, expected)
    torch.testing.assert_close(predict(unet, encoder), adapted, atol=1e-5, rtol=1e-5)


def test_a_merged_file_may_be_of_any_algorithm_and_of_several(tmp_path: Path) -> None:
    """Recognised layer by layer; a file to train on has to be of the module that trains."""
    from networks import loha, lokr

    unet, encoder = tiny_unet(), tiny_text_encoder()
    first, second = "lora_unet_mid_block_attentions_0_proj_in", "lora_unet_mid_block_attentions_0_proj_out"
    tensors = {}
    for module, key in ((loha, first), (lokr, second)):
        network = module.create_network(1.0, 2, 1.0, None, encoder, unet)
        fill(network)
        tensors |= {name: tensor for name, tensor in network.file_state_dict(None).items() if name.startswith(f"{key}.")}
    expected = {}
    for module, key in ((loha, first), (lokr, second)):
        only = {name: tensor for name, tensor in tensors.items() if name.startswith(key)}
        (adapter,) = module.create_network_from_weights(0.5, None, None, encoder, unet, only)[0].adapters()
        expected[key] = adapter.merged(adapter.base.weight)
    lora.factory.merge_weights(0.5, None, encoder, unet, tensors)
    middle = unet.mid_block.attentions[0]
    torch.testing.assert_close(middle.proj_in.weight, expected[first])
    torch.testing.assert_close(middle.proj_out.weight, expected[second])
    with pytest.raises(UserError, match="made by LoHa, not by plain LoRA.*--network_module networks.loha"):
        lora.create_network_from_weights(1.0, None, None, encoder, unet, tensors)


@pytest.mark.parametrize(
    ("layer", "names", "writer"),
    [
        ("attentions_0_proj_in", ("diff", "diff_b"), "full fine-tuning, .* training of biases"),
        ("attentions_0_norm", ("w_norm", "b_norm"), r"training of norms \(train_norm\)"),
        ("attentions_0_proj_in", ("oft_blocks", "rescale"), "OFT or BOFT with rescaled=true"),
        ("attentions_0_proj_in", ("lora_down.weight", "lora_up.weight", "diff_b"), "training of biases"),
    ],
)
def test_what_nothing_here_reads_is_named(
    shared_model: Any, layer: str, names: tuple[str, ...], writer: str, tmp_path: Path
) -> None:
    unet, encoder = shared_model
    plain = make(shared_model).file_state_dict(None)
    unread = {f"lora_unet_mid_block_{layer}.{name}": torch.zeros(16) for name in names}
    tensors = {key: value for key, value in {**plain, **unread}.items() if not key.startswith("lora_te")}
    for run in (
        lambda: lora.factory.merge_weights(1.0, None, encoder, unet, tensors),
        lambda: lora.create_network_from_weights(1.0, None, None, encoder, unet, tensors),
        lambda: make(shared_model).load_file_state_dict(tensors, "a file"),
    ):
        with pytest.raises(UserError, match=f"holds . tensors of LyCORIS' .*{writer}.*{layer}.{names[-1]}.*lycoris.kohya"):
            run()
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=writer):
        read_adapter(tmp_path / "a.safetensors")


def test_a_file_without_alpha_or_with_matrices_for_1x1_convolutions_means_the_same(shared_model: Any) -> None:
    unet, encoder = shared_model
    key = "lora_unet_mid_block_attentions_0_proj_in"
    down, up = torch.randn(2, 16), torch.randn(16, 2)
    network, _ = lora.create_network_from_weights(
        1.0, None, None, encoder, unet, {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
    )
    (adapter,) = network.adapters()
    torch.testing.assert_close(adapter.delta_weight(), (up @ down)[:, :, None, None])


def test_a_file_of_one_part_loads_into_a_network_of_both_and_back(shared_model: Any, tmp_path: Path) -> None:
    unet, encoder = shared_model
    both, unet_only = make(shared_model), lora.create_network(1.0, 4, 2.0, None, None, unet, init_seed=3)
    fill(unet_only)
    unet_only.save_weights(tmp_path / "unet.safetensors", None)
    both.load_weights(tmp_path / "unet.safetensors")
    key = "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight"
    assert torch.equal(both.state_dict()[key], unet_only.state_dict()[key])
    fill(both, seed=8)
    both.save_weights(tmp_path / "both.safetensors", None)
    unet_only.load_weights(tmp_path / "both.safetensors")
    assert torch.equal(both.state_dict()[key], unet_only.state_dict()[key])
    network, _ = lora.create_network_from_weights(1.0, tmp_path / "both.safetensors", None, None, unet)
    assert network.parts == {"denoiser"}


def save(path: Path, tensors: dict[str, Tensor]) -> Path:
    from safetensors.torch import save_file

    save_file(tensors, path)
    return path


def test_files_that_do_not_fit_say_what_is_wrong(shared_model: Any, tmp_path: Path) -> None:
    unet, encoder = shared_model
    network = make(shared_model, dim=4)
    make(shared_model, dim=2).save_weights(tmp_path / "style.safetensors", None)
    with pytest.raises(UserError) as caught:
        network.load_weights(tmp_path / "style.safetensors")
    assert str(caught.value) == "rank mismatch: file 2, --network_dim 4 (style.safetensors). Use --dim_from_weights."

    make(shared_model, **CONV).save_weights(tmp_path / "conv.safetensors", None)
    with pytest.raises(UserError, match=r"conv.safetensors does not fit.*layers more.*--dim_from_weights"):
        network.load_weights(tmp_path / "conv.safetensors")
    network.load_weights(tmp_path / "conv.safetensors", strict=False)

    sd_scripts_file(tmp_path / "few.safetensors", rank=4)
    with pytest.raises(UserError, match="lacks"):
        network.load_weights(tmp_path / "few.safetensors")

    sdxl = save(tmp_path / "xl.safetensors", {"lora_unet_input_blocks_4_1_proj_in.lora_down.weight": torch.zeros(4, 8)})
    with pytest.raises(UserError, match=r"no weights for this model.*input_blocks_4_1.*looks like a network for SDXL"):
        network.load_weights(sdxl)
    with pytest.raises(UserError, match="looks like a network for SDXL"):
        lora.create_network_from_weights(1.0, sdxl, None, encoder, unet)

    key = "lora_unet_mid_block_attentions_0_proj_in"
    loha = save(tmp_path / "loha.safetensors", {f"{key}.hada_w1_a": torch.zeros(4, 4)})
    with pytest.raises(UserError, match="made by LoHa, not by plain LoRA"):
        lora.create_network_from_weights(1.0, loha, None, encoder, unet)

    wide = {f"{key}.lora_down.weight": torch.zeros(4, 320, 1, 1), f"{key}.lora_up.weight": torch.zeros(320, 4, 1, 1)}
    with pytest.raises(
        UserError, match=r"shape mismatch: .*\(4, 320, 1, 1\) in wide.safetensors, this model needs \(4, 16, 1, 1\)"
    ):
        lora.create_network_from_weights(1.0, save(tmp_path / "wide.safetensors", wide), None, encoder, unet)


def test_unreadable_files_are_user_errors(shared_model: Any, tmp_path: Path) -> None:
    network = make(shared_model)
    with pytest.raises(UserError, match="not found"):
        network.load_weights(tmp_path / "nowhere.safetensors")
    network.save_weights(tmp_path / "whole.safetensors", None)
    half = tmp_path / "half.safetensors"
    half.write_bytes((tmp_path / "whole.safetensors").read_bytes()[:5000])
    with pytest.raises(UserError, match="damaged or incomplete"):
        network.load_weights(half)
    (tmp_path / "text.pt").write_text("no weights at all")
    with pytest.raises(UserError, match="damaged or incomplete"):
        network.load_weights(tmp_path / "text.pt")
