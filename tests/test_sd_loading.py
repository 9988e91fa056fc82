"""Reading and writing Stable Diffusion models: every format, what files say of themselves, and every way they can be wrong."""

import json
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from library.clip_tokenizer import SD1_TOKENIZER
from library.errors import UserError
from library.key_layout import IDENTITY, KeyMap, Rule
from library.model_io import empty_module, open_checkpoint
from library.model_signatures import detect_keys
from library.module_loading import load_into
from library.option_groups import (
    FullTrainOptions,
    NetworkTrainOptions,
    NoiseOptions,
    PrecisionOptions,
)
from library.sd_train_utils import SdFamily
from library.sd_utils import describe
from tests import tiny

FAMILY = SdFamily()
CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_sd_diffusers(tmp_path_factory.mktemp("folder"))


# ---- sources ---------------------------------------------------------------------------------------------------------


def test_a_source_gives_names_shapes_and_dtypes_before_and_tensors_when_asked(tmp_path: Path):
    tensors = {"a": torch.rand(3, 2).half(), "b": torch.arange(4), "c": torch.tensor(2.0), "empty": torch.zeros(0, 3)}
    tensors["fp8"] = torch.tensor([1.0, -2.0]).to(torch.float8_e4m3fn)
    save_file(tensors, tmp_path / "x.safetensors", metadata={"made": "here"})
    source = open_checkpoint(tmp_path / "x.safetensors")
    assert sorted(source.keys()) == sorted(tensors)
    assert source.shape("a") == (3, 2) and source.dtype("a") == torch.float16
    assert source.metadata == {"made": "here"}
    assert all(torch.equal(source.get(key).float(), value.float()) for key, value in tensors.items())
    assert source.get("a", torch.float32).dtype == torch.float32
    assert source.get("b", torch.float32).dtype == torch.int64


def test_a_tensor_cast_while_it_is_read_equals_one_cast_afterwards(tmp_path: Path):
    large = torch.rand(1100, 1000)  # more than one piece
    save_file({"x": large, "empty": torch.zeros(0)}, tmp_path / "x.safetensors")
    torch.save({"x": large.T, "y": large[5:]}, tmp_path / "x.ckpt")
    source, pickled = open_checkpoint(tmp_path / "x.safetensors"), open_checkpoint(tmp_path / "x.ckpt")
    assert torch.equal(source.get("x", torch.bfloat16), large.bfloat16())
    assert torch.equal(pickled.get("x", torch.float16), large.T.half())
    assert torch.equal(pickled.get("y", torch.float64), large[5:].double())
    assert source.get("empty", torch.float16).dtype == torch.float16


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_checkpoints_are_read_with_views_and_nesting(tmp_path: Path, zipped: bool):
    base = torch.arange(24.0).view(4, 6)
    tensors = {"whole": base, "transposed": base.T, "part": base[1:3, ::2], "scalar": torch.tensor(3.0)}
    path = tmp_path / "x.ckpt"
    torch.save({"state_dict": tensors, "epoch": 3}, path, _use_new_zipfile_serialization=zipped)
    source = open_checkpoint(path)
    assert sorted(source.keys()) == sorted(tensors)
    for key, value in tensors.items():
        assert torch.equal(source.get(key), value)
        assert source.get(key).is_contiguous()
    assert len(source.fingerprint()) == 24


def test_a_checkpoint_that_names_lightnings_callback_class_is_read_without_it(tmp_path: Path):
    module: Any = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": module.__name__})
    parents = {name: types.ModuleType(name) for name in ("pytorch_lightning", "pytorch_lightning.callbacks")}
    sys.modules.update({**parents, module.__name__: module})
    try:
        torch.save(
            {"state_dict": {"a": torch.ones(2)}, "callbacks": {module.ModelCheckpoint: {"best": 1}}}, tmp_path / "x.ckpt"
        )
    finally:
        for name in (*parents, module.__name__):
            del sys.modules[name]
    assert open_checkpoint(tmp_path / "x.ckpt").get("a").tolist() == [1, 1]


def test_any_shard_opens_the_whole_set_and_a_missing_one_is_named(tmp_path: Path):
    for number in (1, 2, 3):
        save_file({f"key{number}": torch.full((2,), float(number))}, tmp_path / f"model-0000{number}-of-00003.safetensors")
    source = open_checkpoint(tmp_path / "model-00002-of-00003.safetensors")
    assert [source.get(f"key{n}")[0].item() for n in (1, 2, 3)] == [1, 2, 3]
    (tmp_path / "model-00003-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match="model-00003-of-00003.safetensors"):
        open_checkpoint(tmp_path / "model-00001-of-00003.safetensors")


def test_a_fingerprint_follows_the_weights_not_the_place(tmp_path: Path):
    tensors = {"a": torch.rand(100, 10), "b": torch.rand(7)}
    for name in ("x", "y"):
        save_file(tensors, tmp_path / f"{name}.safetensors")
    save_file(tensors | {"b": torch.rand(7)}, tmp_path / "z.safetensors")
    x, y, z = (open_checkpoint(tmp_path / f"{name}.safetensors").fingerprint() for name in "xyz")
    assert x == y != z


def test_filling_a_module_is_strict_and_names_all_that_does_not_fit(tmp_path: Path):
    save_file({"weight": torch.ones(2, 3), "more": torch.ones(1)}, tmp_path / "x.safetensors")
    source = open_checkpoint(tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"1 missing: bias; 1 unexpected: more"):
        load_into(empty_module(lambda: nn.Linear(3, 2)), source, IDENTITY)
    with pytest.raises(UserError, match=r"'weight' has shape \(2, 3\).*\(4, 3\)"):
        load_into(empty_module(lambda: nn.Linear(3, 4, bias=False)), source, IDENTITY, optional=("more",))
    module: Any = load_into(
        empty_module(lambda: nn.Linear(3, 2, bias=False)), source, IDENTITY, optional=("more",), dtype=torch.bfloat16
    )
    assert module.weight.dtype == torch.bfloat16 and not module.weight.requires_grad and not module.training


def test_parts_of_a_fused_tensor_do_not_keep_the_whole_of_it(tmp_path: Path):
    save_file({"qkv.weight": torch.rand(6, 4)}, tmp_path / "x.safetensors")
    table = KeyMap((Rule("qkv", ("0", "1", "2")),))
    module: Any = load_into(
        empty_module(lambda: nn.Sequential(*[nn.Linear(4, 2, bias=False) for _ in range(3)])),
        open_checkpoint(tmp_path / "x.safetensors"),
        table,
    )
    assert all(layer.weight.untyped_storage().nbytes() == layer.weight.nbytes for layer in module)


# ---- models in every form --------------------------------------------------------------------------------------------


def test_every_form_of_one_model_loads_to_the_same_weights(tmp_path: Path, sd1: Path, folder: Path, tokenizer: Path):
    paths = [
        sd1,
        folder,
        tiny.write_sd_checkpoint(tmp_path / "a.ckpt"),
        tiny.write_sd_checkpoint(tmp_path / "bare.safetensors", bare_clip=True),
        tiny.write_sd_diffusers(tmp_path / "pickled", safe=False),
    ]
    bundles = [tiny.load_sd(path, tokenizer) for path in paths]
    for name in ("denoiser", "vae", "text_encoder"):
        first, *others = (bundle.part(name).state_dict() for bundle in bundles)
        assert all(tiny.same_tensors(first, other) for other in others)
    assert [bundle.facts["format"] for bundle in bundles] == [
        "safetensors",
        "diffusers_safetensors",
        "ckpt",
        "safetensors",
        "diffusers",
    ]


def test_a_folder_written_by_transformers_4_and_an_old_diffusers_loads(tmp_path: Path, folder: Path):
    tiny.write_sd_diffusers(old := tmp_path / "old")
    text = old / "text_encoder" / "model.safetensors"
    save_file({f"text_model.{key}": value for key, value in load_file(text).items()}, text)
    vae = old / "vae" / "diffusion_pytorch_model.safetensors"
    renames = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(vae)
    for new, name in renames.items():
        tensors = {key.replace(f"attentions.0.{new}.", f"attentions.0.{name}."): value for key, value in tensors.items()}
    save_file(tensors, vae)
    assert any(".proj_attn." in key for key in tensors)
    for part in ("vae", "text_encoder"):
        assert tiny.same_tensors(tiny.load_sd(old).part(part).state_dict(), tiny.load_sd(folder).part(part).state_dict())


def test_a_part_is_read_when_first_used_in_the_dtype_asked_for(sd1: Path, tokenizer: Path):
    chosen = tiny.sd_options(sd1, tokenizer)
    chosen = FullTrainOptions(model=chosen.model, precision=PrecisionOptions(mixed_precision="fp16", no_half_vae=True))
    bundle = FAMILY.load(chosen, device=CPU, dtype=torch.float16)
    assert not any(bundle.loaded(name) for name in ("denoiser", "vae", "text_encoder"))
    assert next(bundle.denoiser.parameters()).dtype == torch.float16
    assert not bundle.loaded("vae")
    assert next(bundle.vae.parameters()).dtype == torch.float32


def vae_as_bare_ldm(path: Path) -> Path:
    save_file(
        {k.removeprefix("first_stage_model."): v for k, v in tiny.sd_ldm_tensors(seed=7).items() if "first_stage" in k}, path
    )
    return path


def vae_as_pickle(path: Path) -> Path:
    tensors = {k.removeprefix("first_stage_model."): v for k, v in tiny.sd_ldm_tensors(seed=7).items() if "first_stage" in k}
    torch.save({"state_dict": tensors | {"loss.logvar": torch.zeros(())}}, path.with_suffix(".pt"))
    return path.with_suffix(".pt")


def vae_as_diffusers_file(path: Path) -> Path:
    save_file(tiny.sd_modules(seed=7)["vae"].state_dict(), path)
    return path


def vae_as_checkpoint(path: Path) -> Path:
    return tiny.write_sd_checkpoint(path, seed=7)


def vae_as_folder(path: Path) -> Path:
    return tiny.write_sd_diffusers(path.with_suffix(""), seed=7) / "vae"


def vae_as_parent_folder(path: Path) -> Path:
    return tiny.write_sd_diffusers(path.with_suffix(""), seed=7)


@pytest.mark.parametrize(
    "write", [vae_as_bare_ldm, vae_as_pickle, vae_as_diffusers_file, vae_as_checkpoint, vae_as_folder, vae_as_parent_folder]
)
def test_another_vae_can_be_given_in_every_form(write: Callable[[Path], Path], tmp_path: Path, sd1: Path, tokenizer: Path):
    path = write(tmp_path / "vae.safetensors")
    bundle = tiny.load_sd(sd1, tokenizer, vae=str(path))
    assert tiny.same_tensors(bundle.vae.state_dict(), tiny.sd_modules(seed=7)["vae"].state_dict())
    assert bundle.identity["vae"] != tiny.load_sd(sd1, tokenizer).identity["vae"]


def test_the_latent_scale_is_what_the_vaes_configuration_says(tmp_path: Path, sd1: Path, tokenizer: Path):
    folder = vae_as_folder(tmp_path / "vae.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"scaling_factor": 0.5}))
    assert FAMILY.latent(tiny.sd_options(sd1, tokenizer, vae=str(folder))).scale == 0.5
    assert FAMILY.latent(tiny.sd_options(sd1, tokenizer)).scale == 0.18215


# ---- what a file says ------------------------------------------------------------------------------------------------


def test_the_version_is_told_from_the_file_and_checked_against_the_flag(sd1: Path, sd2: Path, tokenizer: Path):
    assert describe(tiny.sd_options(sd1).model).version == "v1"
    assert describe(tiny.sd_options(sd2).model).version == "v2"
    FAMILY.check(tiny.sd_options(sd2, tokenizer, v2=True))
    with pytest.raises(UserError, match=r"sd1.safetensors is Stable Diffusion 1.x.*--v2 says 2.x"):
        FAMILY.check(tiny.sd_options(sd1, tokenizer, v2=True))
    with pytest.raises(UserError, match=r"sd2.safetensors is Stable Diffusion 2.x.*--v2 is not set"):
        FAMILY.check(tiny.sd_options(sd2, tokenizer))


@pytest.mark.parametrize(
    ("extra", "metadata", "predicts_v"),
    [
        ({"v_pred": torch.tensor([])}, None, True),
        (None, {"modelspec.prediction_type": "v"}, True),
        (None, {"modelspec.prediction_type": "epsilon"}, False),
        (None, {"modelspec.architecture": "stable-diffusion-v2-768-v"}, True),
        (None, {"modelspec.architecture": "stable-diffusion-v2-512"}, False),
    ],
)
def test_a_prediction_type_that_the_file_states_must_be_the_flags(
    extra: Any, metadata: Any, predicts_v: bool, tmp_path: Path, tokenizer: Path
):
    path = tiny.write_sd_checkpoint(tmp_path / "x.safetensors", extra=extra, metadata=metadata)
    FAMILY.check(tiny.sd_options(path, tokenizer, v_parameterization=predicts_v))
    with pytest.raises(UserError, match=r"x.safetensors predicts .* according to its m.*--v_parameterization"):
        FAMILY.check(tiny.sd_options(path, tokenizer, v_parameterization=not predicts_v))


def test_a_file_that_says_nothing_contradicts_nothing(sd1: Path, tokenizer: Path):
    for chosen in (False, True):
        FAMILY.check(tiny.sd_options(sd1, tokenizer, v_parameterization=chosen))
        assert FAMILY.objective(tiny.sd_options(sd1, tokenizer, v_parameterization=chosen)).v_prediction is chosen


@pytest.mark.parametrize(("said", "refused"), [("v_prediction", False), ("epsilon", True), (None, None)])
def test_a_folders_scheduler_states_the_prediction(said: str | None, refused: bool | None, tmp_path: Path):
    path = tiny.write_sd_diffusers(tmp_path / "m", prediction=said)
    for flag in (False, True):
        if flag is refused:
            with pytest.raises(UserError, match="scheduler_config.json"):
                FAMILY.check(tiny.sd_options(path, v_parameterization=flag))
        else:
            FAMILY.check(tiny.sd_options(path, v_parameterization=flag))


def test_all_contradictions_are_told_at_once(tmp_path: Path, tokenizer: Path):
    path = tiny.write_sd_checkpoint(tmp_path / "x.safetensors", metadata={"modelspec.prediction_type": "epsilon"})
    with pytest.raises(UserError) as caught:
        FAMILY.check(tiny.sd_options(path, tokenizer, v2=True, v_parameterization=True))
    assert "--v2" in str(caught.value) and "--v_parameterization" in str(caught.value)


def test_a_zero_terminal_snr_marker_without_the_flag_is_a_warning(
    tmp_path: Path, tokenizer: Path, caplog: pytest.LogCaptureFixture
):
    path = tiny.write_sd_checkpoint(tmp_path / "x.safetensors", extra={"ztsnr": torch.tensor([])})
    FAMILY.check(FullTrainOptions(model=tiny.sd_options(path, tokenizer).model, noise=NoiseOptions(zero_terminal_snr=True)))
    assert not caplog.records
    FAMILY.check(tiny.sd_options(path, tokenizer))
    assert "--zero_terminal_snr" in caplog.text


@pytest.mark.parametrize(
    ("version", "v", "name", "architecture"),
    [
        ("v1", False, "sd_v1", "stable-diffusion-v1"),
        ("v1", True, "sd_v1_v", "stable-diffusion-v1"),
        ("v2", False, "sd_v2", "stable-diffusion-v2-512"),
        ("v2", True, "sd_v2_v", "stable-diffusion-v2-768-v"),
    ],
)
def test_versions_are_named_as_sd_scripts_names_them(version: str, v: bool, name: str, architecture: str, sd1: Path, sd2: Path):
    chosen = tiny.sd_options(sd1 if version == "v1" else sd2, v2=version == "v2", v_parameterization=v)
    assert FAMILY.base_model_version(chosen) == name
    assert FAMILY.modelspec_architecture(chosen) == architecture


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "family", "script"),
    [
        (
            ["model.diffusion_model.input_blocks.0.0.weight", "model.diffusion_model.label_emb.0.0.weight"],
            "sdxl",
            "sdxl_train_network.py",
        ),
        (
            ["model.diffusion_model.input_blocks.0.0.weight", "conditioner.embedders.0.model.ln_final.weight"],
            "sdxl_refiner",
            "",
        ),
        (["model.diffusion_model.joint_blocks.0.context_block.attn.qkv.weight"], "sd3", "sd3_train_network.py"),
        (["double_blocks.0.img_attn.norm.key_norm.scale"], "flux", "flux_train_network.py"),
        (["double_blocks.0.img_attn.qkv.weight", "distilled_guidance_layer.in_proj.weight"], "chroma", "flux_train_network.py"),
        (["cap_embedder.0.weight", "context_refiner.0.attention.qkv.weight"], "lumina", "lumina_train_network.py"),
        (["double_blocks.0.img_attn_qkv.weight", "byt5_in.fc1.weight"], "hunyuan_image", "hunyuan_image_train_network.py"),
        (["net.blocks.0.self_attn.q_proj.weight", "net.llm_adapter.blocks.0.norm.weight"], "anima", "anima_train_network.py"),
        (["lora_unet_mid_block_attentions_0_proj_in.lora_down.weight"], "lora", ""),
        (["base_model.model.layer.lora_A.weight"], "lora", ""),
        (["first_stage_model.encoder.down.0.block.0.conv1.weight"], "vae", ""),
        (["down_blocks.0.resnets.0.conv1.weight"], "diffusers_part", ""),
    ],
)
def test_a_file_of_another_family_is_refused_with_its_name_and_script(
    keys: list[str], family: str, script: str, tmp_path: Path
):
    found = detect_keys(keys)
    assert found is not None and (found.family, found.script) == (family, script)
    save_file({key: torch.zeros(1) for key in keys}, tmp_path / "other.safetensors")
    with pytest.raises(UserError) as caught:
        FAMILY.check(tiny.sd_options(tmp_path / "other.safetensors"))
    assert found.title in str(caught.value) and script in str(caught.value) and "other.safetensors" in str(caught.value)


def test_a_folder_of_another_family_is_refused(tmp_path: Path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionXLPipeline"}))
    with pytest.raises(UserError, match=r"is SDXL.*sdxl_train_network.py"):
        FAMILY.check(tiny.sd_options(tmp_path))


def test_a_half_written_safetensors_file_is_told_with_both_sizes(tmp_path: Path, sd1: Path):
    whole = sd1.read_bytes()
    for size in (0, 5, 1000, len(whole) - 1):
        path = tmp_path / f"cut{size}.safetensors"
        path.write_bytes(whole[:size])
        with pytest.raises(UserError) as caught:
            FAMILY.check(tiny.sd_options(path))
        assert str(path) in str(caught.value)
        assert f"{size:,}" in str(caught.value) or str(size) in str(caught.value)
    assert f"{len(whole):,}" in str(caught.value)


@pytest.mark.parametrize("size", [0, 100, 100_000])
def test_a_half_written_ckpt_is_told(size: int, tmp_path: Path):
    whole = tiny.write_sd_checkpoint(tmp_path / "whole.ckpt").read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(whole[:size])
    with pytest.raises(UserError, match="cut.ckpt"):
        FAMILY.check(tiny.sd_options(tmp_path / "cut.ckpt"))


class Malicious:
    """Unpickled, it would make a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_pickle_is_refused_and_not_run(zipped: bool, tmp_path: Path):
    path = tmp_path / "evil.ckpt"
    torch.save(
        {"state_dict": {"a": torch.ones(1)}, "x": Malicious(tmp_path / "owned")}, path, _use_new_zipfile_serialization=zipped
    )
    with pytest.raises(UserError, match=r"(?s)evil.ckpt needs code.*Convert it to safetensors"):
        FAMILY.check(tiny.sd_options(path))
    assert not (tmp_path / "owned").exists()


def test_an_inpainting_model_is_refused(tmp_path: Path, tokenizer: Path):
    path = tiny.write_sd_checkpoint(
        tmp_path / "inpaint.safetensors", extra={"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(32, 9, 3, 3)}
    )
    with pytest.raises(UserError, match="an inpainting model .*9 channels"):
        FAMILY.check(tiny.sd_options(path, tokenizer))


def test_a_damaged_layout_names_the_missing_and_the_unexpected_key(tmp_path: Path, tokenizer: Path):
    tensors = tiny.sd_ldm_tensors()
    tensors["model.diffusion_model.strange.weight"] = tensors.pop("model.diffusion_model.out.2.bias")
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"1 missing: model.diffusion_model.out.2.bias; 1 unexpected: .*\.strange.weight"):
        _ = tiny.load_sd(tmp_path / "x.safetensors", tokenizer).denoiser


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nowhere/at/all.safetensors", "no such file"),
        ("someone/some-model", "cannot be reached"),
        ("", "--pretrained_model_name_or_path"),
    ],
)
def test_a_model_that_is_nowhere_says_what_to_do(name: str, words: str):
    with pytest.raises(UserError, match=words):
        FAMILY.check(tiny.sd_options(name))


def test_a_folder_without_a_model_is_told(tmp_path: Path):
    with pytest.raises(UserError, match="model_index.json"):
        FAMILY.check(tiny.sd_options(tmp_path))


def test_a_file_that_is_no_vae_is_refused_as_one(tmp_path: Path, sd1: Path, tokenizer: Path):
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"--vae .*x.safetensors has no VAE.*LoRA"):
        FAMILY.check(tiny.sd_options(sd1, tokenizer, vae=str(tmp_path / "x.safetensors")))


# ---- tokenizers ------------------------------------------------------------------------------------------------------


def test_offline_without_any_tokenizer_the_error_lists_the_four_ways(sd1: Path, tmp_path: Path):
    with pytest.raises(UserError) as caught:
        FAMILY.check(tiny.sd_options(sd1, tokenizer_cache_dir=str(tmp_path)))
    for way in ("--tokenizer FOLDER", "diffusers model folder", "openai_clip-vit-large-patch14", "connection to the hub"):
        assert way in str(caught.value)


def test_tokenizers_are_looked_for_in_order(sd1: Path, folder: Path, tokenizer: Path, tmp_path: Path):
    cached = tiny.write_clip_tokenizer(tmp_path / SD1_TOKENIZER.replace("/", "_"))

    def found(path: Path, **model: Any) -> Path:
        return FAMILY.strategies(tiny.sd_options(path, **model)).tokenize.captions.tokenizer.folder  # type: ignore[attr-defined]

    assert found(sd1, tokenizer_cache_dir=str(tmp_path)) == cached
    assert found(folder, tokenizer_cache_dir=str(tmp_path)) == folder / "tokenizer"
    assert found(folder, tokenizer=tokenizer) == tokenizer
    with pytest.raises(UserError, match="--tokenizer"):
        found(folder, tokenizer=sd1.parent)


def test_network_options_are_enough_to_check(sd1: Path, tokenizer: Path):
    FAMILY.check(NetworkTrainOptions(model=tiny.sd_options(sd1, tokenizer).model))
