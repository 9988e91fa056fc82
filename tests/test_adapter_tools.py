"""The tools for adapters and models, through their own `main`, on tiny models of every family and layout."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_flux
import tiny_lumina
import tiny_sd3
import tiny_sdxl
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_file_formats import plain, split_file
from tiny_denoisers import DENOISERS
from torch import Tensor, nn

from library.errors import UserError
from library.model_layers import ModelOnDisk, open_model
from networks import loha, lora, oft
from networks.file_formats import own_layers
from networks.merging import RankRule, clamped, extracted, factors_of
from tools import (
    check_lora_weights,
    convert_lora,
    extract_lora_from_dylora,
    extract_lora_from_models,
    merge_lora,
    merge_models,
    resize_lora,
    show_metadata,
)

ROOT = Path(__file__).resolve().parent.parent
WRITERS: dict[str, Callable[[Path], Path]] = {
    "sd": lambda folder: tiny.write_sd_checkpoint(folder / "sd.safetensors"),
    "sd2": lambda folder: tiny.write_sd_checkpoint(folder / "sd2.safetensors", version="v2"),
    "sd folder": lambda folder: tiny.write_sd_diffusers(folder / "sd"),
    "sdxl": lambda folder: tiny_sdxl.write_checkpoint(folder / "sdxl.safetensors"),
    "flux": lambda folder: tiny_flux.write_flux_single(folder / "flux.safetensors"),
    "sd3": lambda folder: tiny_sd3.write_whole(folder / "sd3.safetensors"),
    "lumina": lambda folder: tiny_lumina.write_single(folder / "lumina.safetensors"),
    "flux folder": lambda folder: tiny_flux.write_flux_folder(folder / "flux"),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = WRITERS[name](tmp_path_factory.mktemp(name.replace(" ", "_")))
        return made[name]

    return get


def run(tool: Any, *arguments: object) -> None:
    tool.main([str(argument) for argument in arguments])


def some_layers(model: ModelOnDisk) -> list[str]:
    """A few of each part, fused ones among them."""
    signs = (
        "attn2_to_k",
        "img_attn_qkv",
        "linear1",
        "1_x_block_attn_qkv",
        "layers_0_attention_qkv",
        "layers_1_self_attn_q_proj",
        "layers_0_mlp_fc1",
        "SelfAttention_v",
    )
    return [key for key in model.layers if key.endswith(signs)][:40]


def random_lora(model: ModelOnDisk, rank: int = 2, seed: int = 0, alpha: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, Tensor] = {}
    for key in some_layers(model):
        out, width = model.weight(key).shape
        found[f"{key}.lora_down.weight"] = torch.randn(rank, width, generator=generator) / width**0.5
        found[f"{key}.lora_up.weight"] = torch.randn(out, rank, generator=generator)
        found[f"{key}.alpha"] = torch.tensor(alpha)
    return found


def delta(layers: dict[str, dict[str, Tensor]], key: str) -> Tensor:
    factors = factors_of(key, layers[key])
    return factors.up @ factors.down


def layers_of(path: Path, model: ModelOnDisk) -> dict[str, dict[str, Tensor]]:
    return own_layers(load_file(path), model.family.arch, path.name)


@pytest.mark.parametrize("name", WRITERS)
def test_a_merged_model_is_the_sum_and_extraction_gives_the_adapter_back(
    name: str, models: Callable[[str], Path], tmp_path: Path
) -> None:
    base = open_model(models(name))
    suffix = "" if base.path.is_dir() else ".safetensors"
    save_file(random_lora(base), tmp_path / "a.safetensors")
    merged = tmp_path / f"merged{suffix}"
    run(merge_lora, "--model", base.path, "--models", tmp_path / "a.safetensors", "--ratios", 0.5, "--save_to", merged)
    layers, after = layers_of(tmp_path / "a.safetensors", base), open_model(merged)
    assert len({base.layers[key][0].part for key in layers}) == len({group.part for group in base.family.arch.groups})
    for key in base.layers:
        added = 0.5 * delta(layers, key) if key in layers else 0.0
        torch.testing.assert_close(after.weight(key), base.weight(key) + added, atol=1e-6, rtol=1e-6)

    flags = ("--dim", 2, "--save_to", tmp_path / "again.safetensors")
    run(extract_lora_from_models, "--model_org", base.path, "--model_tuned", merged, *flags)
    again = layers_of(tmp_path / "again.safetensors", base)
    assert {key for key in layers if not key.startswith("lora_te3_")} <= again.keys()  # T5 is adapted when asked for
    for key in layers.keys() & again.keys():
        torch.testing.assert_close(delta(again, key), 0.5 * delta(layers, key), atol=1e-5, rtol=1e-4)
    assert all(float(delta(again, key).abs().max()) < 1e-6 for key in again if key not in layers)


@pytest.mark.parametrize(("name", "factory"), [("sd", lora), ("flux", lora), ("flux", loha), ("flux", oft)])
def test_a_merged_model_computes_what_the_live_adapter_does(
    name: str, factory: Any, models: Callable[[str], Path], tmp_path: Path
) -> None:
    kind, model = DENOISERS[name], open_model(models(name))
    denoiser: nn.Module = model.parts["denoiser"].load(dtype=torch.float32, device="cpu")
    arguments = {"dora_wd": "true"} if factory is lora else {}
    targets = {"exclude_patterns": ".*", "include_patterns": kind.few}
    network = factory.factory.for_arch(kind.arch).create_network(1.0, 2, 1.0, None, None, denoiser, **targets, **arguments)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    network.save_weights(tmp_path / "a.safetensors", None)
    plain_output = kind.output(denoiser)
    network.set_multiplier(0.7)
    network.attach()
    live = kind.output(denoiser)
    assert (live - plain_output).abs().max() > 1e-3
    output = tmp_path / "merged.safetensors"
    run(merge_lora, "--model", model.path, "--models", tmp_path / "a.safetensors", "--ratios", 0.7, "--save_to", output)
    merged = open_model(output).parts["denoiser"].load(dtype=torch.float32, device="cpu")
    torch.testing.assert_close(kind.output(merged), live, atol=1e-5, rtol=1e-4)


def test_a_file_and_a_folder_of_one_model_have_the_same_layers(models: Callable[[str], Path], tmp_path: Path) -> None:
    """An adapter in diffusers' names into the file; taken out again with the folder as the original."""
    file, folder = open_model(models("flux")), open_model(models("flux folder"))
    assert file.layers.keys() == folder.layers.keys()
    key = "lora_unet_single_blocks_0_linear1"
    torch.testing.assert_close(file.weight(key), folder.weight(key))
    save_file(random_lora(file), tmp_path / "a.safetensors")
    merged = tmp_path / "merged.safetensors"
    bf16 = ("--save_precision", "bf16")
    run(merge_lora, "--model", file.path, "--models", tmp_path / "a.safetensors", "--save_to", merged, *bf16)
    assert {tensor.dtype for tensor in load_file(merged).values()} == {torch.bfloat16}
    energy = ("--energy", 0.9, "--dim", 8, "--save_to", tmp_path / "b.safetensors")
    run(extract_lora_from_models, "--model_org", folder.path, "--model_tuned", merged, *energy)
    again = layers_of(tmp_path / "b.safetensors", file)
    assert len(again[key]["lora_down.weight"]) == 2


def test_text_encoders_in_files_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tiny_flux.write_flux_files(tmp_path)
    clip = tmp_path / "clip_l.safetensors"
    model = open_model(path, {"clip_l": clip})
    save_file(random_lora(model), tmp_path / "a.safetensors")
    run(merge_lora, "--model", path, "--models", tmp_path / "a.safetensors", "--save_to", tmp_path / "without.safetensors")
    assert "layers are for clip_l, not in" in capsys.readouterr().out
    own = ("--clip_l", clip, "--clip_l_save_to", tmp_path / "clip_out.safetensors")
    run(merge_lora, "--flux_model", path, "--models", tmp_path / "a.safetensors", "--save_to", tmp_path / "m.safetensors", *own)
    after = open_model(tmp_path / "m.safetensors", {"clip_l": tmp_path / "clip_out.safetensors"})
    layers = layers_of(tmp_path / "a.safetensors", model)
    key = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    torch.testing.assert_close(after.weight(key), model.weight(key) + delta(layers, key))
    with pytest.raises(UserError, match="clip_l needs both"):
        run(merge_lora, "--model", path, "--models", tmp_path / "a.safetensors", "--save_to", tmp_path / "x", "--clip_l", clip)


def test_an_adapter_of_another_model_is_refused(models: Callable[[str], Path], tmp_path: Path) -> None:
    save_file(plain("lora_unet_double_blocks_0_img_attn_qkv"), tmp_path / "a.safetensors")
    flags = ("--models", tmp_path / "a.safetensors", "--save_to", tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="1 layers that .* has not: lora_unet_double_blocks_0_img_attn_qkv"):
        run(merge_lora, "--model", models("sd"), *flags)
    save_file(plain(SD_KEY), tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"in the model and \(6, 4\) in the adapter: of another model"):
        run(merge_lora, "--model", models("sd"), *flags)


SD_KEY = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
TEXT_KEY = "lora_te_text_model_encoder_layers_0_mlp_fc1"


def test_adapters_are_joined_with_one_another(tmp_path: Path) -> None:
    one = plain(SD_KEY) | plain(TEXT_KEY)
    two = {name: tensor * 3 if "lora_up" in name else tensor + 1 for name, tensor in plain(SD_KEY).items()}
    save_file(one, tmp_path / "a.safetensors", {"ss_base_model_version": "sd_v1"})
    save_file(two, tmp_path / "b.safetensors")
    both = ("--models", tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--ratios", 0.5, -2)
    layers = [own_layers(tensors, DENOISERS["sd"].arch, "x") for tensors in (one, two)]
    expected = 0.5 * delta(layers[0], SD_KEY) - 2 * delta(layers[1], SD_KEY)
    ranks = {}
    for method, flags in {"concat": ("--concat", "--shuffle"), "svd": ("--method", "svd", "--new_rank", 4)}.items():
        run(merge_lora, *both, "--save_to", tmp_path / f"{method}.safetensors", *flags)
        made = own_layers(load_file(tmp_path / f"{method}.safetensors"), DENOISERS["sd"].arch, "x")
        torch.testing.assert_close(delta(made, SD_KEY), expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(delta(made, TEXT_KEY), 0.5 * delta(layers[0], TEXT_KEY), atol=1e-5, rtol=1e-4)
        ranks[method] = len(made[SD_KEY]["lora_down.weight"])
    assert ranks == {"concat": 4, "svd": 4}
    run(merge_lora, *both, "--save_to", tmp_path / "blend.safetensors")
    blended = own_layers(load_file(tmp_path / "blend.safetensors"), DENOISERS["sd"].arch, "x")[SD_KEY]
    a, b = (factors_of(SD_KEY, found[SD_KEY]) for found in layers)
    torch.testing.assert_close(blended["lora_up.weight"], a.up * 0.5**0.5 - b.up * 2**0.5)
    with safe_open(tmp_path / "concat.safetensors", "pt") as file:
        facts = file.metadata()
    assert facts["ss_base_model_version"] == "sd_v1" and facts["ss_network_dim"] == "4"
    assert facts["modelspec.merged_from"] == "a, b"


@pytest.mark.parametrize(
    ("name", "inner"), [("LoHa", "hada_w1_a"), ("GLoRA", "a1.weight"), ("OFT", "oft_blocks"), ("DoRA", "dora_scale")]
)
def test_what_is_no_plain_lora_is_not_joined_and_told_how(name: str, inner: str, tmp_path: Path) -> None:
    other = plain(TEXT_KEY) | {f"{TEXT_KEY}.dora_scale": torch.ones(2, 1)} if name == "DoRA" else {}
    save_file(other or {f"{TEXT_KEY}.{inner}": torch.ones(2, 2, 2)}, tmp_path / "a.safetensors")
    save_file(plain(SD_KEY), tmp_path / "b.safetensors")
    both = ("--models", tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--family", "sd")
    with pytest.raises(UserError, match=f"mlp_fc1 is of {name}. Only plain LoRAs.*--model.*extract_lora_from_models"):
        run(merge_lora, *both, "--save_to", tmp_path / "c.safetensors", "--concat")


def test_block_weights(models: Callable[[str], Path], tmp_path: Path) -> None:
    """17 numbers: text encoder first, then the blocks with attention. The layer's block is the fourth of the input side."""
    save_file(plain(SD_KEY) | plain(TEXT_KEY), tmp_path / "a.safetensors")
    weights = [0.0] * 17
    weights[0], weights[3] = 0.25, 0.5  # IN04
    flags = ("--models", tmp_path / "a.safetensors", "--lbws", json.dumps(weights), "--concat")
    run(merge_lora, *flags, "--save_to", tmp_path / "b.safetensors")
    before, after = (own_layers(load_file(tmp_path / f"{n}.safetensors"), DENOISERS["sd"].arch, "x") for n in "ab")
    torch.testing.assert_close(delta(after, SD_KEY), 0.5 * delta(before, SD_KEY))
    torch.testing.assert_close(delta(after, TEXT_KEY), 0.25 * delta(before, TEXT_KEY))
    base = open_model(models("sd"))
    key = next(key for key in base.layers if "_down_blocks_0_" in key and key.endswith("attn2_to_k"))
    save_file(random_lora(base), tmp_path / "c.safetensors")
    flags = ("--models", tmp_path / "c.safetensors", "--lbws", "0.5," + "0*16", "--save_to", tmp_path / "m.safetensors")
    run(merge_lora, "--model", base.path, *flags)
    merged, lora_layers = open_model(tmp_path / "m.safetensors"), layers_of(tmp_path / "c.safetensors", base)
    text = next(key for key in lora_layers if key.startswith("lora_te_"))
    assert torch.equal(merged.weight(key), base.weight(key))
    torch.testing.assert_close(merged.weight(text), base.weight(text) + 0.5 * delta(lora_layers, text))


@pytest.mark.parametrize(
    ("method", "value", "rank"),
    [
        ("fixed", 0, 4),
        ("sv_ratio", 4.5, 3),
        ("sv_cumulative", 0.74, 2),
        ("sv_fro", 0.8, 1),
        ("energy", 0.8, 2),
        ("energy", 1, 4),
    ],
)
def test_how_many_ranks_are_kept(method: str, value: float, rank: int) -> None:
    """Of 4, 2, 1, 0.5: sum 7.5, squares 16, 4, 1, 0.25 of 21.25."""
    assert RankRule(4, method, value).rank(torch.tensor([4.0, 2.0, 1.0, 0.5])) == rank


def test_a_lora_is_resized(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    left, right = torch.linalg.qr(torch.randn(6, 3, generator=torch.Generator().manual_seed(4)))[0], torch.eye(3, 5)
    values = torch.tensor([4.0, 2.0, 0.1])
    tensors = {"lora_up.weight": left * values, "lora_down.weight": right, "alpha": torch.tensor(1.5)}
    save_file({f"{SD_KEY}.{name}": tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "a.safetensors")
    flags = ("--model", tmp_path / "a.safetensors", "--save_to", tmp_path / "b.safetensors", "--new_rank", 3)
    run(resize_lora, *flags, "--dynamic_method", "sv_fro", "--dynamic_param", 0.99, "--verbose")
    assert "rank 3 -> 2, 100.0% of the norm" in capsys.readouterr().out
    made = load_file(tmp_path / "b.safetensors")
    assert float(made[f"{SD_KEY}.alpha"]) == 1.0  # alpha / rank stays 1/2
    product = made[f"{SD_KEY}.lora_up.weight"] @ made[f"{SD_KEY}.lora_down.weight"]
    torch.testing.assert_close(product, left[:, :2] * values[:2] @ right[:2], atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match="go together"):
        run(resize_lora, *flags, "--dynamic_param", 0.5)


def test_a_dylora_is_cut(tmp_path: Path) -> None:
    save_file(plain(SD_KEY), tmp_path / "a.safetensors")
    run(extract_lora_from_dylora, "--model", tmp_path / "a.safetensors", "--save_to", tmp_path / "b.safetensors", "--unit", 1)
    made, whole = load_file(tmp_path / "b-0001.safetensors"), plain(SD_KEY)
    assert torch.equal(made[f"{SD_KEY}.lora_up.weight"], whole[f"{SD_KEY}.lora_up.weight"][:, :1])
    assert float(made[f"{SD_KEY}.alpha"]) == pytest.approx(2**0.5)
    assert float(load_file(tmp_path / "b-0002.safetensors")[f"{SD_KEY}.alpha"]) == 2


def test_a_file_is_converted_and_mended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of sd-scripts' split_qkv to ours, to peft's folder in fp16, and back."""
    save_file(split_file(alpha=2.0), tmp_path / "a.safetensors", {"ss_seed": "1", "sshs_model_hash": "old"})
    flags = ("--to", "kohya", "--mend_split_alpha")
    run(convert_lora, tmp_path / "a.safetensors", tmp_path / "b.safetensors", *flags)
    assert "1 fused layers mended" in capsys.readouterr().out
    with safe_open(tmp_path / "b.safetensors", "pt") as file:
        assert file.metadata()["ss_seed"] == "1" and file.metadata()["sshs_model_hash"] != "old"
    run(convert_lora, tmp_path / "b.safetensors", tmp_path / "peft", "--to", "peft", "--save_precision", "fp16")
    # two layers under names that SD3 has, too
    run(convert_lora, tmp_path / "peft", tmp_path / "c.safetensors", "--to", "kohya", "--family", "flux")
    mended, again = (own_layers(load_file(tmp_path / f"{n}.safetensors"), DENOISERS["flux"].arch, "x") for n in "bc")
    key = "lora_unet_double_blocks_0_img_attn_qkv"
    assert float(mended[key]["alpha"]) == 6 and again[key]["lora_up.weight"].dtype == torch.float16
    for key in mended:
        torch.testing.assert_close(delta(again, key), delta(mended, key), atol=1e-2, rtol=1e-2)


def test_sd_scripts_flags_of_converting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = "lora_unet_double_blocks_0_img_attn_proj"
    save_file(plain(key), tmp_path / "a.safetensors")
    path = ROOT / "networks" / "convert_flux_lora.py"
    flags = [
        "--src",
        "sd-scripts",
        "--dst",
        "ai-toolkit",
        "--src_path",
        tmp_path / "a.safetensors",
        "--dst_path",
        tmp_path / "b.safetensors",
    ]
    monkeypatch.setattr(sys, "argv", [str(path), *map(str, flags)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(path), run_name="__main__")
    assert not ended.value.code
    assert "transformer.transformer_blocks.0.attn.to_out.0.lora_A.weight" in load_file(tmp_path / "b.safetensors")


def test_weights_are_checked_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dead = {name: tensor * 0 for name, tensor in plain(TEXT_KEY).items()}
    save_file(plain(SD_KEY) | dead, tmp_path / "a.safetensors")
    run(check_lora_weights, tmp_path / "a.safetensors", "--picture", tmp_path / "a.png", "-s")
    out = capsys.readouterr().out
    assert f"does nothing: {TEXT_KEY}" in out and "2 layers for sd" in out and "lora_up.weight (6, 2)" in out
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    save_file(plain(SD_KEY) | {f"{TEXT_KEY}.lora_up.weight": torch.full((2, 2), float("nan"))}, tmp_path / "b.safetensors")
    with pytest.raises(UserError, match="1 layers have numbers that are not finite"):
        run(check_lora_weights, tmp_path / "b.safetensors")
    assert f"not finite: {TEXT_KEY}" in capsys.readouterr().out


def test_metadata_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file(plain(SD_KEY), tmp_path / "a.safetensors", {"ss_network_args": json.dumps({"conv_dim": 4}), "ss_seed": "1"})
    run(show_metadata, "--model", tmp_path / "a.safetensors")
    out, err = capsys.readouterr()
    assert json.loads(out) == {"ss_network_args": {"conv_dim": 4}, "ss_seed": "1"}
    assert "a LoRA or other adapter; 3 tensors" in err


def test_models_are_merged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unet, clip = "model.diffusion_model.x.weight", "cond_stage_model.transformer.encoder.y.weight"
    spelt = "cond_stage_model.transformer.text_model.encoder.y.weight"
    save_file({unet: torch.ones(2), clip: torch.ones(2), "n": torch.tensor(3)}, tmp_path / "a.safetensors")
    save_file({unet: torch.full((2,), 5.0), spelt: torch.full((2,), 3.0), "z": torch.ones(1)}, tmp_path / "b.safetensors")
    models = ("--models", tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    run(merge_models, *models, "--output", tmp_path / "c", "--show_skipped")
    made = load_file(tmp_path / "c.safetensors")
    assert made.keys() == {unet, spelt, "n"} and made[unet].tolist() == [3, 3] and made[spelt].tolist() == [2, 2]
    assert "left out: z" in capsys.readouterr().out
    flags = ("--ratios", 0.75, 0.75, "--unet_only", "--saving_precision", "fp16", "--output", tmp_path / "d.safetensors")
    run(merge_models, *models, *flags)
    made = load_file(tmp_path / "d.safetensors")
    assert made[unet].tolist() == [4.5, 4.5] and made[spelt].tolist() == [1, 1] and made[unet].dtype == torch.float16
    with pytest.raises(UserError, match=r"1 --ratios for 2 --models"):
        run(merge_models, *models, "--ratios", 1, "--output", tmp_path / "e")


OLD_PLACES = {
    "merge_lora": "--sd_model", "sdxl_merge_lora": "--lbws", "svd_merge_lora": "--new_rank", "flux_merge_lora": "--flux_model",
    "flux_extract_lora": "--clamp_quantile", "extract_lora_from_models": "--min_diff", "resize_lora": "--dynamic_method",
    "check_lora_weights": "--show_all_keys", "extract_lora_from_dylora": "--unit", "merge_lora_old": "--sd_model",
    "convert_flux_lora": "--dst_path",
}  # fmt: skip


@pytest.mark.parametrize("name", OLD_PLACES)
def test_the_places_of_sd_scripts_lead_to_the_tools(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = ROOT / "networks" / f"{name}.py"
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(path), run_name="__main__")
    assert not ended.value.code
    assert OLD_PLACES[name] in capsys.readouterr().out


def test_randomised_extraction_finds_what_the_whole_decomposition_does() -> None:
    generator = torch.Generator().manual_seed(5)
    change = torch.randn(300, 3, generator=generator) @ torch.randn(3, 280, generator=generator)
    change += 1e-3 * torch.randn(300, 280, generator=generator)
    quick, whole = (extracted(change, RankRule(3), "x", exact=exact) for exact in (False, True))
    torch.testing.assert_close(quick.up @ quick.down, whole.up @ whole.down, atol=1e-3, rtol=0)
    limited = clamped(whole, 0.9)
    assert float(limited.up.abs().max()) < float(whole.up.abs().max())
