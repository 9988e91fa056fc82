"""Options: where a value comes from, what is said about a wrong one, and that no flag or default changes unnoticed."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from library.config_file import parse_toml
from library.errors import UserError
from library.option_groups import DreamBoothOptions, FineTuneOptions, NetworkTrainOptions, steps_or_ratio
from library.option_groups_attention import ATTENTION_BACKENDS
from library.option_groups_data import size_text
from library.option_rules import RULES, check_rules
from library.options import build_parser, flags_of, flat, from_flags, opt, parse, to_toml, with_flags
from tools import make_options_page

ROOT = Path(__file__).resolve().parent.parent
CONTAINERS = list(make_options_page.SCRIPTS.values())


def network(*argv: str) -> NetworkTrainOptions:
    return parse(NetworkTrainOptions, list(argv))


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def problem(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as info:
        call()
    return str(info.value)


def good(tmp_path: Path, **given: Any) -> NetworkTrainOptions:
    """Options no rule objects to, and no warning is made for."""
    base = {
        "pretrained_model_name_or_path": "model",
        "output_dir": "out",
        "train_data_dir": tmp_path,
        "resolution": 512,
        "learning_rate": 1e-4,
        "network_module": "networks.lora",
    }
    return from_flags(NetworkTrainOptions, **{**base, **given})


# Where a value comes from


def test_the_command_line_goes_before_the_file_and_the_file_before_the_default(tmp_path: Path) -> None:
    config = write(tmp_path / "run.toml", "[a]\nnetwork_dim = 8\nnetwork_alpha = 2\n")
    options = network("--config_file", config, "--network_dim=16")
    assert (options.network.network_dim, options.network.network_alpha, options.network.network_dropout) == (16, 2.0, None)
    assert options.explicit == {"config_file", "network_dim", "network_alpha"}


@pytest.mark.parametrize("in_file", [True, False])
@pytest.mark.parametrize("on_command_line", [True, False])
def test_a_switch_can_be_turned_on_and_off_over_a_file(tmp_path: Path, in_file: bool, on_command_line: bool) -> None:
    config = write(tmp_path / "run.toml", f"flip_aug = {str(in_file).lower()}")
    options = network("--config_file", config, "--flip_aug" if on_command_line else "--no-flip_aug")
    assert options.data.flip_aug is on_command_line
    assert network("--config_file", config).data.flip_aug is in_file


@pytest.mark.parametrize("unset", ["--no-vae", "--vae="])
def test_an_option_without_default_can_be_unset_over_a_file(tmp_path: Path, unset: str) -> None:
    config = write(tmp_path / "run.toml", "vae = 'other'")
    assert network("--config_file", config).model.vae == "other"
    assert network("--config_file", config, unset).model.vae is None


def test_the_train_db_default_is_to_train_the_text_encoder_and_the_fine_tune_default_is_not_to() -> None:
    dreambooth, fine_tune = DreamBoothOptions(), FineTuneOptions()
    assert dreambooth.full.trains_text_encoder and not fine_tune.full.trains_text_encoder
    for steps, trains in ((-1, False), (0, False), (5, True)):
        assert from_flags(DreamBoothOptions, stop_text_encoder_training=steps).full.trains_text_encoder is trains
    assert not parse(DreamBoothOptions, ["--no-train_text_encoder"]).full.trains_text_encoder
    assert parse(FineTuneOptions, ["--train_text_encoder"]).full.trains_text_encoder


def test_the_old_spelling_of_caption_extension_works_everywhere(tmp_path: Path) -> None:
    config = write(tmp_path / "run.toml", "caption_extention = '.tag'")
    assert network("--config_file", config).data.caption_extension == ".tag"
    assert network("--caption_extention", ".tag").explicit == {"caption_extension"}


def test_negative_numbers_and_lists_are_read_from_the_command_line() -> None:
    options = network(
        "--text_encoder_lr", "1e-5", "2e-5", "--network_args", "conv_dim=4", "conv_alpha=1", "--noise_offset", "-0.1"
    )
    assert options.network.text_encoder_lr == (1e-5, 2e-5)
    assert options.network.network_args == ("conv_dim=4", "conv_alpha=1")
    assert options.noise.noise_offset == -0.1


# Files


FORMS = {
    "toml": "seed = 3\n[x]\nlearning_rate = 1e-4\nnetwork_args = ['a=1', 'b=2']\n[y]\nflip_aug = true\n",
    "yaml": "seed: 3\nx:\n  learning_rate: 1e-4\n  network_args: [a=1, b=2]\ny:\n  flip_aug: true\n",
    "yml": "seed: 3\nlearning_rate: 0.0001\nnetwork_args: [a=1, b=2]\nflip_aug: true\n",
    "json": '{"seed": 3, "x": {"learning_rate": 1e-4, "network_args": ["a=1", "b=2"]}, "y": {"flip_aug": true}}',
}


@pytest.mark.parametrize("suffix", FORMS)
@pytest.mark.parametrize("with_suffix", [True, False])
def test_every_file_format_is_flattened_and_its_suffix_may_be_left_out(tmp_path: Path, suffix: str, with_suffix: bool) -> None:
    write(tmp_path / f"run.{suffix}", FORMS[suffix])
    options = network("--config_file", str(tmp_path / (f"run.{suffix}" if with_suffix else "run")))
    assert options.training.seed == 3
    assert options.optimizer.learning_rate == 1e-4
    assert options.network.network_args == ("a=1", "b=2")
    assert options.data.flip_aug


def test_yaml_interpolates_also_from_values_that_are_no_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUN_NAME", "blue")
    text = "_at:\n  root: /data\nout:\n  output_name: ${oc.env:RUN_NAME}\n  output_dir: ${_at.root}/${out.output_name}\n"
    options = network("--config_file", write(tmp_path / "run.yaml", text))
    assert options.output.output_dir == "/data/blue"


@pytest.mark.parametrize(
    ("value", "expected"),
    [("10%", 0.1), ("0.25", 0.25), ("0", 0), ("100", 100), (0.05, 0.05), (100, 100), (50.0, 50)],
)
def test_warmup_is_a_count_a_ratio_or_a_percentage(value: Any, expected: float) -> None:
    assert steps_or_ratio(value) == expected
    assert type(steps_or_ratio(value)) is type(expected)


@pytest.mark.parametrize("value", ["many", "1.5", -1, True, "-3", [1]])
def test_other_warmups_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="expected a number of steps"):
        steps_or_ratio(value)


@pytest.mark.parametrize("value", ["512,768", [512, 768], (512, 768), "512, 768"])
def test_a_resolution_may_be_text_or_a_list(value: Any) -> None:
    assert size_text(value) == "512,768"
    assert size_text(512) == "512"
    assert "resolution" in problem(lambda: from_flags(NetworkTrainOptions, resolution=[1, 2, 3]))


def test_values_gui_programs_write_for_nothing_mean_nothing() -> None:
    options = from_flags(
        NetworkTrainOptions, vae="", network_args=[], text_encoder_lr=[], sample_every_n_steps=0, max_token_length=75
    )
    assert options.model.vae is options.network.network_args is options.network.text_encoder_lr is None
    assert options.sampling.sample_every_n_steps is None
    assert from_flags(NetworkTrainOptions, text_encoder_lr=5e-5).network.text_encoder_lr == (5e-5,)
    numbers = from_flags(NetworkTrainOptions, persistent_data_loader_workers=1, save_n_epoch_ratio=0, save_every_n_epochs=2.0)
    assert numbers.training.persistent_data_loader_workers is True
    assert numbers.output.save_every_n_epochs == 2
    assert "flip_aug" in problem(lambda: from_flags(NetworkTrainOptions, flip_aug=2))
    assert "network_dim" in problem(lambda: from_flags(NetworkTrainOptions, network_dim=4.5))


def test_keys_that_only_another_program_writes_are_left_out_with_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = 'epoch = 10\nnoise_offset_type = "Original"\nseed = 3\nstop_text_encoder_training = 5\n'
    file = write(tmp_path / "gui.toml", text)
    assert network(f"--config_file={file}").training.seed == 3
    assert "no effect, as in sd-scripts: epoch, noise_offset_type, stop_text_encoder_training" in caplog.text
    full = parse(DreamBoothOptions, [f"--config_file={file}"])
    assert full.full.stop_text_encoder_training == 5  # there it is an option


# What is said about a wrong value


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--lerning_rate", "1"], ["unknown option '--lerning_rate'. Did you mean '--learning_rate'?"]),
        (["--lerning_rate=1", "--flip_augg"], ["--lerning_rate", "--learning_rate", "--flip_augg", "'--flip_aug'"]),
        (
            ["--lerning_rate=1", "--seed=x", "--network_dim=y"],
            ["'--learning_rate'", "--seed: expected", "--network_dim: expected"],
        ),
        (["--learning-rate=1"], ["Did you mean '--learning_rate'"]),
        (["--learn=1"], ["unknown option '--learn'"]),
        (["--network_dim=x"], ["--network_dim", "expected a whole number, got 'x'"]),
        (["--network_dim=1.5"], ["--network_dim", "expected a whole number, got '1.5'"]),
        (["--learning_rate=nan"], ["--learning_rate", "finite"]),
        (["--mixed_precision=bf61"], ["'bf61' is not one of no, fp16, bf16", "Did you mean 'bf16'"]),
        (["--max_token_length=80"], ["80 is not one of 75, 150, 225"]),
        (["--seed"], ["--seed", "expected one argument"]),
        (["--flip_aug=1"], ["--flip_aug", "a switch takes no value"]),
        (["--flip_aug", "true"], ["unexpected value 'true'", "--no-flag"]),
        (["--config_file=nowhere"], ["nowhere.toml", "nowhere.yaml", "not found"]),
        (["--output_config"], ["--output_config needs --config_file"]),
    ],
)
def test_a_wrong_command_line_is_named_in_one_message(argv: list[str], says: list[str]) -> None:
    message = problem(lambda: network(*argv))
    assert [part for part in says if part not in message] == []
    assert "usage" not in message


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.toml", "[x]\nnetwork_dimm = 4\nflip = 1", ["a.toml", "network_dimm", "Did you mean 'network_dim'", "'flip'"]),
        ("a.toml", "learning_rate = '1e-4'", ["a.toml: learning_rate: expected a number, got '1e-4' (str)"]),
        ("a.toml", "flip_aug = 2", ["a.toml: flip_aug: expected true or false, got 2 (int)"]),
        ("a.toml", "seed = true", ["seed: expected a whole number, got True (bool)"]),
        ("a.toml", "output_name = 3", ["output_name: expected text, got 3"]),
        ("a.toml", "network_args = [1]", ["network_args: expected a list of texts, got 1"]),
        ("a.toml", "[a]\n[a.b]\nseed = 1", ["unknown key 'b'"]),
        ("a.toml", "[a]\nseed = 1\n[b]\nseed = 2", ["seed is given twice: 1 in [a], 2 in [b]"]),
        ("a.toml", "a = [1, 2", ["a.toml", "not valid TOML"]),
        ("a.toml", "seed = 1\nseed = 2", ["not valid TOML"]),
        ("a.toml", "config_file = 'b'", ["config_file", "only on the command line"]),
        ("a.toml", "lr_warmup_steps = 1.5", ["lr_warmup_steps", "1.5"]),
        ("a.yaml", "seed: [1", ["a.yaml", "not valid YAML"]),
        ("a.yaml", "seed: ${nowhere}", ["a.yaml", "nowhere"]),
        ("a.yaml", "output_dir: ???", ["a.yaml", "output_dir"]),
        ("a.yaml", "- seed", ["a.yaml", "expected keys"]),
        ("a.json", '{"seed": 1, "seed": 2}', ["a.json", "duplicate key 'seed'"]),
        ("a.json", '{"flip_aug": null}', ["flip_aug: expected true or false, got None"]),
    ],
)
def test_a_wrong_file_is_named_with_key_value_and_what_was_expected(
    tmp_path: Path, name: str, text: str, says: list[str]
) -> None:
    path = write(tmp_path / name, text)
    message = problem(lambda: network("--config_file", path))
    assert [part for part in says if part not in message] == []


def test_a_file_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_bytes(b"output_name = '\xff'")
    assert "not UTF-8" in problem(lambda: network(f"--config_file={tmp_path / 'a.toml'}"))


def test_a_byte_order_mark_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("seed = 1", encoding="utf-8-sig")
    assert network(f"--config_file={tmp_path / 'a.toml'}").training.seed == 1


def test_an_unknown_name_given_from_python_is_an_error() -> None:
    assert "Did you mean 'network_dim'" in problem(lambda: from_flags(NetworkTrainOptions, network_dimm=1))
    assert "seed" in problem(lambda: with_flags(NetworkTrainOptions(), seed="x"))


# Writing options down


NASTY = 'C:\\xmas\\new "é日本"\n\ttab \x7f # ${no} """'


@pytest.mark.parametrize("container", CONTAINERS)
def test_the_printed_configuration_gives_equal_options(
    container: type, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--learning_rate=3e-7", "--flip_aug", "--lr_warmup_steps=10%", "--optimizer_args", "weight_decay=0.1", "eps=1e-8"]
    argv += [f"--metadata_description={NASTY}", "--resolution=512,768", "--max_grad_norm=0", "--wandb_api_key=hidden"]
    options = parse(container, argv)
    with pytest.raises(SystemExit) as info:
        parse(container, [*argv, "--print_config"])
    printed = capsys.readouterr().out
    assert info.value.code == 0
    assert "hidden" not in printed
    again = parse(container, ["--config_file", write(tmp_path / "again.toml", printed)])
    assert with_flags(again, wandb_api_key="hidden", config_file=None) == options
    assert parse_toml(printed)["metadata"]["metadata_description"] == NASTY


def test_output_config_writes_a_file_that_reads_back_and_overwrites_none(tmp_path: Path) -> None:
    target = tmp_path / "run"
    with pytest.raises(SystemExit) as info:
        network("--config_file", str(target), "--output_config", "--network_dim=8")
    assert info.value.code == 0
    assert network("--config_file", str(target)).network.network_dim == 8
    message = problem(lambda: network("--config_file", str(target), "--output_config", "--network_dim=9"))
    assert "run.toml" in message and "not overwritten" in message
    assert network("--config_file", str(target)).network.network_dim == 8


def test_secrets_are_left_out_of_what_is_stored() -> None:
    options = from_flags(NetworkTrainOptions, wandb_api_key="hidden")
    assert flat(options)["wandb_api_key"] == "hidden"
    assert "hidden" not in flat(options, secrets=False).values()
    assert "hidden" not in to_toml(options)


def test_every_option_that_can_be_unset_has_no_default() -> None:
    """TOML has no null, so an unset option with another default would be lost on the way through a file."""
    for container in CONTAINERS:
        assert [name for name, flag in flags_of(container).items() if flag.optional and flag.default is not None] == []


def test_every_default_is_of_its_own_type_and_among_its_choices() -> None:
    for container in CONTAINERS:
        for flag in flags_of(container).values():
            assert flag.convert(flag.default) == flag.default
            assert flag.out_of_range(flag.default) is None


# Families


@dataclass(frozen=True, kw_only=True)
class ToyOptions:
    """A family's own."""

    discrete_shift: float = opt(3.0, "time shift")


def test_a_family_brings_its_own_flags() -> None:
    options = parse(NetworkTrainOptions, ["--discrete_shift=1"], ToyOptions)
    assert options.family == ToyOptions(discrete_shift=1.0)
    assert flat(options)["discrete_shift"] == 1.0
    assert with_flags(options, seed=1).family == options.family
    assert "unknown option" in problem(lambda: network("--discrete_shift=1"))


# Rules


def test_good_options_pass_without_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    check_rules(good(tmp_path))
    assert caplog.messages == []


def test_all_that_is_wrong_is_told_at_once(tmp_path: Path) -> None:
    options = good(
        tmp_path, full_bf16=True, train_batch_size=0, zero3_save_16bit_model=True, resume=tmp_path / "no", network_dropout=2.0,
        adaptive_noise_scale=1.0,
    )  # fmt: skip
    lines = problem(lambda: check_rules(options)).split("\n")
    assert len(lines) == 6
    parts = (
        "--full_bf16",
        "--train_batch_size 0",
        "--zero3_save_16bit_model",
        "--resume",
        "--network_dropout 2",
        "--adaptive_noise",
    )
    for part in parts:
        assert sum(part in line for line in lines) == 1, part


@pytest.mark.parametrize("container", CONTAINERS)
def test_every_planned_option_says_so_when_it_is_set(container: type) -> None:
    other: dict[type, Any] = {bool: True, int: 1, float: 0.5, str: "1,2"}
    planned = [flag for flag in flags_of(container).values() if flag.planned]
    assert planned
    given = {f.name: f.declared.choices[0] if f.declared.choices else other[f.element] for f in planned}
    message = problem(lambda: check_rules(from_flags(container, **given)))
    missing = [f.name for f in planned if f"--{f.name} is known, but not implemented" not in message]
    assert missing == []


ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"pretrained_model_name_or_path": None}, "--pretrained_model_name_or_path is missing"),
    ({"output_dir": None}, "--output_dir is missing"),
    ({"output_dir": __file__}, "is a file"),
    ({"network_module": None}, "--network_module is missing"),
    ({"train_data_dir": None}, "no training data"),
    ({"resolution": None}, "--resolution is missing"),
    ({"train_data_dir": "nowhere"}, "--train_data_dir nowhere: does not exist"),
    ({"train_data_dir": __file__}, "is not a folder"),
    ({"base_weights": ["nowhere.safetensors"]}, "--base_weights nowhere.safetensors: does not exist"),
    ({"full_fp16": True, "mixed_precision": "bf16"}, "--full_fp16 needs --mixed_precision fp16, which is 'bf16'"),
    ({"deepspeed": True}, "accelerate launch --multi_gpu"),
    ({"offload_optimizer_device": "cpu"}, "PagedAdamW8bit"),
    ({"shard_weights": True, "cpu_offload_checkpointing": True, "gradient_checkpointing": True}, "gathered weights to main"),
    ({"shard_weights": True, "fused_backward_pass": True, "max_grad_norm": 0.0}, "--shard_weights cannot be used with --fused"),
    ({"shard_weights": True, "torch_compile": True}, "--shard_weights cannot be used with --torch_compile"),
    ({"shard_weights": True, "auto_fit": True}, "--shard_weights cannot be used with --auto_fit"),
    ({"shard_weights": True, "quantize_base": "int8"}, "weights in few bits are not shared out"),
    ({"mixed_precision": "fp16", "full_bf16": True}, "--full_bf16 needs --mixed_precision bf16, which is 'fp16'"),
    ({"adaptive_noise_scale": 1.0}, "--adaptive_noise_scale needs"),
    ({"min_timestep": 500, "max_timestep": 500}, "--min_timestep 500 has to be below --max_timestep 500"),
    ({"scale_v_pred_loss_like_noise_pred": True}, "needs --v_parameterization"),
    ({"v_pred_like_loss": 0.5, "v_parameterization": True}, "--v_pred_like_loss"),
    ({"enable_bucket": True, "min_bucket_reso": 512, "max_bucket_reso": 256}, "512 is larger than --max_bucket_reso 256"),
    ({"cache_latents": True, "color_aug": True}, "--cache_latents"),
    ({"cache_latents_to_disk": True, "random_crop": True}, "--cache_latents"),
    ({"network_train_unet_only": True, "network_train_text_encoder_only": True}, "exclude each other"),
    ({"cache_text_encoder_outputs": True}, "add --network_train_unet_only"),
    (
        {"network_train_unet_only": True, "cache_text_encoder_outputs_to_disk": True, "token_warmup_step": 5},
        "captions that change from step to step",
    ),
    ({"dim_from_weights": True}, "--dim_from_weights needs"),
    ({"base_weights_multiplier": [1.0]}, "--base_weights_multiplier has more values"),
    ({"use_8bit_adam": True, "use_lion_optimizer": True}, "exclude each other"),
    ({"use_8bit_adam": True, "optimizer_type": "AdamW"}, "--optimizer_type AdamW stands beside"),
    ({"log_with": "tensorboard"}, "--log_with tensorboard needs --logging_dir"),
    ({"sdpa": True, "xformers": True}, "the flags of attention contradict each other"),
    ({"attn_mode": "math", "mem_eff_attn": True}, "the flags of attention contradict each other"),
    ({"attn_mode": "sageattn"}, "attention by sageattn (--attn_mode) has no backward pass"),
    ({"max_train_steps": 0}, "--max_train_steps 0: must be at least 1"),
    ({"text_encoder_lr": [1e-4, -1.0]}, "--text_encoder_lr -1.0: must be at least 0"),
]  # fmt: skip


@pytest.mark.parametrize("mode", [mode for mode, needs in ATTENTION_BACKENDS.items() if needs.package])
def test_attention_without_its_package_is_an_error_that_says_how_to_install_it(tmp_path: Path, mode: str) -> None:
    needs = ATTENTION_BACKENDS[mode]
    if find_spec(needs.package) is not None:
        pytest.skip(f"{needs.package} is installed")
    message = problem(lambda: check_rules(good(tmp_path, attn_mode=mode)))
    assert needs.package in message and needs.install in message
    assert ("computes in fp16 and bf16, and --mixed_precision is 'no'" in message) == needs.half_only


def test_names_of_one_attention_do_not_contradict_each_other(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = good(tmp_path, attn_mode="torch", sdpa=True, mem_eff_attn=True)
    check_rules(options)
    assert caplog.messages == []
    assert options.attention_mode == "sdpa"


@pytest.mark.parametrize(("given", "says"), ERRORS)
def test_a_broken_rule_is_the_only_thing_told(tmp_path: Path, given: dict[str, Any], says: str) -> None:
    message = problem(lambda: check_rules(good(tmp_path, **given)))
    assert says in message
    assert "\n" not in message


WARNINGS: list[tuple[dict[str, Any], str]] = [
    ({"v2": True, "clip_skip": 2}, "--clip_skip 2 with --v2"),
    ({"zero_terminal_snr": True}, "--zero_terminal_snr without --v_parameterization"),
    ({"dataset_config": __file__, "train_data_dir": "nowhere"}, "have no effect beside --dataset_config"),
    ({"max_train_epochs": 2, "max_train_steps": 10}, "--max_train_epochs 2 goes before --max_train_steps 10"),
    ({"sample_every_n_steps": 5}, "no --sample_prompts"),
    ({"sample_prompts": __file__}, "--sample_prompts has no effect"),
    ({"preserve_prior": True}, "custom_attributes = { diff_output_preservation = true }"),
    ({"prior_choices": 3}, "--prior_choices has no effect"),
    ({"async_upload": True}, "have no effect without --huggingface_repo_id"),
    ({"ip_noise_gamma_random_strength": True}, "--ip_noise_gamma_random_strength has no effect without"),
    ({"noise_offset_random_strength": True}, "--noise_offset_random_strength has no effect without"),
    ({"multires_noise_discount": 0.5}, "--multires_noise_discount has no effect without"),
    ({"huber_c": 0.2, "huber_scale": 2}, "--huber_schedule, --huber_c and --huber_scale have no effect without"),
    ({"p2_k": 2}, "--p2_k has no effect without --p2_gamma"),
    ({"prior_loss_weight": 0.5}, "--prior_loss_weight has no effect without regularization pictures"),
    ({"masked_loss_normalize": True}, "--masked_loss_normalize has no effect without masks"),
    ({"save_last_n_steps": 5}, "have no effect without --save_every_n_steps"),
    ({"save_last_n_epochs": 5}, "have no effect without --save_every_n_epochs"),
    ({"save_last_n_steps_state": 5, "save_every_n_steps": 5}, "have no effect without --save_state"),
    ({"log_prefix": "x", "log_config": True}, "have no effect without a tracker"),
    ({"wandb_run_name": "x", "logging_dir": "logs"}, "have no effect without --log_with wandb"),
    ({"ema_decay": 0.9}, "have no effect without --ema"),
    ({"training_comment": "x", "no_metadata": True}, "--training_comment has no effect on a whole model"),
    ({"vae_batch_size": 4}, "--vae_batch_size has no effect without --cache_latents"),
    ({"dynamo_backend": "eager"}, "--dynamo_backend has no effect without --torch_compile"),
    ({"split_attn": True}, "--split_attn has no effect: captions"),
    ({"torch_compile": True, "dynamo_backend": "no"}, "--torch_compile has no effect with --dynamo_backend no"),
    ({"persistent_data_loader_workers": True}, "--persistent_data_loader_workers has no effect"),
    ({"lowram": True}, "--lowram has no effect"),
    ({"shard_weights": True, "plan": True}, "--plan counts whole weights"),
]


@pytest.mark.parametrize(("given", "says"), WARNINGS)
def test_a_doubtful_option_is_a_warning(
    tmp_path: Path, given: dict[str, Any], says: str, caplog: pytest.LogCaptureFixture
) -> None:
    check_rules(good(tmp_path, **given))
    assert len(caplog.messages) == 1
    assert says in caplog.messages[0]


def test_a_learning_rate_nobody_chose_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = from_flags(
        NetworkTrainOptions,
        pretrained_model_name_or_path="m", output_dir="o", train_data_dir=tmp_path, resolution=64, network_module="n",
    )  # fmt: skip
    check_rules(options)
    assert "2e-06" in caplog.text
    caplog.clear()
    check_rules(with_flags(options, unet_lr=1e-4))
    assert caplog.messages == []


def test_full_training_rules_know_which_script_asks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base: dict[str, Any] = {"pretrained_model_name_or_path": "m", "output_dir": "o", "learning_rate": 1e-6, "resolution": 64}
    metadata = write(tmp_path / "m.json", "{}")
    assert "fine_tune.py needs --in_json" in problem(lambda: check_rules(from_flags(FineTuneOptions, **base)))
    assert "Use fine_tune.py" in problem(lambda: check_rules(from_flags(DreamBoothOptions, **base, in_json=metadata)))
    cached = {**base, "train_data_dir": tmp_path, "cache_text_encoder_outputs": True}
    assert "--no-train_text_encoder" in problem(lambda: check_rules(from_flags(DreamBoothOptions, **cached)))
    check_rules(from_flags(DreamBoothOptions, **cached, train_text_encoder=False))
    check_rules(from_flags(FineTuneOptions, **base, in_json=metadata))
    assert caplog.messages == []
    check_rules(from_flags(FineTuneOptions, **base, in_json=metadata, learning_rate_te=1e-6))
    assert "--learning_rate_te 1e-06 has no effect" in caplog.text


def test_every_rule_names_flags_that_exist() -> None:
    import re

    for rule in RULES:
        known = {name for c in CONTAINERS if issubclass(c, rule.scope) for name in flags_of(c)}
        named = set(re.findall(r"--(?:no-)?([a-z_0-9]+)", rule.message)) | set(re.findall(r"\{(\w+)\}", rule.message))
        assert named <= known, (named - known, rule.message)


# Flags and documentation stay as they are


def test_no_flag_or_default_changed_unnoticed() -> None:
    """After a wanted change, run `python tools/make_options_page.py` and look at the difference."""
    expected = json.loads(make_options_page.SNAPSHOT.read_text(encoding="utf-8"))
    assert json.loads(make_options_page.snapshot()) == expected
    assert make_options_page.PAGE.read_text(encoding="utf-8") == make_options_page.page()


@pytest.mark.parametrize("container", CONTAINERS)
def test_help_shows_every_flag(container: type) -> None:
    text = build_parser(container).format_help()
    assert isinstance(build_parser(container), argparse.ArgumentParser)
    assert [name for name in flags_of(container) if f"--{name}" not in text] == []


@pytest.mark.parametrize("script", make_options_page.SCRIPTS)
def test_help_answers_without_importing_torch(script: str) -> None:
    result = subprocess.run([sys.executable, "-X", "importtime", script, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0
    assert "--learning_rate" in result.stdout and script in result.stdout
    imported = {line.rsplit("|", 1)[-1].strip() for line in result.stderr.splitlines()}
    assert "library.option_groups" in imported
    assert not imported & {"torch", "numpy", "diffusers", "transformers", "omegaconf"}


def test_an_error_needs_no_torch_either_and_exits_with_2() -> None:
    result = subprocess.run([sys.executable, "train_network.py", "--lerning_rate=1"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.strip() == "error: unknown option '--lerning_rate'. Did you mean '--learning_rate'?"


def test_groups_are_frozen() -> None:
    options = NetworkTrainOptions()
    for entry in fields(options):
        if entry.name not in ("explicit", "family"):
            value = getattr(options, entry.name)
            with pytest.raises(AttributeError):
                setattr(value, fields(value)[0].name, None)
