"""Names and value formats of what a saved file says about itself."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import replace
from datetime import datetime

import pytest

from library.errors import UserError
from library.metadata import (
    FROM_OPTIONS,
    MINIMUM_KEYS,
    BaseHashes,
    RunFacts,
    as_text,
    at_save,
    full_hash,
    legacy_hash,
    modelspec_metadata,
    network_metadata,
)
from library.option_groups import (
    MetadataOptions,
    NetworkOptions,
    NetworkTrainOptions,
    NoiseOptions,
    OptimizerOptions,
    OutputOptions,
    TrainingOptions,
)

FACTS = RunFacts(
    base_model_version="sd_v1",
    architecture="stable-diffusion-v1",
    v2=False,
    prediction_type="epsilon",
    resolution=(512, 768),
    optimizer="torch.optim.adamw.AdamW(weight_decay=0.1)",
    num_epochs=3,
    max_train_steps=30,
    started_at=1700000000.5,
    session_id=42,
    network_args={"conv_dim": "4"},
)
OPTIONS = NetworkTrainOptions(
    network=NetworkOptions(
        network_module="networks.lora", network_dim=8, network_alpha=4.0, unet_lr=1e-4, text_encoder_lr=(5e-5,)
    ),
    optimizer=OptimizerOptions(learning_rate=1e-4),
    training=TrainingOptions(seed=7),
    output=OutputOptions(output_name="cat"),
)  # fmt: skip
DATA = {"ss_tag_frequency": '{"1_cat": {"cat": 3}}', "ss_num_train_images": "10"}

SD_SCRIPTS_KEYS = set(
    re.findall(
        r"\w+",
        """
        ss_session_id ss_training_started_at ss_output_name ss_learning_rate ss_text_encoder_lr ss_unet_lr ss_num_epochs
        ss_gradient_checkpointing ss_gradient_accumulation_steps ss_max_train_steps ss_lr_warmup_steps ss_lr_scheduler
        ss_network_module ss_network_dim ss_network_alpha ss_network_dropout ss_mixed_precision ss_full_fp16 ss_v2
        ss_base_model_version ss_clip_skip ss_max_token_length ss_cache_latents ss_seed ss_lowram ss_noise_offset
        ss_multires_noise_iterations ss_multires_noise_discount ss_adaptive_noise_scale ss_zero_terminal_snr
        ss_training_comment ss_sd_scripts_commit_hash ss_optimizer ss_max_grad_norm ss_caption_dropout_rate
        ss_caption_dropout_every_n_epochs ss_caption_tag_dropout_rate ss_face_crop_aug_range ss_prior_loss_weight
        ss_min_snr_gamma ss_scale_weight_norms ss_ip_noise_gamma ss_debiased_estimation ss_noise_offset_random_strength
        ss_ip_noise_gamma_random_strength ss_loss_type ss_huber_schedule ss_huber_scale ss_huber_c ss_fp8_base
        ss_fp8_base_unet ss_validation_seed ss_validation_split ss_max_validation_steps ss_validate_every_n_epochs
        ss_validate_every_n_steps ss_resize_interpolation ss_network_args ss_training_finished_at ss_steps ss_epoch
        """,
    )
)


def whole(options: NetworkTrainOptions = OPTIONS) -> dict[str, str]:
    base = BaseHashes(None, None)
    return at_save(options, network_metadata(options, FACTS, DATA, base), step=20, epoch=2, now=1700000100.25)


def test_all_keys_are_there_and_every_value_is_text():
    metadata = whole()
    assert metadata.keys() >= SD_SCRIPTS_KEYS
    assert metadata.keys() - SD_SCRIPTS_KEYS == DATA.keys()
    assert all(isinstance(value, str) for value in metadata.values())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("ss_learning_rate", "0.0001"),
        ("ss_text_encoder_lr", "5e-05"),
        ("ss_network_dim", "8"),
        ("ss_network_alpha", "4.0"),
        ("ss_network_dropout", "None"),
        ("ss_network_args", '{"conv_dim": "4"}'),
        ("ss_seed", "7"),
        ("ss_v2", "False"),
        ("ss_clip_skip", "None"),
        ("ss_session_id", "42"),
        ("ss_training_started_at", "1700000000.5"),
        ("ss_training_finished_at", "1700000100.25"),
        ("ss_steps", "20"),
        ("ss_epoch", "2"),
        ("ss_optimizer", "torch.optim.adamw.AdamW(weight_decay=0.1)"),
        ("ss_max_train_steps", "30"),
        ("ss_tag_frequency", '{"1_cat": {"cat": 3}}'),
    ],
)
def test_values_have_sd_scripts_formats(key, value):
    assert whole()[key] == value


def test_every_option_named_in_the_table_exists():
    for key, path in FROM_OPTIONS.items():
        group, _, name = path.partition(".")
        assert hasattr(getattr(OPTIONS, group), name), key


def test_mappings_become_json_and_a_list_of_one_its_entry():
    assert [as_text(value) for value in (None, True, 1e-5, (0.1,), (0.1, 0.2), {"a": None})] == [
        "None", "True", "1e-05", "0.1", "[0.1, 0.2]", '{"a": null}',
    ]  # fmt: skip


def test_no_metadata_leaves_what_loading_needs():
    options = replace(OPTIONS, output=replace(OPTIONS.output, no_metadata=True))
    assert whole(options).keys() == set(MINIMUM_KEYS)
    assert modelspec_metadata(options, FACTS, "LoRA")["modelspec.architecture"] == "stable-diffusion-v1/lora"


def test_no_key_for_network_args_that_were_not_given():
    metadata = network_metadata(OPTIONS, replace(FACTS, network_args=None), {}, BaseHashes(None, None))
    assert "ss_network_args" not in metadata


# ---- modelspec -----------------------------------------------------------------------------------------------------------


def test_modelspec_of_a_network():
    assert modelspec_metadata(OPTIONS, FACTS, "LoRA", now=1700000000.9) == {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": "cat",
        "modelspec.resolution": "512x768",
        "modelspec.date": datetime.fromtimestamp(1700000000).isoformat(),
        "modelspec.prediction_type": "epsilon",
    }


def test_modelspec_of_a_checkpoint_with_everything(tmp_path):
    picture = tmp_path / "thumb.png"
    picture.write_bytes(b"png bytes")
    options = NetworkTrainOptions(
        training=TrainingOptions(clip_skip=2),
        noise=NoiseOptions(min_timestep=100),
        metadata=MetadataOptions(
            metadata_title="Cats", metadata_author="me", metadata_tags="a,b", metadata_thumbnail=str(picture),
            metadata_trigger_phrase="ohwx cat",
        ),
    )  # fmt: skip
    facts = replace(FACTS, architecture="stable-diffusion-v2-768-v", prediction_type="v")
    found = modelspec_metadata(options, facts, "Checkpoint", now=0)
    expected = {
        "architecture": "stable-diffusion-v2-768-v",
        "implementation": "https://github.com/Stability-AI/generative-models",
        "title": "Cats",
        "author": "me",
        "tags": "a,b",
        "trigger_phrase": "ohwx cat",
        "prediction_type": "v",
        "encoder_layer": "2",
        "timestep_range": "100,1000",
        "thumbnail": "data:image/png;base64," + base64.b64encode(b"png bytes").decode(),
    }
    assert {key: found[f"modelspec.{key}"] for key in expected} == expected


def test_a_title_is_made_of_kind_and_time_where_there_is_no_name():
    assert modelspec_metadata(NetworkTrainOptions(), FACTS, "LoRA", now=12.5)["modelspec.title"] == "LoRA@12.5"


@pytest.mark.parametrize(("name", "message"), [("missing.png", "cannot be read"), ("model.safetensors", "expected a picture")])
def test_a_thumbnail_that_cannot_be_used_is_an_error(tmp_path, name, message):
    options = NetworkTrainOptions(metadata=MetadataOptions(metadata_thumbnail=str(tmp_path / name)))
    with pytest.raises(UserError, match=message):
        modelspec_metadata(options, FACTS, "LoRA")


# ---- the base model --------------------------------------------------------------------------------------------------------


def test_hashes_of_a_file_are_those_of_sd_scripts(tmp_path):
    content = bytes(range(256)) * 8192  # 2 MiB
    (tmp_path / "base.safetensors").write_bytes(content)
    part = hashlib.sha256(content[0x100000 : 0x100000 + 0x10000]).hexdigest()[:8]
    assert legacy_hash(tmp_path / "base.safetensors") == part
    assert full_hash(tmp_path / "base.safetensors") == hashlib.sha256(content).hexdigest()
    assert BaseHashes(str(tmp_path / "base.safetensors"), None).result() == {
        "ss_sd_model_name": "base.safetensors",
        "ss_sd_model_hash": part,
        "ss_new_sd_model_hash": hashlib.sha256(content).hexdigest(),
    }


def test_a_hub_id_has_a_name_only_and_a_folder_no_hash(tmp_path):
    assert BaseHashes("someone/model", str(tmp_path)).result() == {
        "ss_sd_model_name": "someone/model",
        "ss_vae_name": tmp_path.name,
        "ss_vae_hash": "IsADirectory",
        "ss_new_vae_hash": "IsADirectory",
    }


def test_nothing_is_read_without_metadata(tmp_path):
    assert BaseHashes(str(tmp_path), None, skip=True).result() == {}


def test_metadata_can_be_written_to_a_safetensors_header(tmp_path):
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    metadata = {**whole(), **modelspec_metadata(OPTIONS, FACTS, "LoRA")}
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors", metadata)
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert json.loads(file.metadata()["ss_network_args"]) == {"conv_dim": "4"}
