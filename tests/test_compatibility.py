"""What a user of sd-scripts brings along, unchanged: command lines, configuration files, folders and LoRA files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import runs
import tiny
import torch
from runs import CASES, Workspace
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import fine_tune
import train_db
import train_network

METADATA = """
ss_session_id ss_training_started_at ss_training_finished_at ss_output_name ss_learning_rate
ss_text_encoder_lr ss_unet_lr
ss_num_train_images ss_num_validation_images ss_num_reg_images ss_num_batches_per_epoch ss_num_epochs ss_epoch ss_steps
ss_gradient_checkpointing ss_gradient_accumulation_steps ss_max_train_steps ss_lr_warmup_steps ss_lr_scheduler
ss_network_module ss_network_dim ss_network_alpha ss_network_dropout ss_network_args ss_mixed_precision ss_full_fp16
ss_v2
ss_base_model_version ss_clip_skip ss_max_token_length ss_cache_latents ss_seed ss_lowram ss_noise_offset
ss_multires_noise_iterations ss_multires_noise_discount ss_adaptive_noise_scale ss_zero_terminal_snr ss_training_comment
ss_sd_scripts_commit_hash ss_optimizer ss_max_grad_norm ss_caption_dropout_rate ss_caption_dropout_every_n_epochs
ss_caption_tag_dropout_rate ss_face_crop_aug_range ss_prior_loss_weight ss_min_snr_gamma ss_scale_weight_norms
ss_ip_noise_gamma ss_debiased_estimation ss_noise_offset_random_strength ss_ip_noise_gamma_random_strength ss_loss_type
ss_huber_schedule ss_huber_scale ss_huber_c ss_fp8_base ss_fp8_base_unet ss_validation_seed ss_validation_split
ss_max_validation_steps ss_validate_every_n_epochs ss_validate_every_n_steps ss_resize_interpolation
ss_sd_model_name ss_sd_model_hash ss_new_sd_model_hash ss_tag_frequency ss_dataset_dirs sshs_model_hash sshs_legacy_hash
modelspec.sai_model_spec modelspec.architecture modelspec.implementation modelspec.title modelspec.resolution
modelspec.date modelspec.prediction_type
"""
"""Keys of every network that sd-scripts saves with `--network_args`, for one of SD 1.x without a VAE of its own."""

FROM_FOLDERS = """
ss_batch_size_per_device ss_total_batch_size ss_resolution ss_color_aug ss_flip_aug ss_random_crop ss_shuffle_caption
ss_enable_bucket ss_bucket_no_upscale ss_min_bucket_reso ss_max_bucket_reso ss_keep_tokens
ss_reg_dataset_dirs ss_bucket_info
"""
"""Further ones where the data came from `--train_data_dir`."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What lies on such a user's disk: a model file, tokenizers kept for offline use, and `N_class` folders."""
    folder = tmp_path_factory.mktemp("home")
    tiny.write_sd_checkpoint(folder / "models" / "v1-5.safetensors", version="v1")
    tiny.write_clip_tokenizer(folder / "tokenizers" / "openai_clip-vit-large-patch14")
    tiny.write_images(folder / "train" / "2_sks thing", 3, (96, 80))
    tiny.write_images(folder / "reg" / "1_thing", 2, (64, 96), captions=False)
    return folder


def saved(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a network file."""
    with safe_open(path, "pt") as file:
        return dict(file.metadata()), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def tags(folder: Path) -> set[str]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = folder.rglob("events.out.tfevents*")
    return set(EventAccumulator(str(events.parent)).Reload().Tags()["scalars"])


DATASET = """
[general]
shuffle_caption = true
caption_extension = '.txt'
caption_separator = ','
keep_tokens = 1
keep_tokens_separator = "|||"
enable_bucket = true
caption_tag_dropout_rate = 0.1

[[datasets]]
resolution = [64, 64]
batch_size = 2
min_bucket_reso = 32
max_bucket_reso = 100
bucket_reso_steps = 32
bucket_no_upscale = false
network_multiplier = 1.0
resize_interpolation = 'lanczos'

  [[datasets.subsets]]
  image_dir = '{home}/train/2_sks thing'
  class_tokens = 'sks thing'
  num_repeats = 2
  flip_aug = true
  caption_prefix = 'photo,'
  caption_suffix = 'fine'
  secondary_separator = ';;'
  enable_wildcard = true
  token_warmup_min = 1
  token_warmup_step = 0.5
  caption_dropout_rate = 0.05
  caption_dropout_every_n_epochs = 0
  color_aug = false
  random_crop = false

  [[datasets.subsets]]
  is_reg = true
  image_dir = '{home}/reg/1_thing'
  class_tokens = 'thing'
  keep_tokens = 2
  cache_info = false
"""

RUN = """
[model_arguments]
v2 = false
v_parameterization = false

[optimizer_arguments]
optimizer_type = "AdamW"
optimizer_args = ["weight_decay=0.01", "betas=0.9,0.99"]
learning_rate = 1e-3
unet_lr = 1e-3
text_encoder_lr = 5e-4
lr_scheduler = "cosine_with_restarts"
lr_scheduler_num_cycles = 2
lr_warmup_steps = 0.1

[training_arguments]
max_train_steps = 1600
noise_offset = 0.05
min_snr_gamma = 5
gradient_checkpointing = true
"""


def test_a_lora_command_line_with_both_configuration_files_trains_unchanged(home: Path, tmp_path: Path) -> None:
    (tmp_path / "dataset.toml").write_text(DATASET.replace("{home}", home.as_posix()))
    (tmp_path / "run.toml").write_text(RUN)
    (tmp_path / "prompts.txt").write_text("# previews\n(sks:1.2) thing --n bad --w 64 --h 64 --d 1 --l 7.5 --s 2\n")
    train_network.main(
        [
            f"--config_file={tmp_path / 'run'}", f"--dataset_config={tmp_path / 'dataset.toml'}",
            f"--pretrained_model_name_or_path={home / 'models' / 'v1-5.safetensors'}",
            f"--tokenizer_cache_dir={home / 'tokenizers'}",
            "--output_dir", str(tmp_path / "out"), "--output_name", "style", "--save_model_as", "safetensors",
            "--save_precision", "fp16", "--mixed_precision", "no", "--save_every_n_steps", "1", "--save_last_n_steps", "2",
            "--save_state", "--network_module", "networks.lora", "--network_dim", "8", "--network_alpha", "4",
            "--network_args", "conv_dim=4", "conv_alpha=1", "rank_dropout=0.1", "loraplus_unet_lr_ratio=4",
            "--scale_weight_norms", "1", "--prior_loss_weight=0.8", "--weighted_captions", "--max_token_length=150",
            "--clip_skip=2", "--cache_latents_to_disk", "--vae_batch_size=2", "--max_grad_norm=1.0",
            "--loss_type=huber", "--huber_c=0.1", "--multires_noise_iterations=6", "--ip_noise_gamma=0.1",
            "--max_train_steps=2", "--max_data_loader_n_workers=0", "--persistent_data_loader_workers", "--seed=42",
            "--sdpa", "--lowram", "--training_comment=mine", "--metadata_author=me",
            "--logging_dir", str(tmp_path / "logs"), "--log_prefix=style", "--sample_prompts", str(tmp_path / "prompts.txt"),
            "--sample_every_n_steps=2", "--sample_sampler=euler_a",
        ]
    )  # fmt: skip
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} >= {
        "style-step00000001.safetensors", "style-step00000001-state", "style-step00000002-state", "style.safetensors",
        "style-state",
    }  # fmt: skip
    assert [path.name[:15] for path in (out / "sample").iterdir()] == ["style_000002_00"]
    latents = home / "train" / "2_sks thing"
    assert [path.name for path in sorted(latents.glob("*.npz"))] == [f"00{n}_0096x0080_sd.npz" for n in range(3)]

    metadata, tensors = saved(out / "style.safetensors")
    missing = [key for key in [*METADATA.split(), "ss_datasets"] if key not in metadata]
    assert missing == []
    assert metadata["ss_text_encoder_lr"] == "0.0005"
    assert metadata["ss_cache_latents"] == "True"  # also where only --cache_latents_to_disk was given
    assert metadata["ss_optimizer"] == "torch.optim.adamw.AdamW(weight_decay=0.01,betas=(0.9, 0.99))"
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"], metadata["ss_v2"]) == ("8", "4.0", "False")
    assert (metadata["ss_num_train_images"], metadata["ss_num_reg_images"], metadata["ss_num_epochs"]) == ("6", "2", "1")
    assert json.loads(metadata["ss_dataset_dirs"]) == {"2_sks thing": {"n_repeats": 2, "img_count": 3}}
    (dataset,) = json.loads(metadata["ss_datasets"])
    assert dataset["subsets"][1]["is_reg"] is True and dataset["max_bucket_reso"] == 100
    assert sum(bucket["count"] for bucket in dataset["bucket_info"]["buckets"].values()) == 12  # reg images fill up to 6
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    conv = "lora_unet_down_blocks_0_resnets_0_conv1"
    assert tensors[f"{conv}.lora_down.weight"].shape[0] == 4 and tensors[f"{conv}.alpha"] == 1
    query = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    assert tensors[f"{query}.lora_down.weight"].shape[0] == 8 and tensors[f"{query}.alpha"] == 4
    (folder,) = (tmp_path / "logs").iterdir()
    assert folder.name.startswith("style2") and (folder / "network_train").is_dir()
    assert tags(folder) >= {
        "loss/current", "loss/average", "lr/textencoder", "lr/unet", "lr/unet plus", "max_norm/keys_scaled",
        "max_norm/max_key_norm", "norm/avg_key_norm",
    }  # fmt: skip


INTERFACE = """
bucket_no_upscale = true
bucket_reso_steps = 32
caption_extension = ".txt"
clip_skip = 1
dynamo_backend = "no"
enable_bucket = true
epoch = 1
gradient_accumulation_steps = 2
huber_c = 0.1
huber_schedule = "snr"
ip_noise_gamma_random_strength = true
loss_type = "l2"
lr_scheduler = "constant"
lr_scheduler_args = []
lr_scheduler_num_cycles = 1
lr_scheduler_power = 1
max_bucket_reso = 2048
max_data_loader_n_workers = 0
max_grad_norm = 1
max_timestep = 1000
max_token_length = 75
max_train_epochs = 1
min_bucket_reso = 32
mixed_precision = "bf16"
network_alpha = 1
network_args = []
network_dim = 4
network_module = "networks.lora"
network_train_unet_only = true
noise_offset_type = "Original"
optimizer_args = []
optimizer_type = "AdamW"
output_name = "last"
persistent_data_loader_workers = 1
prior_loss_weight = 1
resolution = "64,64"
sample_sampler = "euler_a"
save_every_n_epochs = 1
save_model_as = "safetensors"
save_precision = "bf16"
stop_text_encoder_training = 1
train_batch_size = 2
unet_lr = 0.001
"""
"""As the most used graphical front end writes it, dead keys and whole numbers for switches included."""


def test_the_file_of_a_graphical_front_end_trains_the_folders_it_names(home: Path, tmp_path: Path) -> None:
    paths = {
        "pretrained_model_name_or_path": home / "models" / "v1-5.safetensors",
        "train_data_dir": home / "train",
        "reg_data_dir": home / "reg",
        "output_dir": tmp_path / "out",
        "tokenizer_cache_dir": home / "tokenizers",
    }
    lines = "".join(f"{key} = '{path.as_posix()}'\n" for key, path in paths.items())
    (tmp_path / "config_lora.toml").write_text(INTERFACE + lines)
    train_network.main(["--config_file", str(tmp_path / "config_lora.toml")])
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors")] == ["last.safetensors"]  # the last epoch once
    metadata, tensors = saved(tmp_path / "out" / "last.safetensors")
    missing = [key for key in (METADATA + FROM_FOLDERS).split() if key not in metadata and key != "ss_network_args"]
    assert missing == []
    assert json.loads(metadata["ss_reg_dataset_dirs"]) == {"1_thing": {"n_repeats": 1, "img_count": 2}}
    assert json.loads(metadata["ss_tag_frequency"])["1_thing"] == {"thing": 2}
    assert (metadata["ss_resolution"], metadata["ss_total_batch_size"], metadata["ss_epoch"]) == ("(64, 64)", "4", "1")
    assert int(metadata["ss_max_train_steps"]) == -(-int(metadata["ss_num_batches_per_epoch"]) // 2)
    assert not any(key.startswith("lora_te") for key in tensors)


def test_a_dreambooth_command_line_trains_unchanged(home: Path, tmp_path: Path) -> None:
    train_db.main(
        [
            f"--pretrained_model_name_or_path={home / 'models' / 'v1-5.safetensors'}",
            f"--tokenizer_cache_dir={home / 'tokenizers'}", f"--train_data_dir={home / 'train'}",
            f"--reg_data_dir={home / 'reg'}", f"--output_dir={tmp_path}", "--output_name=db", "--resolution=64",
            "--train_batch_size=2", "--learning_rate=1e-5", "--learning_rate_te=5e-6", "--max_train_steps=2",
            "--stop_text_encoder_training=1", "--prior_loss_weight=1.0", "--save_precision=fp16", "--save_model_as=ckpt",
            "--enable_bucket", "--min_bucket_reso=64", "--max_bucket_reso=128", "--max_data_loader_n_workers=0",
            "--mem_eff_attn", "--save_every_n_steps=1", "--caption_extention=.txt",
        ]
    )  # fmt: skip
    assert {path.name for path in tmp_path.glob("*.ckpt")} == {"db-step00000001.ckpt", "db-step00000002.ckpt", "db.ckpt"}
    weights = torch.load(tmp_path / "db.ckpt", weights_only=True)["state_dict"]
    assert weights["model.diffusion_model.time_embed.0.weight"].dtype == torch.float16


def test_a_fine_tuning_command_line_takes_its_buckets_from_the_metadata_file(home: Path, tmp_path: Path) -> None:
    entries = {f"00{n}": {"caption": "a thing", "tags": "red, round", "train_resolution": [64, 96]} for n in range(3)}
    (tmp_path / "meta_lat.json").write_text(json.dumps(entries))
    fine_tune.main(
        [
            f"--pretrained_model_name_or_path={home / 'models' / 'v1-5.safetensors'}",
            f"--tokenizer_cache_dir={home / 'tokenizers'}", f"--in_json={tmp_path / 'meta_lat.json'}",
            f"--train_data_dir={home / 'train' / '2_sks thing'}", f"--output_dir={tmp_path / 'out'}",
            "--dataset_repeats=2", "--train_batch_size=2", "--learning_rate=5e-6", "--max_train_epochs=1", "--shuffle_caption",
            "--caption_dropout_rate=0.1", "--use_safetensors", "--max_data_loader_n_workers=0",
            "--train_text_encoder", "--debiased_estimation_loss", "--logging_dir", str(tmp_path / "logs"),
        ]
    )  # fmt: skip
    assert saved(tmp_path / "out" / "last.safetensors")[0]["modelspec.resolution"] == "64x96"
    assert tags(tmp_path / "logs") >= {"loss/current", "loss/average", "lr/unet", "lr/textencoder"}


# LoRA files of other programs


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return runs.make_workspace(CASES["sd"], tmp_path_factory.mktemp("workspace"))


def sd_scripts_layers() -> Iterator[tuple[str, nn.Linear | nn.Conv2d]]:
    """Names as sd-scripts spells them, from its rules and not from our tables: every Linear and 1x1 convolution inside the
    UNet's transformers, and the text encoder's attention and feed-forward layers."""
    modules = tiny.sd_modules("v1")
    for name, module in modules["denoiser"].named_modules():
        if "attentions." in name and isinstance(module, nn.Linear | nn.Conv2d):
            yield f"lora_unet_{name}".replace(".", "_"), module
    encoder = {name.removeprefix("text_model."): module for name, module in modules["text_encoder"].named_modules()}
    for number in range(sum(name.endswith("self_attn.q_proj") for name in encoder)):
        layer = f"encoder.layers.{number}"
        for inner in [*(f"self_attn.{part}_proj" for part in ("q", "k", "v", "out")), "mlp.fc1", "mlp.fc2"]:
            found = encoder[f"{layer}.{inner}"]
            assert isinstance(found, nn.Linear)
            yield f"lora_te_text_model_{layer}.{inner}".replace(".", "_"), found


def hand_made(rank: int, alpha: float | None, only: str = "lora_") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for key, module in sd_scripts_layers():
        if not key.startswith(only):
            continue
        wide, ends = (module.in_channels, (1, 1)) if isinstance(module, nn.Conv2d) else (module.in_features, ())
        tall = module.weight.shape[0]
        tensors[f"{key}.lora_down.weight"] = torch.randn(rank, wide, *ends, generator=generator).half()
        tensors[f"{key}.lora_up.weight"] = torch.randn(tall, rank, *ends, generator=generator).half()
        if alpha is not None:
            tensors[f"{key}.alpha"] = torch.tensor(alpha)
    return tensors


@pytest.mark.parametrize(
    ("name", "alpha", "only"), [("new.safetensors", 2.0, "lora_"), ("old.pt", None, "lora_"), ("unet.ckpt", 2.0, "lora_unet_")]
)
def test_training_goes_on_from_a_lora_file_of_sd_scripts(
    workspace: Workspace, tmp_path: Path, name: str, alpha: float | None, only: str
) -> None:
    tensors, file = hand_made(4, alpha, only), tmp_path / name
    if file.suffix == ".safetensors":
        save_file(tensors, file)
    else:
        torch.save(tensors, file)
    trainer = workspace.trainer("network", tmp_path / "out", f"--network_weights={file}", "--network_dim=4")
    own = trainer.trainable.state_dict()
    assert {key.rpartition(".lora_")[0] for key in own if "lora_up" in key} == {key for key, _ in sd_scripts_layers()}
    for key, given in tensors.items():
        assert torch.equal(own[key].to(given.dtype), given), key
    query = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    up, down = tensors[f"{query}.lora_up.weight"].float(), tensors[f"{query}.lora_down.weight"].float()
    layer = trainer.bundle.denoiser.get_submodule("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q")
    x = torch.randn(3, down.shape[1], generator=torch.Generator().manual_seed(2))
    assert isinstance(layer, nn.Linear)
    expected = x @ layer.weight.T + (x @ down.T @ up.T) * ((alpha or 4) / 4)  # a file without alpha: that of its rank
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
